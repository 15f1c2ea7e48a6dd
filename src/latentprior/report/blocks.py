"""What a result's page is made of: prose, tables, captioned drawings. Their HTML is in templates/blocks.html.jinja."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from latentprior.report.templating import macros

_BLOCKS = macros("blocks.html.jinja")
_DECIMAL = re.compile(r"−?[\d,]+(\.\d+)?")
NOTHING = Markup("")


class Headline(NamedTuple):
    """One figure in large type at the head of a page."""

    label: str
    value: str
    unit: str
    note: str


class JudgedText(NamedTuple):
    """A text that a method wrote, and what it was given for it."""

    name: str
    text: str
    judged: str
    colour: str | None
    """Name of a CSS variable."""


heading: Callable[[str], Markup] = _BLOCKS.heading
prose: Callable[[str], Markup] = _BLOCKS.prose
code: Callable[[str], Markup] = _BLOCKS.code
texts_by_prompt: Callable[[Mapping[str, Sequence[JudgedText]]], Markup] = _BLOCKS.texts


def stack(*parts: Markup) -> Markup:
    """Parts one below another."""
    return Markup("\n").join(filter(None, parts))


def pair(*parts: Markup) -> Markup:
    """Parts side by side where there is room; nothing without any."""
    return _BLOCKS.pair(parts) if any(parts) else NOTHING


def fold(summary: str, content: Markup, *, opened: bool = False) -> Markup:
    """Content under a line that unfolds it; nothing without content."""
    return _BLOCKS.fold(summary, content, opened) if content else NOTHING


def figure(title: str, note: str, *drawings: Markup) -> Markup:
    """A drawing under its caption, or several side by side."""
    kind = "drawing" if len(drawings) == 1 else "wide"
    return _BLOCKS.figure(title, note, drawings[0] if len(drawings) == 1 else pair(*drawings), kind)


def table(
    title: str,
    note: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: Collection[tuple[int, int]] = (),
) -> Markup:
    """A captioned table whose first column names the rows and whose numbers align at their points; none without rows.

    `bold` are (row, column) of the cells that stand out.
    """
    if not rows:
        return NOTHING
    first, *columns = zip(*rows, strict=True)
    aligned = list(zip(first, *map(_aligned, columns), strict=True))
    return _BLOCKS.table(title, note, header, aligned, bold)


def facts(rows: Sequence[tuple[str, Any]]) -> Markup:
    """Names and values; nothing without any."""
    return _BLOCKS.facts(rows) if rows else NOTHING


def _aligned(cells: Sequence[str]) -> list[str]:
    """Plain numbers padded behind with blanks of a digit's and a point's width, so that right-aligned points meet."""
    places = [len(match[1] or "") if (match := _DECIMAL.fullmatch(cell)) else None for cell in cells]
    widest = max((n for n in places if n is not None), default=0)
    padded = []
    for cell, n in zip(cells, places, strict=True):
        blanks = 0 if n is None else widest - n
        point = "\N{PUNCTUATION SPACE}" if blanks and n == 0 else ""
        padded.append(cell + point + "\N{FIGURE SPACE}" * (blanks - len(point)))
    return padded
