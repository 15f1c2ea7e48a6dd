"""Bootstrap intervals. The unit that is drawn again is an entry: give one value for each document, not each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from latentprior.utils.errors import InputError, unknown

Statistic = Literal["mean", "median"]
Values = Tensor | np.ndarray | Sequence[float | int]

DRAWS_AT_ONCE = 1 << 22


def bootstrap_interval(
    values: Values,
    weights: Values | None = None,
    *,
    statistic: Statistic = "mean",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean or median.

    For a paired comparison of two conditions give the differences, entry by entry.

    Args:
        values: [n], one for each document, such as the mean loss of its tokens.
        weights: [n], such as the number of tokens; drawn together with their values. Entries of weight 0 take no part.
        statistic: "mean", or the "median" (the weight on either side is equal).
        level: share of resamples between the two ends.
        resamples: how many are drawn.
        seed: seed of the draws.

    Returns:
        ``(low, high)``.

    Raises:
        InputError: fewer than two entries, shapes that differ, NaN or infinite values, negative weights, an unknown
            statistic, or a level outside (0, 1).
    """
    if statistic not in get_args(Statistic):
        raise unknown("statistic", statistic, get_args(Statistic))
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level must lie in (0, 1) and resamples be positive, got {level} and {resamples}")
    value, weight = _entries(values, weights)
    if value.min() == value.max():  # scipy warns of a degenerate distribution; the interval is the point itself
        return float(value[0]), float(value[0])
    result = stats.bootstrap(
        (value, weight),
        _weighted_mean if statistic == "mean" else _weighted_median,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, DRAWS_AT_ONCE // len(value)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_counts(entries: int, resamples: int, seed: int) -> np.ndarray:
    """[1 + resamples, entries] float64: ones, then how often each entry is drawn in each resample.

    For statistics of several means: those under row 0 are the sample's, the others have a `percentile_interval`.
    """
    drawn = np.random.default_rng(seed).multinomial(entries, np.full(entries, 1 / entries), size=resamples)
    return np.vstack([np.ones(entries), drawn])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of `values` [resamples]; an end may be infinite."""
    low, high = np.percentile(values, (2.5, 97.5), method="nearest")
    return float(low), float(high)


def _entries(values: Values, weights: Values | None) -> tuple[np.ndarray, np.ndarray]:
    value = _array(values)
    weight = np.ones_like(value) if weights is None else _array(weights)
    if value.ndim != 1 or value.shape != weight.shape:
        raise InputError(f"values and weights must both be [n], got {value.shape} and {weight.shape}")
    if not (np.isfinite(value).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise InputError("values must be finite, weights finite and not negative")
    value, weight = value[weight > 0], weight[weight > 0]
    if len(value) < 2:
        raise InputError(f"a bootstrap needs at least 2 entries of positive weight, got {len(value)}")
    return value, weight


def _array(values: Values) -> np.ndarray:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy()


def _weighted_mean(value: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
    return (value * weight).sum(axis) / weight.sum(axis)


def _weighted_median(value: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
    order = np.argsort(value, axis)
    value = np.take_along_axis(value, order, axis)
    below = np.take_along_axis(weight, order, axis).cumsum(axis)
    half = below.take([-1], axis) / 2
    ends = [np.expand_dims(np.argmax(reached, axis), axis) for reached in (below >= half, below > half)]
    return np.mean([np.take_along_axis(value, end, axis).squeeze(axis) for end in ends], axis=0)
