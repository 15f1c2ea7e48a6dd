"""The page of one unit: what templates/unit.html.jinja shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from markupsafe import Markup

from latentprior.neurons.store import Example, Unit
from latentprior.report.site.histogram import histogram
from latentprior.report.site.passages import legend, passage, token
from latentprior.report.site.words import Place, share, source_words
from latentprior.report.templating import render
from latentprior.utils.formatting import number

SOURCES = {
    "endpoint": "Written by a language model from examples.",
    "offline": "Put together from top tokens and tasks, not written by a language model.",
}
MOMENTS = {
    "Mean": "mean",
    "Variance": "variance",
    "Excess kurtosis": "kurtosis",
    "Minimum": "minimum",
    "Maximum": "maximum",
}


def render_unit(
    unit: Unit,
    info: Mapping[str, Any],
    near: Sequence[tuple[Place, float | None, str | None]],
    previous: Place | None,
    following: Place | None,
) -> str:
    """A unit's page.

    Args:
        info: of the store.
        near: nearest units with correlation and description.
        previous, following: the units on either side, None at the ends.
    """
    row, scale = unit.row, _largest(unit)
    name = f"Block {unit.block}, unit {unit.index}"
    listed = partial(_with_passages, scale=scale)
    promoted, suppressed = (_effects(row[side], row[f"{side}_values"]) for side in ("promoted", "suppressed"))
    return render(
        "unit.html.jinja",
        root="../../",
        title=f"{name} · {source_words(info)}",
        name=name,
        row=row,
        info=info,
        source=source_words(info),
        previous=previous,
        following=following,
        remarks=_remarks(row),
        legend=legend(scale) if scale else "",
        extremes=[("Top documents", listed(unit.top())), ("Bottom documents", listed(unit.bottom()))],
        quantiles=[(quantile, listed(examples)) for quantile, examples in _by_quantile(unit)],
        histogram=histogram(row["histogram"], row["histogram_low"], row["histogram_high"]),
        statistics=_statistics(row, info),
        logits=[
            ("Promoted tokens", "Direct effect on the logits, largest.", promoted),
            ("Suppressed tokens", "Direct effect, most negative.", suppressed),
        ],
        near=near,
        tasks=list(zip(row["tasks"] or (), row["task_aucs"] or (), row["task_signs"] or (), strict=True)),
    )


def _largest(unit: Unit) -> float:
    """The unit's largest |activation|; 0 if it is not known."""
    scale = max((abs(v) for v in (unit.row["minimum"], unit.row["maximum"]) if v is not None), default=0.0)
    return scale if math.isfinite(scale) else 0.0


def _remarks(row: Mapping[str, Any]) -> str:
    """Where the description comes from and how good it is."""
    remarks = [SOURCES.get(row["source"] or "", "") if row["description"] else ""]
    scored = [name for name in ("consistency", "complexity") if row[name] is not None]
    remarks += [f"{name.capitalize()} {row[name]} of 5." for name in scored]
    if row["detection"] is not None:
        remarks.append(f"Detection score (AUC) {number(row['detection'])}.")
    return " ".join(filter(None, [*remarks, row["reason"]]))


def _with_passages(examples: Sequence[Example], scale: float) -> list[tuple[Example, Markup]]:
    return [(example, passage(example, scale)) for example in examples]


def _by_quantile(unit: Unit) -> list[tuple[float, list[Example]]]:
    """Random documents by the quantile of their peak, the highest first."""
    ordered = sorted(unit.quantiles(), key=lambda example: (-(example.quantile or 0.0), example.rank))
    return [(quantile, list(group)) for quantile, group in groupby(ordered, key=lambda e: e.quantile or 0.0)]


def _statistics(row: Mapping[str, Any], info: Mapping[str, Any]) -> list[tuple[str, str]]:
    shares = zip(info["thresholds"], row["share_above"] or (), strict=False)
    return [
        *((name, number(row[key])) for name, key in MOMENTS.items()),
        *((f"Share above {threshold:g} sd", share(above)) for threshold, above in shares),
    ]


def _effects(tokens: Sequence[str] | None, values: Sequence[float] | None) -> list[tuple[Markup, float]]:
    return [(token(string), value) for string, value in zip(tokens or (), values or (), strict=False)]
