from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance_nd
from sklearn.metrics import roc_auc_score

from latentprior.stats.auc import auc_by_group
from latentprior.stats.distances import _sorted_projections, classifier_two_sample, sliced_wasserstein
from latentprior.utils.errors import InputError


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def mixture(n: int, d: int, seed: int) -> torch.Tensor:
    """Two scales in equal parts, of the mean and covariance of `normal`."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.rand(n, 1, generator=generator) < 0.5
    scale = torch.where(wide, 1.75**0.5, 0.5)
    return torch.randn(n, d, generator=generator) * scale


def correlated(n: int, d: int, seed: int, heavy: bool = False) -> torch.Tensor:
    """Rows whose variances fall as 1 / k along oblique directions; with heavy tails, Student's t of 4 degrees."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((n, d)) / np.sqrt(np.arange(1, d + 1))).float()
    directions = torch.linalg.qr(normal(d, d, 99)).Q
    return x @ directions * (torch.from_numpy((2 / rng.chisquare(4, (n, 1))) ** 0.5).float() if heavy else 1.0)


def auc_of(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    return auc_by_group(positive, negative, np.arange(len(positive)), np.arange(len(negative)))


class TestSlicedWasserstein:
    def test_of_a_shifted_copy_is_the_shift_over_the_root_of_the_width(self):
        """Along a random unit direction a shift ``s`` has the mean square ``|s|^2 / d``."""
        x, shift = normal(200, 16, 0), torch.linspace(-1, 2, 16)
        distance = sliced_wasserstein(x, x + shift, projections=20_000)
        assert distance == pytest.approx(float(shift.norm()) / 4, rel=0.02)

    @pytest.mark.parametrize("sizes", [(40, 40), (40, 25), (7, 1), (12, 36)])
    def test_in_one_dimension_is_the_exact_distance(self, sizes: tuple[int, int]):
        """Checked against sets of equal size in which every row is repeated."""
        n, m = sizes
        a, b = normal(n, 1, 0).double(), 2 * normal(m, 1, 1).double() + 1
        common = np.lcm(n, m)
        repeated = [np.sort(np.repeat(x.numpy()[:, 0], common // len(x))) for x in (a, b)]
        expected = np.sqrt(np.square(repeated[0] - repeated[1]).mean())
        assert sliced_wasserstein(a, b, projections=3) == pytest.approx(expected, rel=1e-5)

    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31))
    def test_is_a_distance(self, n: int, m: int, d: int, seed: int):
        a, b, c = normal(n, d, seed), normal(m, d, seed + 1), normal(n, d, seed + 2)
        distance = sliced_wasserstein(a, b, projections=8)
        assert sliced_wasserstein(a, a.flip(0), projections=8) == pytest.approx(0, abs=1e-6)
        assert sliced_wasserstein(b, a, projections=8) == pytest.approx(distance, rel=1e-4)
        assert sliced_wasserstein(3 * a, 3 * b, projections=8) == pytest.approx(3 * distance, rel=1e-4)
        through = sliced_wasserstein(a, c, projections=8) + sliced_wasserstein(c, b, projections=8)
        assert distance <= through * (1 + 1e-5)

    def test_chunks_of_directions_and_rows_do_not_matter(self, monkeypatch: pytest.MonkeyPatch):
        a, b = normal(50, 4, 0), mixture(70, 4, 1)
        whole = sliced_wasserstein(a, b, projections=100)
        monkeypatch.setattr("latentprior.stats.distances.PROJECTION_CHUNK", 7)
        assert sliced_wasserstein(a, b, projections=100) == pytest.approx(whole, rel=1e-6)

    def test_far_from_the_origin_nothing_is_lost(self):
        a, b = normal(100, 4, 0).double(), mixture(100, 4, 1).double()
        assert sliced_wasserstein(a + 1e6, b + 1e6) == pytest.approx(sliced_wasserstein(a, b), rel=1e-4)

    def test_sees_what_two_moments_do_not(self):
        a, b, c = normal(4000, 8, 0), mixture(4000, 8, 1), normal(4000, 8, 2)
        assert sliced_wasserstein(a, b) > 2 * sliced_wasserstein(a, c)

    def test_never_exceeds_the_wasserstein_distance(self):
        a, b = normal(20, 3, 0), mixture(20, 3, 1) + 1
        whole = wasserstein_distance_nd(a.numpy(), b.numpy())  # of order 1, which bounds the mean of order 1
        along = torch.nn.functional.normalize(normal(50, 3, 2))
        zero = torch.zeros(3)
        gaps = _sorted_projections(a, along, zero) - _sorted_projections(b, along, zero)
        assert np.abs(gaps).mean(1).max() <= whole

    def test_the_seed_alone_decides(self):
        a, b = normal(30, 4, 0), mixture(30, 4, 1)
        before = torch.get_rng_state()
        assert sliced_wasserstein(a, b, seed=1) == sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b, seed=2)
        assert torch.equal(torch.get_rng_state(), before)

    def test_refuses_bad_input(self):
        with pytest.raises(InputError, match="same width"):
            sliced_wasserstein(normal(5, 2, 0), normal(5, 3, 0))
        with pytest.raises(InputError, match="at least 1"):
            sliced_wasserstein(normal(0, 2, 0), normal(5, 2, 0))
        with pytest.raises(InputError, match="NaN"):
            sliced_wasserstein(normal(5, 2, 0), normal(5, 2, 0) / 0)
        with pytest.raises(InputError, match="projections"):
            sliced_wasserstein(normal(5, 2, 0), normal(5, 2, 0), projections=0)


class TestClassifierTwoSample:
    def test_is_a_half_within_its_interval_for_one_distribution(self):
        result = classifier_two_sample(normal(1000, 16, 2), normal(1000, 16, 3))
        assert result.auc == pytest.approx(0.5, abs=0.05)
        assert result.low <= 0.5 <= result.high

    def test_tells_distributions_of_equal_mean_and_covariance(self):
        result = classifier_two_sample(normal(1000, 16, 0), mixture(1000, 16, 1))
        assert result.auc > 0.8
        assert 0.5 < result.low < result.auc < result.high

    @pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 1.5, 4])
    def test_few_rows_for_the_width_mislead_neither_way(self, ratio: float):
        """Rows look different along components fitted to them: told apart by that, held-out ones come out reversed."""
        d, n, runs = 128, int(128 * ratio), 2
        for heavy in (False, True):
            equal = [classifier_two_sample(*correlated(2 * n, d, s, heavy).chunk(2), seed=s) for s in range(runs)]
            error = sum((result.high - result.low) ** 2 for result in equal) ** 0.5 / (2 * 1.96 * runs)
            assert np.mean([result.auc for result in equal]) == pytest.approx(0.5, abs=3 * error)
        scale = correlated(5000, d, 0).std(0)
        different = [
            classifier_two_sample(correlated(n, d, s, heavy=True), normal(n, d, s + 50) * scale, seed=s)
            for s in range(runs)
        ]
        assert np.mean([result.auc for result in different]) > 0.5 + (0.05 if ratio < 1 else 0.2)

    def test_intervals_hold_a_half_for_equal_sets_at_the_least_rows(self):
        results = [classifier_two_sample(*correlated(64, 128, seed).chunk(2), seed=seed) for seed in range(24)]
        assert sum(result.low <= 0.5 <= result.high for result in results) >= 20
        assert np.mean([result.auc for result in results]) == pytest.approx(0.5, abs=0.05)

    def test_tells_a_lost_direction_that_no_single_dimension_shows(self):
        """A reconstruction without one of 32 oblique directions: what a low-rank baseline leaves out."""
        direction = torch.nn.functional.normalize(normal(1, 32, 7))
        b = normal(1500, 32, 1)
        reconstruction = b - 0.95 * b @ direction.T @ direction
        assert classifier_two_sample(normal(1500, 32, 0), reconstruction).auc > 0.6

    def test_is_certain_of_disjoint_sets(self):
        result = classifier_two_sample(normal(200, 4, 0), normal(300, 4, 1) + 20, folds=3)
        assert (result.auc, result.low, result.high) == pytest.approx((1, 1, 1))

    def test_dimensions_without_variance_and_rank_are_harmless(self):
        plain = normal(600, 2, 0), mixture(600, 2, 1)
        a, b = (torch.cat([x, x, torch.full((len(x), 1), 0.1)], 1) for x in plain)
        assert classifier_two_sample(a, b).auc == pytest.approx(classifier_two_sample(*plain).auc, abs=0.05)
        assert classifier_two_sample(a[:, -1:], b[:, -1:]).auc == 0.5

    def test_the_seed_alone_decides_also_without_gradients(self):
        a, b = normal(100, 4, 0).bfloat16(), mixture(100, 4, 1).numpy()
        before = torch.get_rng_state()
        first = classifier_two_sample(a, b, seed=3)
        with torch.no_grad():
            assert classifier_two_sample(a, b, seed=3) == first
        assert classifier_two_sample(a, b, seed=4) != first
        assert torch.equal(torch.get_rng_state(), before)

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.lists(st.integers(0, 4), min_size=2, max_size=30))
    def test_auc_is_that_of_sklearn_with_ties(self, positive: list[int], negative: list[int]):
        truth = [1] * len(positive) + [0] * len(negative)
        auc, variance = auc_of(np.array(positive), np.array(negative))
        assert auc == pytest.approx(roc_auc_score(truth, positive + negative))
        assert variance >= 0

    def test_variance_of_the_auc_is_that_of_repeated_draws(self):
        rng = np.random.default_rng(0)
        draws = [auc_of(rng.normal(0.7, 1, 80), rng.normal(0, 1, 60)) for _ in range(1000)]
        aucs, variances = np.array(draws).T
        assert variances.mean() == pytest.approx(aucs.var(), rel=0.15)

    def test_variance_of_the_auc_by_groups_is_that_of_repeated_draws(self):
        rng, groups = np.random.default_rng(0), np.arange(60).repeat(4)

        def drawn(shift: float) -> np.ndarray:
            return rng.normal(shift, 1, 60)[groups] + rng.normal(0, 0.5, 240)

        aucs, variances = np.array([auc_by_group(drawn(0.5), drawn(0), groups, groups) for _ in range(600)]).T
        assert variances.mean() == pytest.approx(aucs.var(), rel=0.2)

    def test_documents_are_not_told_apart(self):
        """Rows of one document are alike; across folds, a network tells the documents of either set."""
        doc = torch.arange(60).repeat_interleave(10)
        sets = [4 * normal(60, 16, seed)[doc] + normal(600, 16, seed + 2) for seed in (0, 1)]
        assert classifier_two_sample(*sets).low > 0.8
        result = classifier_two_sample(*sets, documents=(doc, doc))
        assert result.low < 0.5 < result.high and result.high - result.low > 0.1
        assert classifier_two_sample(sets[0], sets[1] + 20, documents=(doc, None)).auc == pytest.approx(1)
        with pytest.raises(InputError, match="600 .* 3"):
            classifier_two_sample(*sets, documents=(doc[:3], None))
        with pytest.raises(InputError, match="2 documents are too few, .* for 3 folds"):
            classifier_two_sample(*sets, documents=(doc // 30, None))

    def test_refuses_bad_input(self):
        with pytest.raises(InputError, match="at least 30"):
            classifier_two_sample(normal(29, 2, 0), normal(50, 2, 0))
        with pytest.raises(InputError, match="width 400.* 100 .*99"):
            classifier_two_sample(normal(100, 400, 0), normal(99, 400, 0))
        with pytest.raises(InputError, match="folds .* 3, got 2"):
            classifier_two_sample(normal(50, 2, 0), normal(50, 2, 0), folds=2)
        with pytest.raises(InputError, match="same width"):
            classifier_two_sample(normal(50, 2, 0), normal(50, 3, 0))
