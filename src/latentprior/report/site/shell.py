"""What all pages of the site share: head, links, words for where the units come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentprior.report.markup import MISSING, Number, number, printable, text

GENERATOR = '<meta name="generator" content="latentprior neurons">'
# Chromium and Firefox differ in whether 'self' holds for files on disk; the scheme says so to both.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def page(title: str, body: str, *, root: str, scripts: Sequence[str] = ("site.js",)) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        root: relative path from the page to the site's folder, "" or ending in a slash.
        scripts: files in the site's folder, run in this order once the page is read.
    """
    tags = "".join(f'<script src="{root}{script}" defer></script>\n' for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<link rel="stylesheet" href="{root}base.css">\n'
        f'<link rel="stylesheet" href="{root}site.css">\n{tags}'
        f"<title>{text(title)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def unit_path(block: int, index: int) -> str:
    """Path of a unit's page within the site."""
    return f"units/b{block}/n{index}.html"


def list_path(block: int, part: int = 0) -> str:
    """Path of a page of a block's list within the site."""
    return f"blocks/{block}{f'-{part + 1}' if part else ''}.html"


def link(root: str, path: str, label: str, attributes: str = "") -> str:
    """A link within the site that carries the reader's search along; `label` is plain text."""
    return f'<a href="{root}{path}" data-keep{attributes}>{text(label)}</a>'


def source_words(info: Mapping[str, Any]) -> str:
    """The language model's layer that the prior was trained on, such as "layer 15 (output) of gpt2"."""
    hookpoint = info.get("hookpoint") or {}
    side = f" ({hookpoint['side']})" if hookpoint.get("side") else ""
    return f"layer {hookpoint.get('layer', MISSING)}{side} of {hookpoint.get('model') or 'a language model'}"


def share(value: Number | None) -> str:
    """A share as per cent."""
    return MISSING if value is None else f"{number(100 * value)}%"


def described(description: str | None) -> str:
    """A description as HTML, or that there is none."""
    if description and description.strip():
        return f"<bdi>{text(printable(description))}</bdi>"
    return '<span class="none">no description</span>'
