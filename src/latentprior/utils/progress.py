"""How long-running functions report where they are; the command line draws bars from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = Callable[[int, int | None, Mapping[str, Any]], None]
"""Called with the amount done, the amount in all (None if unknown), and figures worth showing."""

Phase = Callable[[str], Report]
"""Called with the name of a part of the work; gives the `Report` of that part."""


def silent(done: int, total: int | None, figures: Mapping[str, Any]) -> None:
    """A `Report` that shows nothing."""


def unseen(name: str) -> Report:
    """A `Phase` that shows nothing."""
    return silent
