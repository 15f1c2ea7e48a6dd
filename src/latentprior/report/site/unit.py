"""The page of one unit: what templates/unit.html.jinja shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from latentprior.neurons.store import Example, Unit
from latentprior.report.site.histogram import histogram
from latentprior.report.site.passages import legend, passage, token
from latentprior.report.site.words import Place, source_words
from latentprior.report.templating import environment, render

environment.globals |= {"passage": passage, "token": token, "legend": legend, "zip": zip}


def render_unit(
    unit: Unit,
    info: Mapping[str, Any],
    near: Sequence[tuple[Place, float | None, str | None]],
    previous: Place | None,
    following: Place | None,
) -> str:
    """A unit's page; `near` are nearest units with correlation and description, `info` is the store's."""
    row, scale = unit.row, _largest(unit)
    name = f"Block {unit.block}, unit {unit.index}"
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
        scale=scale,
        unit=unit,
        quantiles=_by_quantile(unit),
        histogram=histogram(row["histogram"], row["histogram_low"], row["histogram_high"]),
        near=near,
        tasks=list(zip(row["tasks"] or (), row["task_aucs"] or (), row["task_signs"] or (), strict=True)),
    )


def _largest(unit: Unit) -> float:
    """The unit's largest |activation|; 0 if it is not known."""
    scale = max((abs(v) for v in (unit.row["minimum"], unit.row["maximum"]) if v is not None), default=0.0)
    return scale if math.isfinite(scale) else 0.0


def _by_quantile(unit: Unit) -> list[tuple[float, list[Example]]]:
    """Random documents by the quantile of their peak, the highest first."""
    ordered = sorted(unit.quantiles(), key=lambda example: (-(example.quantile or 0.0), example.rank))
    return [(quantile, list(group)) for quantile, group in groupby(ordered, key=lambda e: e.quantile or 0.0)]
