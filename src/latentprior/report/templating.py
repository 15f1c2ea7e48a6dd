"""The templates of pages and site: every text is escaped where it is written, for generated text may hold anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latentprior.utils import formatting

# What no HTML page may hold: control characters but tab and newline, lone surrogates, non-characters.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def printable(value: Any) -> Any:
    """JSON values with every character replaced that no page may hold, in keys too; finished HTML as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {printable(key): printable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(entry) for entry in value]
    return value


environment = Environment(
    loader=PackageLoader("latentprior.report"),
    auto_reload=False,
    autoescape=True,
    finalize=printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
environment.filters |= {"number": formatting.number, "printable": printable}
_SHOWN = ("counted", "decimals", "duration", "estimate", "interval", "number", "signed")
environment.globals |= {name: getattr(formatting, name) for name in _SHOWN} | {"grouped": "{:,}".format}


def render(template: str, **values: Any) -> str:
    """The text of a template with `values` in it."""
    return environment.get_template(template).render(values)


def macros(template: str) -> Any:
    """A template whose macros are called like functions; they give `Markup`."""
    return environment.get_template(template).module


def lines(written: Markup) -> list[Markup]:
    """The passages that a macro of texts gave, one a line."""
    return [Markup(line.strip()) for line in written.split("\n") if line.strip()]


def paragraph(written: Markup) -> Markup:
    """The passages that a macro of texts gave, one after another."""
    return Markup(" ").join(lines(written))
