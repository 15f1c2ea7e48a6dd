"""The scaling law's fit: exact where it can be, honest intervals where it cannot, and one-line refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from latentprior.scaling.law import correlation, envelope, fit_power_law
from latentprior.utils.errors import InputError

COMPUTE = np.geomspace(1e12, 1e16, 12)
PAPER = (0.52, 435.1, 0.169)  # E, A, alpha of Llama-1B priors


def law(compute: np.ndarray, E: float, A: float, alpha: float) -> np.ndarray:
    return E + A * compute**-alpha


@pytest.mark.parametrize(("E", "A", "alpha"), [PAPER, (0.0, 30.0, 0.1), (1.2, 1e8, 0.7), (0.9, 3e30, 2.5)])
def test_exact_losses_give_the_law_back(E, A, alpha):
    found = fit_power_law(COMPUTE, law(COMPUTE, E, A, alpha), resamples=50)
    assert pytest.approx(E, abs=2e-5) == found.E
    assert found.alpha == pytest.approx(alpha, rel=1e-4)
    assert math.log(found.A) == pytest.approx(math.log(A), rel=1e-4)
    assert found.residual < 1e-5 and found.points == 12
    for low, high in (found.E_interval, found.alpha_interval):
        assert high - low < 5e-3
    loss, low, high = found.predict([1e13, 1e18])
    assert loss == pytest.approx(law(np.array([1e13, 1e18]), E, A, alpha), rel=1e-4)
    assert (low <= loss + 2e-3).all() and (loss <= high + 2e-3).all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = np.array([*PAPER, law(np.array([1e17]), *PAPER)[0]])
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(60):
        loss = law(COMPUTE, *PAPER) * (1 + 0.005 * rng.standard_normal(12))
        found = fit_power_law(COMPUTE, loss, resamples=200)
        _, low, high = found.predict([1e17])
        ends = np.array([found.E_interval, found.A_interval, found.alpha_interval, (low[0], high[0])])
        hits.append((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    coverage = np.mean(hits, axis=0)
    assert (coverage > 0.82).all(), coverage  # 95% of 60: at least 50 with probability 99.9%


def test_more_noise_widens_the_interval_until_it_is_said_that_E_is_not_known():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(8)
    compute = np.geomspace(1e14, 4e15, 8)
    widths, pinned = [], []
    for size in (1e-5, 1e-3, 1e-2):
        found = fit_power_law(compute, law(compute, *PAPER) * (1 + size * noise), resamples=300)
        widths.append(np.diff(found.E_interval)[0])
        pinned.append(found.E_pinned)
    assert widths == sorted(widths)
    assert pinned[0] and not pinned[-1]


def test_one_failed_run_hardly_moves_the_law():
    rng = np.random.default_rng(1)
    loss = law(COMPUTE, 1.0, 2e3, 0.25) * (1 + 1e-3 * rng.standard_normal(12))
    clean = fit_power_law(COMPUTE, loss, resamples=10)
    loss[7] *= 1.15
    found = fit_power_law(COMPUTE, loss, resamples=10)
    assert abs(found.predict([1e14])[0][0] / clean.predict([1e14])[0][0] - 1) < 5e-3
    assert abs(found.alpha - clean.alpha) < 0.04


def test_same_seed_same_intervals():
    loss = law(COMPUTE, *PAPER) * (1 + 0.01 * np.random.default_rng(0).standard_normal(12))
    state = np.random.get_state()[1].tolist()
    a, b, c = (fit_power_law(COMPUTE, loss, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert a.E_interval == b.E_interval != c.E_interval
    assert a.E == c.E
    assert np.random.get_state()[1].tolist() == state


def test_E_stays_between_nothing_and_the_smallest_loss():
    concave = np.array([3.0, 2.9, 2.7, 2.3, 1.5])  # falls ever faster: no law, E at its lower bound
    compute = np.geomspace(1e12, 1e14, 5)
    assert fit_power_law(compute, concave, resamples=10).E == 0
    steps = np.array([3.0, 1.0, 1.0, 1.0, 0.999])
    assert fit_power_law(compute, steps, resamples=10).E <= 0.999


@pytest.mark.parametrize(
    ("compute", "loss", "message"),
    [
        ([1e12, 2e12, 4e12], [3, 2, 1.5], "at least 4 different computes, got 3"),
        ([1e12] * 6, [3, 2, 1.5, 1, 1, 1], "at least 4 different computes, got 1"),
        ([1e12, 2e12, 4e12, 8e12], [3, 2, float("nan"), 1], "loss must be finite, got nan"),
        ([1e12, 2e12, 4e12, float("inf")], [3, 2, 1.5, 1], "compute must be finite, got inf"),
        ([0, 2e12, 4e12, 8e12], [3, 2, 1.5, 1], "must be positive"),
        ([1e12, 2e12, 4e12, 8e12], [1, 2, 3, 4], "does not fall with compute"),
        ([1e12, 2e12, 4e12, 8e12], [2, 2, 2, 2], "does not fall with compute"),
        ([1e12, 2e12, 4e12, 8e12], [2, 1], r"must both be \[N\]"),
        ([], [], r"must both be \[N\]"),
    ],
)
def test_points_without_a_law_are_refused_in_one_line(compute, loss, message):
    with pytest.raises(InputError, match=message) as refused:
        fit_power_law(compute, loss)
    assert "\n" not in str(refused.value)


def test_envelope_is_the_falling_lower_hull():
    compute = [1, 10, 10, 100, 1000, 1e4, 1e5]
    loss = [3.0, 2.0, 2.5, 1.9, 1.0, 0.9, 0.95]
    #  100: above the line from 10 to 1000; 1e5: worse than a cheaper run; the second at 10: worse at equal compute
    assert envelope(compute, loss).tolist() == [0, 1, 4, 5]
    shuffled = [4, 6, 1, 0, 3, 5, 2]
    chosen = envelope([compute[i] for i in shuffled], [loss[i] for i in shuffled])
    assert [shuffled[i] for i in chosen] == [0, 1, 4, 5]


def test_envelope_of_an_exact_law_is_every_point():
    loss = law(COMPUTE, *PAPER)
    assert envelope(COMPUTE, loss).tolist() == list(range(12))
    both = envelope(np.tile(COMPUTE, 2), np.concatenate([loss, loss * 1.1]))
    assert both.tolist() == list(range(12))


def test_correlations_are_scipys_with_intervals_around_them():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(30)
    b = np.exp(a + 0.3 * rng.standard_normal(30))
    found = correlation(a, b)
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    for value, (low, high) in (
        (found.pearson, found.pearson_interval),
        (found.spearman, found.spearman_interval),
    ):
        assert 0.3 < low < value < high <= 1
    low, high = correlation(a, rng.standard_normal(30)).spearman_interval
    assert low < 0 < high
    assert correlation(a, -a).pearson_interval == pytest.approx((-1, -1))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2, 3], [1, 2, 3], "at least 4 runs, got 3"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "same in all runs"),
        ([1, 2, 3, float("nan")], [1, 2, 3, 4], "a must be finite"),
        ([1, 2, 3, 4], [1, 2, 3], r"must both be \[N\]"),
    ],
)
def test_measures_without_a_correlation_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        correlation(a, b)
