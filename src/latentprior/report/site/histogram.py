"""A unit's activation histogram as a small SVG whose colours are CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from latentprior.report.markup import number

WIDTH, HEIGHT, FLOOR = 320, 110, 88  # user units; FLOOR is the base line of the bars


def histogram(counts: Sequence[int] | None, low: float | None, high: float | None) -> str:
    """Bars of log counts, those of negative activations blue; a sentence where there is nothing to draw.

    Args:
        counts: tokens in each of the bins of equal width between `low` and `high`.
    """
    if not counts or low is None or high is None or not any(counts) or not math.isfinite(high - low):
        return '<p class="note">No activations were counted.</p>'
    if low == high:
        return f'<p class="note">Each of the {sum(counts):,} tokens has the activation {number(low)}.</p>'
    step, tallest = WIDTH / len(counts), math.log1p(max(counts))
    bars: dict[str, list[str]] = {"minus": [], "plus": []}
    for i, count in enumerate(counts):
        if count:
            side = "plus" if low + (i + 0.5) * (high - low) / len(counts) >= 0 else "minus"
            height = max(1.0, math.log1p(count) / tallest * (FLOOR - 4))
            bars[side].append(f"M{i * step:.4g} {FLOOR}v{-height:.4g}h{step * 0.86:.4g}v{height:.4g}z")
    zero = -low / (high - low)
    marks = [f'<text x="0" y="104">{number(low)}</text><text x="{WIDTH}" y="104" class="end">{number(high)}</text>']
    if 0 < zero < 1:
        at = f"{zero * WIDTH:.4g}"
        marks.append(f'<path class="zero" d="M{at} 0V{FLOOR + 4}"/>')
        if 0.15 < zero < 0.85:  # further out it would touch the ends' numbers
            marks.append(f'<text x="{at}" y="104" class="middle">0</text>')
    said = f"{sum(counts):,} tokens from {number(low)} to {number(high)}; the fullest bin holds {max(counts):,}."
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="hist-title hist-desc">'
        f'<title id="hist-title">Histogram of activations, logarithmic counts</title><desc id="hist-desc">{said}</desc>'
        f'<path class="minus" d="{"".join(bars["minus"])}"/><path class="plus" d="{"".join(bars["plus"])}"/>'
        f'<path class="floor" d="M0 {FLOOR}H{WIDTH}"/>{"".join(marks)}</svg>'
        f'<p class="note">Logarithmic counts of {said}</p>'
    )
