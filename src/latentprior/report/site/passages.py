"""Text of examples as HTML: tokens over a background of their activation, the peak marked, and by its number too."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from latentprior.neurons.store import Example
from latentprior.report.markup import number, printable, text

LEVELS = (0.2, 0.4, 0.6, 0.8)  # shares of the unit's largest |activation| from which on a background is stronger
CONTEXT = 64  # tokens shown on either side of the peak, so that long documents do not make long pages
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def passage(example: Example, scale: float) -> str:
    """An example's text: runs of tokens of equal level are one element, the peak a ``<mark>`` that says its value.

    Args:
        scale: |activation| that the levels are shares of; 0 gives no backgrounds.
    """
    peak = example.peak
    start, stop = max(0, peak - CONTEXT), min(len(example.pieces), peak + 1 + CONTEXT)
    levels = activation_levels(example.values[start:stop], scale)
    cuts = (start + 1 + np.flatnonzero(np.diff(levels))).tolist()
    runs = []
    for a, b in pairwise(sorted({start, *cuts, peak, peak + 1, stop})):
        level = int(levels[a - start])
        if a == peak:
            value = f"<span class=vh> (peak, {number(example.value)})</span>"
            runs.append(f"<mark{_class(level)}>{shown(example.pieces[a])}{value}</mark>")
        elif level:
            runs.append(f"<span{_class(level)}>{''.join(map(shown, example.pieces[a:b]))}</span>")
        else:
            runs.append(text(printable("".join(example.pieces[a:b]))))
    ends = ("…" if start else "", "…" if stop < len(example.pieces) else "")
    return f"<bdi class=doc>{ends[0]}{''.join(runs)}{ends[1]}</bdi>"


def activation_levels(values: Float[np.ndarray, " n"], scale: float) -> Int[np.ndarray, " n"]:
    """Signed levels, -4 to 4, of activations."""
    if not scale > 0:
        return np.zeros(len(values), np.int64)
    share = np.nan_to_num(np.asarray(values, np.float64) / scale)
    return np.sign(share).astype(np.int64) * np.searchsorted(LEVELS, np.abs(share), side="right")


def shown(piece: str) -> str:
    """A token as HTML; one that would be invisible alone is shown by symbols."""
    if any(not c.isspace() and c.isprintable() for c in piece):
        return text(printable(piece))
    symbols = "".join(VISIBLE.get(c) or f"U+{ord(c):04X}" for c in piece) or "(empty)"
    return symbols + "\n" * piece.count("\n")


def token(piece: str) -> str:
    """A token by itself as HTML, white space at its ends visible."""
    core = piece.strip(" ")
    if not core:
        return f"<bdi class=token>{shown(piece)}</bdi>"
    before = piece.index(core)
    after = len(piece) - before - len(core)
    inner = shown(core).replace("\n", "⏎")
    return f"<bdi class=token>{'␣' * before}{inner}{'␣' * after}</bdi>"


def legend(scale: float) -> str:
    """What the backgrounds mean."""
    steps = [f"{share:.0%}" for share in LEVELS]
    below = "".join(f"<span{_class(-i)}>−{steps[i - 1]}</span>" for i in (4, 3, 2, 1))
    above = "".join(f"<span{_class(i)}>{steps[i - 1]}</span>" for i in (1, 2, 3, 4))
    return (
        f'<p class="legend">Background: share of the largest activation, {number(scale)}, from '
        f'<span class="steps">{below}{above}</span> on. The peak is bold and underlined.</p>'
    )


def _class(level: int) -> str:
    return f" class={'p' if level > 0 else 'n'}{abs(level)}" if level else ""
