"""What the site's pages call units and where their pages lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentprior.report.templating import environment
from latentprior.utils.formatting import MISSING, Number, number

Place = tuple[int, int]
"""Block and index of a unit."""


def short(place: Place) -> str:
    """A unit's name in links: "b1 n532"."""
    return f"b{place[0]} n{place[1]}"


def unit_path(block: int, index: int) -> str:
    """Path of a unit's page within the site."""
    return f"units/b{block}/n{index}.html"


def list_path(block: int, part: int = 0) -> str:
    """Path of a page of a block's list within the site."""
    return f"blocks/{block}{f'-{part + 1}' if part else ''}.html"


def source_words(info: Mapping[str, Any]) -> str:
    """The language model's layer that the prior was trained on, such as "layer 15 (output) of gpt2"."""
    hookpoint = info.get("hookpoint") or {}
    side = f" ({hookpoint['side']})" if hookpoint.get("side") else ""
    return f"layer {hookpoint.get('layer', MISSING)}{side} of {hookpoint.get('model') or 'a language model'}"


def share(value: Number | None) -> str:
    """A share as per cent."""
    return MISSING if value is None else f"{number(100 * value)}%"


environment.globals |= {"short": short, "unit_path": unit_path, "list_path": list_path, "share": share}
