"""The page of a probing result: its section, its sentences and leading figures.

The result is of kind "probe", what ``probe.json`` holds. "rows", where it is there, are the single tasks: "task",
"family" and "scores" (source -> test AUC).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from latentprior.probe.names import short_names
from latentprior.probe.tables import best_of, difference, draws_sd, has_draws, labels, leading, scores, verdict
from latentprior.report import probe_figures
from latentprior.report.blocks import NOTHING, Headline, facts, figure, fold, pair, prose, stack, table
from latentprior.report.templating import lines, macros, paragraph
from latentprior.utils.formatting import MISSING, counted, decimals, interval, number, signed, with_intervals

Json = Mapping[str, Any]

REFERENCES = ("mlp-neurons", "mlp-neurons-drawn", "random-denoiser")  # what meta-neurons must beat to mean something
LEAST_SECONDS = 0.1  # below, a part of the run was not asked for
EQUALS = "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
_TEXTS = macros("probing.html.jinja")


def section(result: Json) -> Markup:
    """Figures and tables of a probing result; nothing without a summary."""
    if not (summary := result.get("summary")):
        return NOTHING
    looks = probe_figures.source_looks(result["sources"])
    skipped = result.get("skipped") or []
    return stack(
        pair(prose(_explained(result)), _dots(result, looks)),
        _sources(result),
        *_paired(result),
        pair(*_sparse(result, looks), *_grid(summary), *_blocks(summary), *_by_loss(result, looks)),
        fold("Exact figures of these drawings", stack(*_exact(result))),
        _families(result),
        _tasks(result),
        fold(counted(len(skipped), "skipped task"), facts([(entry["task"], entry["reason"]) for entry in skipped])),
    )


def sentences(result: Json) -> list[Markup]:
    """The result in plain words, an honest negative included."""
    if not result.get("summary"):
        return []
    named, lead, found = labels(result), leading(result) or "", scores(result)
    against = [(_within(named[other]), row, _said(row)) for other, row in _against_references(result)]
    score, chance = found.get((lead, "screened")), found.get((lead, "chance"))
    return lines(_TEXTS.sentences(result, _within(named.get(lead, "")), score, chance, against))


def headlines(result: Json) -> Iterator[Headline]:
    """Figures of a probing result worth large type."""
    if not result.get("summary") or not (lead := leading(result)):
        return
    named, found, tasks = labels(result), scores(result), counted(len(result["tasks"]), "task")
    if score := found.get((lead, "screened")):
        chance = found.get((lead, "chance"))
        note = f"{named[lead]}, {tasks}, 95% interval {interval(score['interval'], decimals)}"
        note += f"; chance {decimals(chance['auc'])}" if chance else ""
        yield Headline("Mean test AUC", decimals(score["auc"]), "", note)
    for other, row in _against_references(result):
        note = f"difference of AUC, 95% interval {interval(row['interval'], signed)}: {_said(row)}"
        shown = decimals(row["difference"], plus=True)  # four decimals have no room on a phone
        yield Headline(f"Against {_within(named[other])}", shown, "", note)
    if score := found.get((lead, "all")):
        note = f"mean test AUC, picked among all units, 95% interval {interval(score['interval'], decimals)}"
        yield Headline("Without screening", decimals(score["auc"]), "", note)


# Parts of the section


def _explained(result: Json) -> Markup:
    seconds = (result.get("seconds") or {}).items()
    spent = [(name, value) for name, value in seconds if value >= LEAST_SECONDS]
    drawn = [source for source in result["sources"] if source.get("draws")]
    return paragraph(_TEXTS.explained(result["method"], result["protocol"], result["tasks"], drawn, spent))


def _dots(result: Json, looks: Mapping[str, probe_figures.Look]) -> Markup:
    named, found = labels(result), scores(result)
    kinds = {source["name"]: source["kind"] for source in result["sources"]}
    rows = [
        probe_figures.Source(label, looks[name], {key[1]: score for key, score in found.items() if key[0] == name})
        for name, label in named.items()
    ]
    rows = sorted((row for row in rows if row.scores), key=_height, reverse=True)
    if not rows:
        return NOTHING
    note = "From high to low. Lines are 95% intervals over tasks."
    note += " Controls are grey." if "control" in kinds.values() else ""
    return figure("Mean test AUC of the best unit", note, probe_figures.auc_dots(rows))


def _height(source: probe_figures.Source) -> float:
    """Where a source stands: by its screened units, else by all of them."""
    aucs = [source.scores[name]["auc"] for name in ("screened", "all", "chance") if name in source.scores]
    return next((auc for auc in aucs if auc is not None), 0.0)


def _sources(result: Json) -> Markup:
    named, found = labels(result), scores(result)
    header = ["Source", "Units", "Screened", "95% interval", "Validation", "All units", "95% interval", "Validation"]
    drawn = has_draws(result)
    header += ["Chance", *["SD of draws"] * drawn]
    cells = []
    for source in result["sources"]:
        screened, every, chance = (found.get((source["name"], name), {}) for name in ("screened", "all", "chance"))
        units = MISSING if source.get("units") is None else f"{source['units']:,}"
        measured = [
            cell for score in (screened, every) for cell in (*_measured(score), decimals(score.get("validation")))
        ]
        last = [decimals(chance.get("auc")), *[draws_sd(screened)] * drawn]
        cells.append([named[source["name"]], units, *measured, *last])
    note = (
        "Mean AUC over tasks, of test texts unless it says validation. How far validation lies above test is the bias "
        "of picking the best of many units: it grows with their number."
    )
    note += "".join(_spread(score) for (_, selection), score in found.items() if selection == "screened")
    return table("All sources", note, header, cells)


def _spread(score: Json) -> str:
    """How far apart the draws of a source are; nothing of one that is not drawn, or once."""
    draws = score.get("draws") or {"number": 0}
    if draws["number"] < 2:
        return ""
    ends = f"{decimals(draws['lowest'])} and {decimals(draws['highest'])}"
    return f" SD of draws: the standard deviation of the {draws['number']} draws' means, which lie between {ends}."


def _paired(result: Json) -> Iterator[Markup]:
    """A table for each source that others are subtracted from, the leading one's open."""
    named, rows = labels(result), result["summary"].get("paired") or []
    header = ["Minus", "Units", "Difference", "95% interval", "Verdict", "Won", "Tied", "Lost", "Tasks"]
    lead = leading(result)
    for a in sorted(dict.fromkeys(row["a"] for row in rows), key=lambda a: a != lead):
        cells = [
            [
                named.get(row["b"], row["b"]),
                row["selection"],
                *with_intervals((row["difference"], row["interval"]), shown=signed),
                verdict(row),
                *(str(n) for n in (row["wins"], row["ties"], row["tasks"] - row["wins"] - row["ties"], row["tasks"])),
            ]
            for row in rows
            if row["a"] == a
        ]
        title = f"Paired differences, {_within(str(named.get(a, a)))} minus the others"
        note = "Of test AUC, task by task; the interval is of the mean over tasks."
        shown = table(title, note, header, cells)
        yield shown if a in (lead, rows[0]["a"]) else fold(title, shown)


