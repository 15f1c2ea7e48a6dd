"""A unit's activation histogram as a small SVG whose colours are CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from latentprior.report.templating import macros
from latentprior.utils.formatting import number

WIDTH, HEIGHT, FLOOR = 320, 110, 88  # user units; FLOOR is the base line of the bars


def histogram(counts: Sequence[int] | None, low: float | None, high: float | None) -> Markup:
    """Bars of log counts in bins of equal width, those of negative activations blue; or why there are none."""
    blocks = macros("site_blocks.html.jinja")
    if not counts or low is None or high is None or not any(counts) or not math.isfinite(high - low):
        return blocks.note("No activations were counted.")
    if low == high:
        return blocks.note(f"Each of the {sum(counts):,} tokens has the activation {number(low)}.")
    step, tallest = WIDTH / len(counts), math.log1p(max(counts))
    bars: dict[str, list[str]] = {"minus": [], "plus": []}
    for i, count in enumerate(counts):
        if count:
            side = "plus" if low + (i + 0.5) * (high - low) / len(counts) >= 0 else "minus"
            height = max(1.0, math.log1p(count) / tallest * (FLOOR - 4))
            bars[side].append(f"M{i * step:.4g} {FLOOR}v{-height:.4g}h{step * 0.86:.4g}v{height:.4g}z")
    said = f"{sum(counts):,} tokens from {number(low)} to {number(high)}; the fullest bin holds {max(counts):,}."
    return blocks.histogram(bars, low, high, -low / (high - low), said, WIDTH, HEIGHT, FLOOR)
