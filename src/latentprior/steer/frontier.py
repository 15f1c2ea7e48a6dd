"""Concept-fluency frontiers: what each method of steering gains in concept for what it costs in fluency.

Gain and NLL increase are those of `aggregate`. All bootstraps resample prompts, the same for every method and strength.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from latentprior.stats.bootstrap import bootstrap_counts, percentile_interval
from latentprior.steer.aggregate import DESCRIBED, Aggregate, Key, aggregate
from latentprior.utils.errors import InputError, unknown

LARGEST_RANGE = 1.5  # nats: text this much less likely for each token is seldom of use to anyone
MATCHED_NLL = (1 / 3, 2 / 3, 1.0)  # of the range
MATCHED_GAIN = (0.25, 0.5, 0.75)  # of the baseline's gain at the end of the range


@dataclass(frozen=True, eq=False)
class Curve:
    """Means over prompts [N, 1 + S]: row 0 of the sample, then of its resamples; column 0 is unsteered."""

    gain: np.ndarray
    increase: np.ndarray
    nll: np.ndarray  # the increase on top of the mean unsteered NLL


class Estimate(NamedTuple):
    """A value and its 95% percentile interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    @property
    def interval(self) -> list[float | None] | None:
        """JSON-ready; an infinite end is None."""
        return None if math.isnan(self.low) else [_finite(self.low), _finite(self.high)]

    def named(self, name: str) -> dict[str, Any]:
        return {name: _finite(self.value), f"{name}_interval": self.interval}

    def to_dict(self) -> dict[str, Any]:
        return {"value": _finite(self.value), "interval": self.interval, "clear": self.clear}


@dataclass(frozen=True, eq=False)
class Frontier:
    """Best mean gain for a mean NLL increase: concave, never falling, constant after its last vertex.

    It is the upper-left convex hull of a curve's points. Any point on it can be had: between two strengths, by using
    one for some of the texts and the other for the rest, which mixes both means. Unlike the line through undominated
    points, it never falls when a strength is added, so a finer grid is no handicap. Like every maximum over noisy
    points it flatters: a method without any effect has a small positive area.
    """

    increase: np.ndarray  # [N, V] vertices, never falling; the last one is repeated
    gain: np.ndarray

    def gain_at(self, increase: float) -> np.ndarray:
        """[N] best gain at an NLL increase of at most `increase` >= 0."""
        start, width, rise = self._segments()
        share = np.clip(_ratio(increase - start, width), 0, 1)
        return self.gain[:, 0] + (rise * share).sum(axis=1)

    def increase_at(self, gain: float) -> np.ndarray:
        """[N] least NLL increase (at least 0) that attains `gain`; infinite where it is never attained."""
        _, width, rise = self._segments()
        share = np.clip(_ratio(gain - self.gain[:, :-1], rise), 0, 1)
        found = np.maximum(self.increase[:, 0] + (width * share).sum(axis=1), 0)
        return np.where(gain > self.gain[:, -1] + 1e-12, np.inf, found)

    def area(self, width: float) -> np.ndarray:
        """[N] mean of `gain_at` over increases from 0 to `width`."""
        start, length, rise = self._segments()

        def integral(x: float) -> np.ndarray:
            return _ratio(np.square(np.clip(x - start, 0, length)), 2 * length) + np.maximum(x - start - length, 0)

        return self.gain[:, 0] + (rise * (integral(width) - integral(0.0))).sum(axis=1) / width

    def _segments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.increase[:, :-1], np.diff(self.increase, axis=1), np.diff(self.gain, axis=1)


def curve(aggregated: Aggregate, counts: np.ndarray) -> Curve:
    """Mean gain and NLL at each strength, in every resample of `bootstrap_counts` [N, P].

    A prompt without a rating at some strength is left out of that strength alone; because both figures are differences
    to the same prompt's unsteered text, that does not shift them by how hard the prompt is.
    """
    zero = np.zeros((len(counts), 1))
    gain, increase = (np.hstack([zero, _means(counts, part)]) for part in (aggregated.gain, aggregated.increase))
    return Curve(gain, increase, increase + _means(counts, aggregated.unsteered["nll"][:, None]))


def frontier(points: Curve) -> Frontier:
    """The frontier of every resample's points, from its leftmost to its highest vertex."""
    absent = np.isnan(points.gain)
    x, y = (np.where(absent, 0.0, part) for part in (points.increase, points.gain))  # unsteered is always a point
    row = np.arange(len(x))
    at = np.where(x == x.min(axis=1, keepdims=True), y, -np.inf).argmax(axis=1)
    vertices = [at]
    for _ in range(x.shape[1] - 1):
        dx, dy = x - x[row, at][:, None], y - y[row, at][:, None]
        with np.errstate(over="ignore"):
            slope = np.where(dx > 0, dy / np.where(dx > 0, dx, 1.0), -np.inf)
        steepest = slope.argmax(axis=1)
        at = np.where(slope[row, steepest] > 0, steepest, at)
        vertices.append(at)
    chosen = np.stack(vertices, axis=1)
    return Frontier(np.take_along_axis(x, chosen, axis=1), np.take_along_axis(y, chosen, axis=1))


def estimate(draws: np.ndarray) -> Estimate:
    """[N] values, that of the sample first and those of its resamples after it."""
    return Estimate(float(draws[0]), *percentile_interval(draws[1:]))


def difference(method: np.ndarray, baseline: np.ndarray) -> Estimate:
    """How much more `method` [N] is than `baseline`: infinite where one of the two is, NaN where both are."""
    with np.errstate(invalid="ignore"):
        return estimate(method - baseline)


