"""Numbers as people read them, the same ones on pages and in terminals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Number = float | int  # JSON keeps 1 and 1.0 apart

MISSING = "\N{EN DASH}"
COUNTS = ("", " K", " M", " B", " T")
BYTES = (" B", " KB", " MB", " GB", " TB", " PB")
FLOPS = (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Table(NamedTuple):
    """A table of plain text for a terminal."""

    title: str
    header: Sequence[str]  # names of the columns; empty for a list of names and values
    rows: Sequence[Sequence[str]]


def number(value: Number | None) -> str:
    """Three significant digits; a power of ten from a million on and below a ten-thousandth; a dash for no number."""
    if value is None or not math.isfinite(value):
        return MISSING
    mantissa, power = f"{value:.2e}".split("e")
    exponent = int(power)
    if value and not -5 < exponent < 6:
        return _minus(f"{mantissa} × {_ten_to(exponent)}")
    return _minus(f"{float(f'{value:.2e}'):,.{max(0, 2 - exponent)}f}")


def decimals(value: Number | None, places: int = 3, *, plus: bool = False) -> str:
    """A fixed number of decimals, positive numbers with a plus on demand; a dash for no number."""
    return MISSING if value is None else _minus(f"{value:{'+' if plus else ''}.{places}f}")


def signed(value: Number | None) -> str:
    """A difference to four decimals with its sign: small ones still differ from zero."""
    return decimals(value, 4, plus=True)


def interval(ends: Sequence[Number | None] | None, shown: Callable[[Number | None], str] = number) -> str:
    """``[low, high]``; a dash for an end, or an interval, that is not known."""
    return MISSING if ends is None else f"[{shown(ends[0])}, {shown(ends[1])}]"


def estimate(
    value: Number | None, ends: Sequence[Number | None] | None, shown: Callable[[Number | None], str] = number
) -> str:
    """A number followed by its interval where there is one: "0.711 [0.692, 0.730]"."""
    return shown(value) if ends is None else f"{shown(value)} {interval(ends, shown)}"


def with_intervals(
    *estimates: tuple[Number | None, Sequence[Number | None] | None], shown: Callable[[Number | None], str] = number
) -> list[str]:
    """Numbers, each followed by its interval, as cells of a table."""
    return [cell for value, ends in estimates for cell in (shown(value), interval(ends, shown))]


def power(value: Number) -> str:
    """A power of ten, or a few times one, such as a tick of a log axis: "10¹²", "2 × 10¹²"."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return ("" if mantissa == "1" else f"{mantissa} × ") + _ten_to(int(exponent))


def scaled(value: Number, units: Sequence[str]) -> str:
    """Three digits with one of `units`, which rise by factors of 1000: "40.1 GB"."""
    step = 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g}{units[step]}"


def duration(seconds: Number) -> str:
    """The two leading units, such as "5 min 12 s"."""
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days > 1:
        return f"{days:,} d {hours_left} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(count: int, name: str) -> str:
    """A number of things: "1 task", "113 tasks"."""
    return f"{count:,} {name}" + "s" * (count != 1)


def _minus(shown: str) -> str:
    return shown.replace("-", "−")


def _ten_to(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"
