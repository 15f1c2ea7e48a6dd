"""Text of examples as HTML: tokens over a background of their activation, the peak marked, and by its number too."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from latentprior.neurons.store import Example
from latentprior.report.templating import macros

LEVELS = (0.2, 0.4, 0.6, 0.8)  # shares of the unit's largest |activation| from which on a background is stronger
CONTEXT = 64  # tokens shown on either side of the peak, so that long documents do not make long pages
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


class Run(NamedTuple):
    """Tokens of equal level as one element; `peak` is the activation, where this is the token at the peak."""

    text: str
    level: int = 0
    peak: float | None = None


def passage(example: Example, scale: float) -> Markup:
    """An example's text: runs of tokens of equal level are one element, the peak a ``<mark>`` that says its value.

    Levels are shares of `scale`; 0 gives no backgrounds.
    """
    peak, strings = example.peak, example.token_strings
    start, stop = max(0, peak - CONTEXT), min(len(strings), peak + 1 + CONTEXT)
    levels = activation_levels(example.values[start:stop], scale)
    cuts = (start + 1 + np.flatnonzero(np.diff(levels))).tolist()
    runs = [Run("…")] if start else []
    for a, b in pairwise(sorted({start, *cuts, peak, peak + 1, stop})):
        level = int(levels[a - start])
        marked = level or a == peak
        text = "".join(map(shown, strings[a:b]) if marked else strings[a:b])
        runs.append(Run(text, level, example.value if a == peak else None))
    runs += [Run("…")] if stop < len(strings) else []
    return macros("site_blocks.html.jinja").passage(runs)


def activation_levels(values: Float[np.ndarray, " n"], scale: float) -> Int[np.ndarray, " n"]:
    """Signed levels, -4 to 4, of activations."""
    if not scale > 0:
        return np.zeros(len(values), np.int64)
    share = np.nan_to_num(np.asarray(values, np.float64) / scale)
    return np.sign(share).astype(np.int64) * np.searchsorted(LEVELS, np.abs(share), side="right")


def shown(string: str) -> str:
    """A token as it is, or symbols for one that would be invisible alone."""
    if any(not c.isspace() and c.isprintable() for c in string):
        return string
    symbols = "".join(VISIBLE.get(c) or f"U+{ord(c):04X}" for c in string) or "(empty)"
    return symbols + "\n" * string.count("\n")


def token(string: str) -> Markup:
    """A token by itself, white space at its ends visible."""
    core = string.strip(" ")
    before, _, after = string.partition(core) if core else ("", "", "")
    text = "␣" * len(before) + shown(core).replace("\n", "⏎") + "␣" * len(after) if core else shown(string)
    return macros("site_blocks.html.jinja").token(text)


def legend(scale: float) -> Markup:
    """What the backgrounds mean."""
    return macros("site_blocks.html.jinja").legend(scale, [f"{share:.0%}" for share in LEVELS])