def summarise(table: pa.Table, baseline: str = "plain", resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Curves, frontiers and differences to a baseline, JSON-ready (NaN becomes None).

    Frontiers are compared over NLL increases from 0 to the same "width" for all methods of a direction: 1.5 nats, or
    the baseline's largest mean increase if that is less, so that the baseline is never judged where it was not run. A
    method that ends before that keeps its best gain up to there: it is not punished for being fluent, though larger
    strengths might have given it more.
    """
    if resamples < 1:
        raise InputError(f"resamples must be positive, got {resamples}")
    if not (aggregates := aggregate(table)):
        raise InputError("the results hold no steered texts")
    by_direction: dict[str, dict[Key, Aggregate]] = {}
    for key, part in aggregates.items():
        by_direction.setdefault(key.direction, {})[key] = part
    directions = [_direction(parts, baseline, resamples, seed) for parts in by_direction.values()]
    return {"baseline": baseline, "resamples": resamples, "seed": seed, "directions": directions}


def _direction(aggregates: Mapping[Key, Aggregate], baseline: str, resamples: int, seed: int) -> dict[str, Any]:
    first = next(iter(aggregates))
    if baseline not in (methods := dict.fromkeys(key.method for key in aggregates)):
        raise unknown(f"baseline along {first.direction!r}", baseline, methods)
    unsteered = aggregates[first].unsteered
    prompts = len(unsteered["nll"])
    if (usable := int((~np.isnan(unsteered["nll"] + unsteered["concept"])).sum())) < 2:
        raise InputError(f"direction {first.direction!r}: at least 2 prompts need a rated unsteered text, got {usable}")
    counts = bootstrap_counts(prompts, resamples, seed)
    curves = {key: curve(part, counts) for key, part in aggregates.items()}
    frontiers = {key: frontier(points) for key, points in curves.items()}
    baselines = {key.prior: key for key in aggregates if key.method == baseline}
    largest = (float(np.nanmax(curves[key].increase[0])) for key in baselines.values())
    width = min([LARGEST_RANGE, *(increase for increase in largest if increase > 0)])
    described = []
    for key in sorted(aggregates, key=lambda key: key.method != baseline):
        against = baselines.get(key.prior, baselines.get(""))
        if against is None:
            raise InputError(f"prior {key.prior!r} along {key.direction!r} has no rows of the baseline {baseline!r}")
        mine = frontiers[key]
        entry = {
            "method": key.method,
            "prior": key.prior or None,
            "failed": aggregates[key].failed,
            "missing": aggregates[key].missing,
            "points": list(_points(aggregates[key], curves[key])),
            "frontier": _vertices(mine, curves[key]),
            **estimate(mine.area(width)).named("area"),
        }
        if key.method != baseline:
            entry |= _differences(mine, frontiers[against], width)
        described.append(entry)
    means = {name: estimate(_means(counts, values[:, None])[:, 0]) for name, values in unsteered.items()}
    return {
        "direction": first.direction,
        "prompts": prompts,
        "width": width,
        "unsteered": {name: {"value": _finite(mean.value), "interval": mean.interval} for name, mean in means.items()},
        "methods": described,
    }


def _differences(mine: Frontier, baseline: Frontier, width: float) -> dict[str, Any]:
    at_increase, at_gain, attained = [], [], float(baseline.gain_at(width)[0])
    for x in (share * width for share in MATCHED_NLL):
        at_increase.append({"increase": x} | difference(mine.gain_at(x), baseline.gain_at(x)).to_dict())
    for y in (share * attained for share in MATCHED_GAIN if attained > 0):
        at_gain.append({"gain": y} | difference(mine.increase_at(y), baseline.increase_at(y)).to_dict())
    area = difference(mine.area(width), baseline.area(width)).to_dict()
    return {"area_difference": area, "gain_at_matched_fluency": at_increase, "nll_at_matched_concept": at_gain}


def _points(aggregated: Aggregate, points: Curve) -> Iterator[dict[str, Any]]:
    for i, strength in enumerate(aggregated.strengths.tolist()):
        gain, nll = (estimate(part[:, i + 1]) for part in (points.gain, points.nll))
        signs = aggregated.columns["concept"][:, i]
        yield {
            "strength": strength,
            "prompts": int((~np.isnan(aggregated.gain[:, i])).sum()),
            **gain.named("gain"),
            **nll.named("nll"),
            "concept_positive": _mean(signs[:, 0]),
            "concept_negative": _mean(signs[:, 1]),
            **{name: _mean(values[:, i]) for name, values in aggregated.columns.items() if name in DESCRIBED},
        }


def _vertices(found: Frontier, points: Curve) -> list[list[float]]:
    """[NLL, gain] of the sample's frontier, from the unsteered NLL on."""
    start = points.nll[0, 0]
    inner = [(x, y) for x, y in zip(found.increase[0].tolist(), found.gain[0].tolist(), strict=True) if x > 0]
    line = [(0.0, float(found.gain_at(0.0)[0])), *dict.fromkeys(inner)]
    return [[float(start + x), y] for x, y in line]


def _means(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[N, S] means of `values` [P, S] under `counts` [N, P], NaN left out; NaN where nothing is left."""
    there = ~np.isnan(values)
    total, number = counts @ np.where(there, values, 0.0), counts @ there
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _ratio(a: np.ndarray | float, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)


def _mean(values: np.ndarray) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
