"""The tables of a steering experiment: areas, matched comparisons, all points, and the options of each repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from latentprior.report.blocks import NOTHING, table
from latentprior.utils.formatting import MISSING, number, with_intervals

Json = Mapping[str, Any]


def areas(direction: Json, entries: Sequence[Json], baseline: str, losses: Json) -> Markup:
    """Area under each frontier, and over that of the baseline; `losses` are the priors' held-out ones."""
    named = len({entry["prior"] for entry in direction["methods"]} - {None}) > 1
    header = ["Method", *["Prior", "Held-out loss"] * named, "Area", "95% interval", f"Over {baseline}", "95% interval"]
    header += ["Clear of zero", "Failed ratings"]
    cells = []
    for entry in entries:
        difference = entry.get("area_difference")
        which = [entry["prior"] or MISSING, number(losses.get(entry["prior"]))] if named else []
        compared = _difference(difference) if difference else [MISSING] * 3
        area = with_intervals((entry["area"], entry["area_interval"]))
        cells.append([entry["method"], *which, *area, *compared, str(entry["failed"])])
    note = (
        f"Area: mean gain at the best strength for each NLL increase from 0 to {number(direction['width'])} nats. "
        "Intervals are paired over prompts."
    )
    return table("Areas under the frontiers", note, header, cells)


def matched(entries: Sequence[Json], baseline: str) -> Markup:
    """Differences to the baseline at the same fluency, and at the same concept."""
    compared = [entry for entry in entries if "area_difference" in entry]
    if not compared:
        return NOTHING
    fluent, concept = (compared[0][name] for name in ("gain_at_matched_fluency", "nll_at_matched_concept"))
    header = ["Method"]
    header += [h for x in fluent for h in (f"Gain at +{x['increase']:.3g} nats", "95% interval")]
    header += [h for x in concept for h in (f"NLL at gain {x['gain']:.3g}", "95% interval")]
    cells = []
    for entry in compared:
        matches = [*entry["gain_at_matched_fluency"], *entry["nll_at_matched_concept"]]
        cells.append([entry["method"], *with_intervals(*((x["value"], x["interval"]) for x in matches))])
    note = (
        f"Differences to {baseline}: more gain is better, more NLL is worse. A dash: one of the two never gets there."
    )
    return table("Differences at matched fluency and at matched concept", note, header, cells)


def points(direction: Json, entries: Sequence[Json]) -> Markup:
    """Everything that was measured at each strength."""
    columns = {
        "retention": "Edit kept",
        "off_before": "Off-manifold before",
        "off_after": "After",
        "moved": "Moved off the direction",
        "distinct_2": "Distinct bigrams",
        "longest_repeat": "Longest repeat",
        "tokens": "Tokens",
    }
    points = [(entry, point) for entry in entries for point in entry["points"]]
    columns = {name: title for name, title in columns.items() if any(p.get(name) is not None for _, p in points)}
    header = ["Method", "Strength", "Gain", "95% interval", "NLL", "95% interval", "Concept, +", "Concept, −"]
    cells = [
        [
            entry["method"],
            f"{point['strength']:g}",
            *with_intervals(*((point[name], point[f"{name}_interval"]) for name in ("gain", "nll"))),
            *(number(point.get(name)) for name in ("concept_positive", "concept_negative", *columns)),
        ]
        for entry, point in points
    ]
    unsteered, nll = direction["unsteered"], direction["unsteered"]["nll"]
    first = ["unsteered", "0", MISSING, MISSING, *with_intervals((nll["value"], nll["interval"]))]
    first += [number(unsteered["concept"]["value"])] * 2
    first += [number(unsteered[name]["value"]) if name in unsteered else MISSING for name in columns]
    note = "Gain is the mean over the signs that were run, concept that of each. NLL: nats a token, unsteered model."
    return table("All strengths", note, [*header, *columns.values()], [first, *cells])


def repairs(result: Json) -> Markup:
    """The options of each method that repairs."""
    repairs = result.get("repairs", {})
    names = list(dict.fromkeys(name for repair in repairs.values() for name in repair))
    cells = [[method, *(_option(repair.get(name)) for name in names)] for method, repair in repairs.items()]
    note = "An edited activation is noised to the level t start and integrated back by the prior. NFE: its evaluations."
    header = ["Method", *("NFE" if name == "nfe" else name.capitalize().replace("_", " ") for name in names)]
    return table("Repairs", note, header, cells)


def _difference(difference: Json) -> list[str]:
    side = "above" if difference["value"] > 0 else "below"
    return [*with_intervals((difference["value"], difference["interval"])), side if difference["clear"] else "no"]


def _option(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
