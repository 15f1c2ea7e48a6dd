from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from latentprior.neurons.statistics import BINS, Calibration, UnitStatistics
from latentprior.utils.errors import InputError


def heavy(n: int = 5000, seed: int = 0) -> np.ndarray:
    """[n, 4]: units with outliers, with a mean far from 0, of tiny scale, and one that does not vary."""
    draw = np.random.default_rng(seed)
    columns = [draw.standard_t(5, n), 1e3 + draw.normal(size=n), 1e-6 * draw.exponential(size=n), np.full(n, 0.25)]
    return np.stack(columns, axis=1).astype(np.float32)


def collected(values: np.ndarray, parts: int = 7) -> UnitStatistics:
    calibration = Calibration(values.shape[1])
    calibration.update(torch.from_numpy(values[:1000]))
    statistics = calibration.statistics()
    for part in np.array_split(values, parts):
        statistics.update(torch.from_numpy(part))
    return statistics


def test_moments_equal_float64():
    values = heavy()
    statistics, double = collected(values), values.astype(np.float64)
    np.testing.assert_allclose(statistics.mean(), double.mean(0), rtol=1e-6, atol=1e-7 * double.std(0).max())
    np.testing.assert_allclose(statistics.variance()[:3], double.var(0)[:3], rtol=1e-4)
    np.testing.assert_allclose(statistics.kurtosis()[:3], stats.kurtosis(double[:, :3]), rtol=1e-3)
    assert statistics.variance()[3] < 1e-12 and statistics.kurtosis()[3] == 0
    np.testing.assert_array_equal(statistics.low, values.min(0))
    np.testing.assert_array_equal(statistics.high, values.max(0))


def test_histogram_and_shares_equal_counting():
    values = heavy()
    statistics = collected(values)
    low, high = (bound.numpy() for bound in statistics.bounds())
    for unit in range(4):
        edges = np.linspace(low[unit], high[unit], BINS + 1)
        edges[[0, -1]] = -np.inf, np.inf  # the first and last bin hold what lies beyond
        wanted = np.histogram(values[:, unit], edges)[0]
        found = statistics.histogram[unit].numpy()
        # Rounding may put a value on an edge on its other side; the second unit has a resolution of 2e-5 deviations.
        assert found.sum() == len(values) and np.abs(found - wanted).sum() <= 6
    deviation = np.abs(values - statistics.centre.numpy()) / statistics.scale.numpy()
    wanted = np.stack([(deviation > threshold).mean(0) for threshold in (1, 2, 4)], axis=1)
    np.testing.assert_allclose(statistics.share_above(), wanted, atol=6 / len(values))
    assert statistics.share_above()[0, 2] > 0 and statistics.share_above()[3].tolist() == [0, 0, 0]


def test_batches_do_not_matter():
    values = heavy()
    whole, parts = collected(values, 1), collected(values, 3)
    assert parts.count == whole.count and torch.equal(parts.histogram, whole.histogram)
    torch.testing.assert_close(parts.powers, whole.powers, rtol=1e-5, atol=1e-3)
    assert torch.equal(parts.low, whole.low) and torch.equal(parts.high, whole.high)


def test_a_unit_that_wakes_after_the_calibration():
    calibration = Calibration(1)
    calibration.update(torch.zeros(10, 1))
    statistics = calibration.statistics()
    statistics.update(torch.zeros(10, 1))
    statistics.update(torch.full((10, 1), 3.0))
    assert statistics.mean().item() == 1.5 and statistics.variance().item() == 2.25
    assert statistics.share_above()[0].tolist() == [0.5, 0.5, 0.0]


def test_thresholds_that_are_no_edges_and_scales_of_zero_are_refused():
    statistics = collected(heavy())
    for threshold in (0.1, 5.0, -1.0):
        with pytest.raises(InputError, match="edges of the histogram"):
            statistics.share_above((threshold,))
    with pytest.raises(InputError, match="positive"):
        UnitStatistics(torch.zeros(2), torch.tensor([1.0, 0.0]))