def _sparse(result: Json, looks: Mapping[str, probe_figures.Look]) -> Iterator[Markup]:
    if series := [(label, looks[name], by_k) for name, label, by_k in _by_k(result)]:
        note = "Logistic probes on k units, with regularisation chosen by cross-validation; lines are 95% intervals."
        note += " Points of one k are set apart for legibility."
        yield figure("Probes of several units", note, probe_figures.auc_by_sparsity(series))


def _by_k(result: Json) -> list[tuple[str, str, dict[int | None, Json]]]:
    """Name, label and scores by k of every source that has any."""
    found: dict[str, dict[int | None, Json]] = {}
    for row in result["summary"].get("sparse") or []:
        if row["auc"] is not None:
            found.setdefault(row["source"], {})[row["k"]] = row
    return [(name, label, found[name]) for name, label in labels(result).items() if name in found]


def _grid(summary: Json) -> Iterator[Markup]:
    grid = summary.get("grid")
    if grid and any(value is not None for row in grid["auc"] for value in row):
        note = "Stronger colour is higher, the highest is bold; every cell picks its unit by itself. "
        note += f"Prior: {grid['prior']}."
        yield figure("Meta-neurons by block and noise level", note, probe_figures.auc_grid(grid))


def _blocks(summary: Json) -> Iterator[Markup]:
    blocks = summary.get("mlp_blocks") or []
    if any(entry["auc"] is not None for entry in blocks):
        note = "Every block picks its unit by itself."
        yield figure("MLP neurons by block", note, probe_figures.auc_by_block(blocks))


def _by_loss(result: Json, looks: Mapping[str, probe_figures.Look]) -> Iterator[Markup]:
    if not (rows := _priors(result)):
        return
    named, found = labels(result), scores(result)
    names = short_names([row["prior"] for row in rows])
    priors = [
        probe_figures.Prior(row["heldout_loss"], row["auc"], row["interval"], name)
        for row, name in zip(rows, names, strict=True)
    ]
    aucs = {other: found.get((other, "screened"), {}).get("auc") for other in REFERENCES}
    references = [(named[other], looks[other], auc) for other, auc in aucs.items() if auc is not None]
    note = "A point for each prior, better priors to the right; lines are 95% intervals over tasks."
    note += " A name that has no room is in the table of exact figures." if len(rows) > 1 else ""
    yield figure("AUC by held-out loss of the prior", note, probe_figures.auc_by_loss(priors, references))


