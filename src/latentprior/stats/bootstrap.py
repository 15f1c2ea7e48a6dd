"""Bootstrap intervals. The unit that is drawn again is an entry: give one value for each document, not each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from latentprior.utils.errors import InputError

Values = Tensor | np.ndarray | Sequence[float | int]

DRAWS_AT_ONCE = 1 << 22


def bootstrap_interval(
    values: Values, weights: Values | None = None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval ``(low, high)`` of a weighted mean.

    For a paired comparison of two conditions give the differences, entry by entry.

    Args:
        values: [n], one for each document, such as the mean loss of its tokens.
        weights: [n], such as the number of tokens; drawn together with their values. Entries of weight 0 take no part.
        level: share of resamples between the two ends.
    """
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level must lie in (0, 1) and resamples be positive, got {level} and {resamples}")
    value, weight = _entries(values, weights)
    if value.min() == value.max():  # scipy warns of a degenerate distribution; the interval is the point itself
        return float(value[0]), float(value[0])
    batch, rng = max(1, DRAWS_AT_ONCE // len(value)), np.random.default_rng(seed)
    how: Any = {"paired": True, "vectorized": True, "method": "percentile", "batch": batch, "rng": rng}
    drawn = stats.bootstrap((value, weight), _weighted_mean, n_resamples=resamples, confidence_level=level, **how)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def bootstrap_counts(
    entries: int, resamples: int, seed: int, usable: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """[1 + resamples, entries] float64: ones, then how often each entry is drawn in each resample.

    Row 0 gives a statistic of the sample, the others its `percentile_interval`. `usable` tells of resamples
    [R, entries] which may stay, [R] bool; the others are drawn again.
    """
    rng = np.random.default_rng(seed)
    kept = np.empty((0, entries))
    while len(kept) < resamples:
        drawn = rng.multinomial(entries, np.full(entries, 1 / entries), size=resamples).astype(float)
        kept = np.concatenate([kept, drawn if usable is None else drawn[usable(drawn)]])
    return np.vstack([np.ones(entries), kept[:resamples]])


def bootstrap_rows(entries: int, resamples: int, seed: int) -> np.ndarray:
    """[1 + resamples, entries] int64: the entries in order, then those of each resample."""
    drawn = np.random.default_rng(seed).integers(entries, size=(resamples, entries))
    return np.vstack([np.arange(entries), drawn])


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
