"""Estimators against what is known in closed form, and what must not change them."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from latentprior.steer.estimate import (
    difference_of_means,
    mean_difference,
    paired_pca,
    probe_normal,
    random_direction,
    shuffled_mean_difference,
)
from latentprior.utils.errors import InputError

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(2, 12)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def clusters(n: int = 4000, d: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two Gaussian classes N(+-mean / 2, diag(std^2)): rows, labels, mean and std."""
    mean, std = normal(d, seed=seed), torch.linspace(0.3, 3.0, d).double()
    labels = torch.arange(n) % 2
    x = (labels[:, None] - 0.5) * mean + std * normal(n, d, seed=seed + 1)
    return x.float(), labels, mean, std


def assert_unit(vector: Tensor, d: int) -> None:
    assert vector.shape == (d,) and vector.dtype == torch.float32
    assert float(vector.double().norm()) == pytest.approx(1, abs=1e-6)


# -- difference of means ---------------------------------------------------------------------------------------------


def test_difference_of_means_by_hand():
    positive, negative = torch.tensor([[4.0, 5.0], [8.0, 5.0]]), torch.tensor([[3.0, 1.0]])
    assert difference_of_means(positive, negative).tolist() == pytest.approx([0.6, 0.8])
    assert mean_difference(positive, negative).tolist() == [3.0, 4.0]


def test_difference_of_means_finds_the_clusters_axis():
    x, labels, mean, _ = clusters()
    found = difference_of_means(x[labels == 1], x[labels == 0])
    assert float(found.double() @ unit(mean)) > 0.99