def _priors(result: Json) -> list[Json]:
    rows = result["summary"].get("scaling") or []
    known = [row for row in rows if row["heldout_loss"] is not None and row["auc"] is not None]
    return sorted(known, key=lambda row: -row["heldout_loss"])


def _exact(result: Json) -> Iterator[Markup]:
    summary = result["summary"]
    if series := _by_k(result):
        ks = sorted({k for _, _, by_k in series for k in by_k}, key=lambda k: (k is None, k))
        header = ["Source", *(name for k in ks for name in ("all" if k is None else f"k{EQUALS}{k}", "95% interval"))]
        cells = [[label, *(shown for k in ks for shown in _measured(by_k.get(k, {})))] for _, label, by_k in series]
        yield table("Probes of several units, test AUC", "", header, cells)
    if any(_grid(summary)):
        grid = summary["grid"]
        header = ["Block", *(f"t{EQUALS}{t:g}" for t in grid["times"])]
        rows = zip(grid["blocks"], grid["auc"], strict=True)
        cells = [[str(block), *map(decimals, row)] for block, row in rows]
        yield table("Meta-neurons by block and noise level, test AUC", "", header, cells)
    if blocks := summary.get("mlp_blocks"):
        cells = [[str(entry["block"]), decimals(entry["auc"])] for entry in blocks]
        yield table("MLP neurons by block of the language model", "", ["Block", "Test AUC"], cells)
    if priors := _priors(result):
        header = ["Prior", "Source", "Activations", "Held-out loss", "Test AUC", "95% interval"]
        named = labels(result)
        cells = [
            [
                row["prior"],
                named.get(row["source"], row["source"]),
                MISSING if row.get("activations") is None else f"{row['activations']:,}",
                number(row["heldout_loss"]),
                *_measured(row),
            ]
            for row in priors
        ]
        yield table("Priors", "", header, cells)


def _families(result: Json) -> Markup:
    if not (families := result["summary"].get("families")):
        return NOTHING
    ordered = sorted(families, key=lambda family: -family["tasks"])
    first = [[family["family"], str(family["tasks"])] for family in ordered]
    note = "Of screened units, from many tasks to few; the best of a row is bold. Few tasks tell little."
    return _by_source(result, "Test AUC by task family", note, ["Family", "Tasks"], first, ordered)


def _tasks(result: Json) -> Markup:
    if not (rows := result.get("rows")):
        return NOTHING
    first = [[row["task"], row["family"]] for row in rows]
    content = _by_source(result, "Test AUC by task", "The best of a row is bold.", ["Task", "Family"], first, rows)
    return fold(f"All {len(rows)} tasks", content)


def _by_source(
    result: Json, title: str, note: str, header: list[str], first: Sequence[list[str]], rows: Sequence[Json]
) -> Markup:
    """A table of the "scores" of `rows` with a column for each source, the best ones bold."""
    named = {name: label for name, label in labels(result).items() if any(name in row["scores"] for row in rows)}
    cells = [
        [*start, *(decimals(row["scores"].get(name)) for name in named)] for start, row in zip(first, rows, strict=True)
    ]
    names = list(named)
    bold = {
        (i, len(header) + names.index(name))
        for i, row in enumerate(rows)
        for name in best_of({name: row["scores"].get(name) for name in names})
    }
    return table(title, note, [*header, *named.values()], cells, bold=bold)


def _against_references(result: Json) -> Iterator[tuple[str, Json]]:
    """The paired differences of the leading source from those that it must beat."""
    lead, named = leading(result), labels(result)
    for other in REFERENCES:
        if lead and other in named and (row := difference(result, lead, other)):
            yield other, row


def _said(row: Json) -> str:
    """The verdict and on how many tasks it rests."""
    said = verdict(row)
    against = f"{said} zero" if said in ("above", "below") else said
    return f"{against}, better on {row['wins']} of {row['tasks']} tasks"


def _within(label: str) -> str:
    """A label inside a sentence: "meta-neurons", but "MLP neurons"."""
    return label if label[:2].isupper() else label[:1].lower() + label[1:]


def _measured(row: Json) -> list[str]:
    return with_intervals((row.get("auc"), row.get("interval")), shown=decimals)
