"""The page of one unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote

from latentprior.neurons.store import Example, Unit
from latentprior.report.markup import number, printable, text
from latentprior.report.site.histogram import histogram
from latentprior.report.site.passages import legend, passage, token
from latentprior.report.site.shell import described, link, page, share, source_words, unit_path

ROOT = "../../"
SOURCES = {
    "endpoint": "Written by a language model from examples.",
    "offline": "Put together from top tokens and tasks, not written by a language model.",
}
Place = tuple[int, int]
"""Block and index of a unit."""


def render_unit(
    unit: Unit,
    info: Mapping[str, Any],
    near: Sequence[tuple[Place, float | None, str | None]],
    previous: Place | None,
    following: Place | None,
) -> str:
    """A unit's page.

    Args:
        info: of the store.
        near: nearest units with correlation and description.
        previous, following: the units on either side, None at the ends.
    """
    name = f"Block {unit.block}, unit {unit.index}"
    scale = max((abs(v) for v in (unit.row["minimum"], unit.row["maximum"]) if v is not None), default=0.0)
    scale = scale if math.isfinite(scale) else 0.0
    body = "\n".join(
        [
            f'<nav class="trail" aria-label="Site">{_trail(previous, following)}</nav>',
            f"<header>\n<h1>{name}</h1>\n{_description(unit.row)}</header>",
            f'<main class="unit">\n<div class="documents">\n{_documents(unit, scale)}</div>',
            f'<div class="facts">\n{_facts(unit, info, near)}</div>\n</main>',
            f"<footer>{text(info.get('prior'))}: {text(source_words(info))}, t = {info.get('t')}.</footer>",
        ]
    )
    return page(f"{name} · {source_words(info)}", body, root=ROOT)


def _trail(previous: Place | None, following: Place | None) -> str:
    links = [link(ROOT, "index.html", "All units")]
    if previous:
        links.append(link(ROOT, unit_path(*previous), f"← {_short(previous)}", ' rel="prev"'))
    if following:
        links.append(link(ROOT, unit_path(*following), f"{_short(following)} →", ' rel="next"'))
    return "".join(links)


def _short(place: Place) -> str:
    return f"b{place[0]} n{place[1]}"


def _description(row: Mapping[str, Any]) -> str:
    facts = []
    if row["description"]:
        facts.append(SOURCES.get(row["source"] or "", ""))
    scored = [name for name in ("consistency", "complexity") if row[name] is not None]
    facts += [f"{name.capitalize()} {row[name]} of 5." for name in scored]
    if row["detection"] is not None:
        facts.append(f"Detection score (AUC) {number(row['detection'])}.")
    if row["reason"]:
        facts.append(str(printable(row["reason"])))
    said = " ".join(filter(None, facts))
    note = f'<p class="note">{text(said)}</p>\n' if said else ""
    return f'<p class="lede">{described(row["description"])}</p>\n{note}'


def _documents(unit: Unit, scale: float) -> str:
    parts = [legend(scale)] if scale else []
    for title, examples in (("Top documents", unit.top()), ("Bottom documents", unit.bottom())):
        if examples:
            parts.append(f"<section>\n<h2>{title}</h2>\n{_examples(examples, scale)}</section>")
    if between := unit.quantiles():
        groups = [
            f"<h3>Quantile {quantile or 0:.3g}</h3>\n{_examples(list(group), scale)}"
            for quantile, group in groupby(sorted(between, key=_by_quantile), key=lambda example: example.quantile)
        ]
        note = "Documents drawn at random, by the quantile of their largest absolute activation."
        parts.append(f'<section>\n<h2>Across the range</h2>\n<p class="note">{note}</p>\n{"".join(groups)}</section>')
    return "\n".join(parts) + "\n"


def _by_quantile(example: Example) -> tuple[float, int]:
    return -(example.quantile or 0.0), example.rank


def _examples(examples: Sequence[Example], scale: float) -> str:
    items = "".join(
        f"<li><p><b>{number(example.value)}</b> <span>document {example.doc}</span></p>{passage(example, scale)}</li>\n"
        for example in examples
    )
    return f'<ol class="examples" role="list">\n{items}</ol>\n'


def _facts(unit: Unit, info: Mapping[str, Any], near: Sequence[tuple[Place, float | None, str | None]]) -> str:
    row = unit.row
    bars = histogram(row["histogram"], row["histogram_low"], row["histogram_high"])
    sections = [
        ("Activations", bars + _statistics(row, info)),
        ("Promoted tokens", _tokens(row["promoted"], row["promoted_values"], "Direct effect on the logits, largest.")),
        ("Suppressed tokens", _tokens(row["suppressed"], row["suppressed_values"], "Direct effect, most negative.")),
        ("Nearest units", _near(near)),
        ("Tasks won", _tasks(row)),
    ]
    return "".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" for title, content in sections if content)


def _statistics(row: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    names = {"Mean": "mean", "Variance": "variance", "Excess kurtosis": "kurtosis", "Minimum": "minimum"}
    rows = [(name, number(row[key])) for name, key in (names | {"Maximum": "maximum"}).items()]
    for threshold, above in zip(info["thresholds"], row["share_above"] or (), strict=False):
        rows.append((f"Share above {threshold:g} sd", share(above)))
    return _table("Statistics over all tokens", ("Statistic", "Value"), [(text(a), b) for a, b in rows], hidden=True)


def _tokens(pieces: Sequence[str] | None, values: Sequence[float] | None, note: str) -> str:
    if not pieces:
        return ""
    rows = [(token(piece), number(value)) for piece, value in zip(pieces, values or (), strict=False)]
    return _table(note, ("Token", "Effect"), rows)


def _near(near: Sequence[tuple[Place, float | None, str | None]]) -> str:
    if not near:
        return ""
    rows = [
        (f'{link(ROOT, unit_path(*place), _short(place))} <span class="what">{described(said)}</span>', number(value))
        for place, value, said in near
    ]
    return _table("By correlation of activations.", ("Unit", "Correlation"), rows)


def _tasks(row: Mapping[str, Any]) -> str:
    names, aucs, signs = row["tasks"] or (), row["task_aucs"] or (), row["task_signs"] or ()
    if not names:
        return ""
    rows = [
        (
            f'<a href="{ROOT}index.html#task={quote(printable(task), safe="")}"><bdi>{text(printable(task))}</bdi></a>',
            number(auc),
            "higher" if sign > 0 else "lower",
        )
        for task, auc, sign in zip(names, aucs, signs, strict=True)
    ]
    note = "AUC of this unit alone; whether it is higher or lower in the task's second class."
    return _table(note, ("Task", "AUC", "In class 1"), rows)


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, hidden: bool = False) -> str:
    """A small table; `caption` and `header` are plain text, cells HTML."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    kind = ' class="vh"' if hidden else ""
    return (
        f'<table class="small"><caption{kind}>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
