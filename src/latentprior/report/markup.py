"""Pieces of the report's page: numbers as text, text as safe HTML, tables and captioned figures."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Number = float | int  # JSON keeps 1 and 1.0 apart

MISSING = "\N{EN DASH}"
# What no HTML page may hold: control characters but tab and newline, lone surrogates, non-characters.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DECIMAL = re.compile(r"−?[\d,]+(\.\d+)?")


def printable(value: Any) -> Any:
    """JSON values with every character replaced that no page may hold, in keys too."""
    if isinstance(value, str):
        return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(entry) for entry in value]
    return value


def text(value: object) -> str:
    """Any value as HTML that shows it and does nothing else, in content and in quoted attributes."""
    return html.escape(str(value))


def number(value: Number | None) -> str:
    """Three significant digits; a power of ten from a million on and below a ten-thousandth; a dash for no number."""
    if value is None or not math.isfinite(value):
        return MISSING
    mantissa, power = f"{value:.2e}".split("e")
    exponent = int(power)
    if value and not -5 < exponent < 6:
        shown = f"{mantissa} × {_ten_to(exponent)}"
    else:
        shown = f"{float(f'{value:.2e}'):,.{max(0, 2 - exponent)}f}"
    return shown.replace("-", "−")


def power(value: Number) -> str:
    """A power of ten, or a few times one, such as a tick of a log axis: "10¹²", "2 × 10¹²"."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return ("" if mantissa == "1" else f"{mantissa} × ") + _ten_to(int(exponent))


def interval(ends: Sequence[Number | None] | None) -> str:
    """``[low, high]``; an end that is infinite or not known is a dash."""
    return MISSING if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def duration(seconds: Number) -> str:
    """The two leading units, such as "5 min 12 s"."""
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(count: int, name: str) -> str:
    """A number of things: "1 task", "113 tasks"."""
    return f"{count:,} {name}" + "s" * (count != 1)


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """HTML under a line that unfolds it; "" without content."""
    shown = " open" if opened else ""
    return f"<details{shown}><summary>{text(summary)}</summary>{content}</details>" if content else ""


def table(
    title: str,
    note: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """A table whose first column names the rows and whose numbers align at their decimal points.

    Wider than the page it scrolls on its own, by keyboard too.

    Args:
        title, note: the caption.
        header: column names, plain text.
        rows: cells, plain text.
        bold: (row, column) of the cells that stand out.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    columns = [[row[0] for row in rows], *(_aligned([row[i] for row in rows]) for i in range(1, len(header)))]
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(_cell(shown, (i, j) in bold) for j, shown in enumerate(rest, 1))
        + "</tr>"
        for i, (first, *rest) in enumerate(zip(*columns, strict=True))
    )
    return figure(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
        title,
        note,
        kind="wide",
    )


def figure(content: str, title: str, note: str, *, kind: str = "drawing") -> str:
    """A drawing or a table under its caption; `kind` is its CSS class."""
    caption = f"<figcaption><b>{text(title)}.</b> {text(note)}</figcaption>"
    return f'<figure class="{kind}">{caption}{content}</figure>'


def _ten_to(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def _cell(shown: str, bold: bool = False) -> str:
    kind = ' class="interval"' if shown.startswith("[") else ""
    return f"<td{kind}><b>{text(shown)}</b></td>" if bold else f"<td{kind}>{text(shown)}</td>"


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