def test_difference_of_means_sums_in_float64():
    far = torch.full((10_000, 2), 1000.0)
    positive = far.clone()
    positive[:, 0] += 2**-10  # exact in float32, but lost in a float32 sum of 10,000
    assert difference_of_means(positive, far).tolist() == [1.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(SEEDS, SIZES, st.floats(0.01, 100), st.floats(-10, 10))
def test_difference_of_means_ignores_scale_and_shift_and_turns_with_the_space(seed, d, scale, shift):
    p, n = normal(5, d, seed=seed), normal(7, d, seed=seed + 1)
    expected = difference_of_means(p, n)
    assert_unit(expected, d)
    torch.testing.assert_close(difference_of_means(p * scale + shift, n * scale + shift), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(difference_of_means(n, p), -expected)
    turn = rotation(d, seed + 2)
    torch.testing.assert_close(difference_of_means(p @ turn, n @ turn), (expected.double() @ turn).float())


# -- paired PCA ------------------------------------------------------------------------------------------------------


def test_paired_pca_is_the_singular_vector_of_the_differences():
    p, n = normal(50, 8, seed=0) + 0.7, normal(50, 8, seed=1)
    reference = TruncatedSVD(1, algorithm="arpack", random_state=0).fit((p - n).numpy()).components_[0]
    found = paired_pca(p, n)
    assert_unit(found, 8)
    assert abs(float(found.double() @ torch.from_numpy(reference.copy()))) == pytest.approx(1, abs=1e-6)


def test_paired_pca_does_not_centre():
    # All pairs differ by much along the first axis, and vary along the second.
    p = torch.tensor([[10.0, 1.0], [10.0, -1.0], [10.0, 2.0], [10.0, -2.0]])
    found = paired_pca(p, torch.zeros(4, 2))
    assert found.tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("pairs", [3, 40])  # fewer than dimensions, and more: two Gram matrices
def test_paired_pca_recovers_the_axis_whatever_is_common_to_a_pair(pairs):
    axis, common = unit(normal(16, seed=0)), 100 * normal(pairs, 16, seed=1)
    sizes = normal(pairs, 1, seed=2).abs() + 1
    p, n = common + sizes * axis + 0.01 * normal(pairs, 16, seed=3), common - sizes * axis
    assert float(paired_pca(p.float(), n.float()).double() @ axis) > 0.999


def test_paired_pca_of_one_pair_is_its_difference():
    p, n = normal(1, 5, seed=0), normal(1, 5, seed=1)
    torch.testing.assert_close(paired_pca(p, n), difference_of_means(p, n))


@settings(max_examples=50, deadline=None)
@given(SEEDS, SIZES, st.integers(1, 30), st.floats(0.01, 100))
def test_paired_pca_ignores_scale_and_shifts_of_pairs(seed, d, pairs, scale):
    p, n = normal(pairs, d, seed=seed) + 1.0, normal(pairs, d, seed=seed + 1)
    values = torch.linalg.svdvals(p - n)
    assume(len(values) == 1 or float(values[1]) < 0.9 * float(values[0]))  # else it is not well defined
    expected = paired_pca(p, n)
    assert_unit(expected, d)
    projected = (p - n) @ expected.double()
    assert float(projected.mean()) >= 0
    assume(float(projected.mean()) > 1e-3 * float(projected.abs().mean()))  # else the sign is not
    shift = 10 * normal(pairs, d, seed=seed + 2)
    torch.testing.assert_close(paired_pca(scale * p + shift, scale * n + shift), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(paired_pca(n, p), -expected, atol=1e-5, rtol=0)
    turn = rotation(d, seed + 3)
    turned = (expected.double() @ turn).float()
    torch.testing.assert_close(paired_pca(p @ turn, n @ turn), turned, atol=1e-5, rtol=0)


# -- probe -----------------------------------------------------------------------------------------------------------


def test_probe_normal_is_the_optimal_classifiers():
    # For two Gaussians of one diagonal covariance the optimal boundary's normal is mean / std^2, in raw space.
    x, labels, mean, std = clusters(20_000)
    found = probe_normal(x, labels).double()
    assert_unit(found.float(), 6)
    assert float(found @ unit(mean / std.square())) > 0.995
    assert float(found @ unit(mean)) < 0.9  # a difference of means points elsewhere


def test_probe_normal_is_perpendicular_to_the_boundary_of_scikit_learns_probe():
    x, labels, _, _ = clusters(200)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    probe = LogisticRegression(C=0.5, tol=1e-8).fit(((x - mean) / std).numpy(), labels.numpy())
    found = probe_normal(x, labels, l2=2.0).double()
    along = normal(6, seed=5)
    along -= found * (found @ along)  # within the boundary, up to its distance from the origin
    moved = [float(probe.decision_function(((x[:1] + step) / std - mean / std).numpy())[0]) for step in (0, along)]
    assert moved[0] == pytest.approx(moved[1], abs=1e-4)
    assert float(probe.decision_function(((x[:1] + found) / std - mean / std).numpy())[0]) > moved[0]


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_probe_normal_follows_the_units_of_each_dimension(seed):
    x, labels, _, _ = clusters(60, 4, seed)
    units = normal(4, seed=seed).abs() + 0.1
    expected = unit(probe_normal(x, labels).double() / units)
    found = probe_normal(x.double() * units + 5, labels).double()
    assert float(found @ expected) > 1 - 1e-6


def test_probe_normal_gives_constant_dimensions_nothing():
    x, labels, _, _ = clusters(400)
    x[:, 2], x[:, 4] = 1234.567, 0.0
    found = probe_normal(x, labels)
    assert found[2] == 0 and found[4] == 0
    torch.testing.assert_close(found[[0, 1, 3, 5]], probe_normal(x[:, [0, 1, 3, 5]], labels))


@pytest.mark.parametrize("as_type", [list, np.asarray, lambda labels: torch.tensor(labels).bool()])
def test_labels_of_any_type(as_type):
    x, labels, _, _ = clusters(100)
    torch.testing.assert_close(probe_normal(x, as_type(labels.tolist())), probe_normal(x, labels))


# -- controls --------------------------------------------------------------------------------------------------------


def test_random_directions_are_uniform_and_repeat():
    drawn = torch.stack([random_direction(16, seed) for seed in range(400)])
    assert_unit(drawn[0], 16)
    assert torch.equal(drawn[3], random_direction(16, 3)) and not torch.equal(drawn[3], drawn[4])
    assert float(drawn.mean(0).norm()) < 0.1  # 1 / sqrt(400) is expected
    torch.testing.assert_close(drawn.T @ drawn / 400, torch.eye(16) / 16, atol=0.02, rtol=0)


def shuffled(x: Tensor, labels, seed: int) -> Tensor:
    difference = shuffled_mean_difference(x, labels, seed)
    return (difference / difference.norm()).float()


def test_shuffled_difference_keeps_counts_and_forgets_labels():
    x, labels = normal(40, 5, seed=0).float(), [1] * 10 + [0] * 30
    found = shuffled(x, labels, 7)
    assert_unit(found, 5)
    assert torch.equal(found, shuffled(x, labels, 7))
    assert not torch.equal(found, shuffled(x, labels, 8))
    # One-hot rows show which side each row is on: 10 rows count 1/10, 30 rows -1/30.
    eye = shuffled(torch.eye(40), labels, 7)
    assert int((eye > 0).sum()) == 10 and int((eye < 0).sum()) == 30
    assert torch.equal(difference_of_means(x[eye > 0], x[eye < 0]), found)
    assert (eye[:10] > 0).sum() < 10


def test_shuffled_difference_is_not_the_concept():
    x, labels, mean, _ = clusters(4000, 64)
    cosines = [float(shuffled(x, labels, seed).double() @ unit(mean)) for seed in range(20)]
    assert abs(float(np.mean(cosines))) < 0.2
    assert float(difference_of_means(x[labels == 1], x[labels == 0]).double() @ unit(mean)) > 0.9


def test_nothing_touches_the_global_generator():
    x, labels, _, _ = clusters(40)
    before = torch.random.get_rng_state()
    random_direction(4, 0), shuffled(x, labels, 0), probe_normal(x, labels)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line():
    x, nothing = torch.eye(4), torch.zeros(0, 4)
    holes = torch.eye(4)
    holes[1, 2], holes[3, 0] = torch.nan, torch.inf
    labels = [0, 1, 0, 1]
    for call, message in [
        (lambda: difference_of_means(x, nothing), "both sides, got 4 and 0"),
        (lambda: difference_of_means(nothing, x), "both sides, got 0 and 4"),
        (lambda: difference_of_means(x, x), "same mean"),
        (lambda: difference_of_means(holes, x), "2 of 4 activations are infinite or NaN"),
        (lambda: paired_pca(nothing, nothing), "needs pairs"),
        (lambda: paired_pca(x, x[:3]), "needs pairs, got 4 positive and 3 negative"),
        (lambda: paired_pca(x, x), "no direction between"),
        (lambda: paired_pca(x, holes), "infinite or NaN"),
        (lambda: probe_normal(x, [1] * 4), "both classes, all 4 are 1"),
        (lambda: probe_normal(x, [0] * 4), "both classes, all 4 are 0"),
        (lambda: probe_normal(x, [0, 1, 2, 1]), r"0 or 1, got \[0, 1, 2\]"),
        (lambda: probe_normal(x, np.array(["neg", "pos", "neg", "1"])), r"0 or 1, got \['neg', 'pos', '1'\]"),
        (lambda: probe_normal(x, torch.tensor([0, 0.5, 1, 1])), r"0 or 1, got \[0.0, 0.5, 1.0\]"),
        (lambda: probe_normal(x, labels[:3]), "one label for each row"),
        (lambda: probe_normal(nothing, []), "both classes|one label"),
        (lambda: probe_normal(holes, labels), "infinite or NaN"),
        (lambda: probe_normal(torch.ones(4, 4), labels), "all rows are equal"),
        (lambda: probe_normal(x, labels, l2=0.0), "l2 must be positive"),
        (lambda: shuffled(x, [1] * 4, 0), "both classes"),
        (lambda: shuffled(torch.ones(4, 4), labels, 0), "same mean"),
        (lambda: random_direction(0, 0), "must be positive"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_sides_of_different_width_are_one_line(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    for estimator in (difference_of_means, paired_pca):
        with pytest.raises(InputError, match="4 and 3"):
            estimator(torch.eye(4), torch.eye(4)[:, :3])


def test_means_that_differ_by_rounding_alone_are_the_same():
    x = normal(31, 5, seed=0)
    with pytest.raises(InputError, match="same mean"):
        difference_of_means(x, x.flip(0))
