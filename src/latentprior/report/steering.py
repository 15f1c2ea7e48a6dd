"""The page of a steering experiment: its figures, its sections, its sentences and leading figures.

The result is of kind "frontier": "summary" as `latentprior.steer.frontier.summarise` gives it; and where there are any,
"mean_norm", "repairs" (method -> options), "priors" (name -> "heldout_loss"), "judges" (direction -> "name" and
"heldout_accuracy"), and "texts": chosen rows of the results, with direction, method, strength, prompt_text, text,
concept, nll and, where several were run, prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from latentprior.report import frontiers
from latentprior.report.blocks import (
    NOTHING,
    Headline,
    JudgedText,
    figure,
    fold,
    heading,
    pair,
    prose,
    stack,
    texts_by_prompt,
)
from latentprior.report.figures import COLOUR_NAMES
from latentprior.report.steering_tables import areas, matched, points, repairs
from latentprior.report.templating import lines, macros, paragraph
from latentprior.utils.formatting import interval, number

Json = Mapping[str, Any]

_TEXTS = macros("steering.html.jinja")
MOST_CURVES = 6  # in one drawing
MOST_TOLD = 2  # priors; of more, sentences and the first table have the best one alone


def section(result: Json) -> Markup:
    """Curves, repair and comparisons of every direction; nothing without a summary."""
    if not (summary := result.get("summary")):
        return NOTHING
    looks, prior = frontiers.method_looks(summary), leading_prior(result)
    parts = [prose(_explained(result)), fold("How each method repairs", repairs(result))]
    for i, direction in enumerate(summary["directions"]):
        name, shown = direction["direction"], _shown(direction, prior)
        judge = result.get("judges", {}).get(direction["direction"])
        told = direction["methods"] if len(_priors(summary)) <= MOST_TOLD else shown
        drawn = [*_curves(i, direction, shown, looks, leading_method(result)), *_repair(i, name, shown, looks)]
        if losses := _losses(result, direction):
            drawn.append(_by_loss(i, direction, losses, summary["baseline"], looks))
        parts += [
            heading(name),
            prose(paragraph(_TEXTS.described(direction, judge))),
            pair(*drawn),
            areas(direction, told, summary["baseline"], losses),
            fold("Areas with every prior", areas(direction, direction["methods"], summary["baseline"], losses))
            if len(told) < len(direction["methods"])
            else NOTHING,
            fold("At matched fluency and at matched concept", matched(shown, summary["baseline"])),
            fold("All points", points(direction, shown)),
        ]
    return stack(*parts)


def texts(result: Json) -> Markup:
    """The texts of all methods side by side: a fold for each direction and strength, the first one's middle open."""
    if not (summary := result.get("summary")):
        return NOTHING
    rows, looks, prior = result.get("texts", []), frontiers.method_looks(summary), leading_prior(result)
    parts = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        mine = [row for row in rows if row["direction"] == direction and row.get("prior") in (None, "", prior)]
        unsteered = [row for row in mine if row["method"] == "none"]
        strengths = sorted({row["strength"] for row in mine} - {0})
        strengths = [r for r in strengths if r > 0] + [r for r in reversed(strengths) if r < 0]
        positive = [r for r in strengths if r > 0] or strengths
        first = positive[len(positive) // 2] if positive and not parts else None
        parts.append(heading(direction))
        for strength in strengths:
            chosen = unsteered + [row for row in mine if row["strength"] == strength]
            parts.append(
                fold(
                    f"Strength {strength:+g}".replace("-", "−"), _side_by_side(chosen, looks), opened=strength == first
                )
            )
    return stack(*parts)


def sentences(result: Json) -> list[Markup]:
    """The experiment in plain words, an honest negative included."""
    if not (summary := result.get("summary")):
        return []
    methods = dict.fromkeys(entry["method"] for direction in summary["directions"] for entry in direction["methods"])
    others = [method for method in methods if method != summary["baseline"]]
    several = 1 < len(_priors(summary)) <= MOST_TOLD
    priors = _priors(summary) if several else [leading_prior(result)]
    differences = [
        (direction["direction"], entry["prior"] if several else None, entry["area_difference"])
        for prior in priors
        for direction, entry in _led(result, prior)
    ]
    return lines(_TEXTS.sentences(summary, others, leading_method(result), differences))


def headlines(result: Json) -> Iterator[Headline]:
    """Figures of an experiment worth large type."""
    if not (method := leading_method(result)):
        return
    baseline, prior = result["summary"]["baseline"], leading_prior(result)
    found, led_by = _led(result, prior), method
    if len(_priors(result["summary"])) > 1:
        led_by = f"{method} by {prior}"
    if len(found) > 1:
        won = sum(e["area_difference"]["clear"] and e["area_difference"]["value"] > 0 for _, e in found)
        note = f"directions in which {led_by} lies outside {baseline}, its interval clear of zero"
        yield Headline("Frontier outside", f"{won} of {len(found)}", "", note)
    for direction, entry in found:
        difference = entry["area_difference"]
        note = f"{direction['direction']}, {led_by}; mean gain at the same fluency, 95% interval "
        note += interval(difference["interval"])
        yield Headline(f"Gain over {baseline}", number(difference["value"]), "", note)


def leading_prior(result: Json) -> str | None:
    """The prior of least held-out loss, or the last one if no losses are known; None if the results name none."""
    names = _priors(result.get("summary", {}))
    known = {name: loss for name, loss in _known_losses(result).items() if name in names}
    return min(known, key=known.__getitem__) if known else next(reversed(names), None)


def leading_method(result: Json) -> str | None:
    """The method of largest mean area difference over directions, with the leading prior; None without any."""
    prior = leading_prior(result)
    found: dict[str, list[float]] = {}
    for direction in result.get("summary", {}).get("directions", []):
        for entry in _shown(direction, prior):
            if "area_difference" in entry and not frontiers.is_control(entry["method"]):
                found.setdefault(entry["method"], []).append(entry["area_difference"]["value"])
    return max(found, key=lambda method: sum(found[method]) / len(found[method]), default=None)


def helps_from(entries: Sequence[tuple[float, Json]]) -> float | None:
    """The largest held-out loss from which down every difference is clear above zero; `entries` are of one method."""
    largest = None
    for loss, difference in sorted(entries, key=lambda entry: entry[0]):
        if not (difference["clear"] and difference["value"] > 0):
            break
        largest = loss
    return largest


# Parts of the sections


def _curves(
    i: int, direction: Json, shown: Sequence[Json], looks: Mapping[str, frontiers.Look], leading: str | None
) -> Iterator[Markup]:
    """The curves, in two drawings where there are more methods than one can hold."""
    baseline = shown[0]["method"]
    kept = [
        e for e in shown if e["method"] in (baseline, leading, *frontiers.STYLES) or frontiers.is_control(e["method"])
    ]
    others = [e for e in shown if e["method"] in (baseline, leading) or e not in kept]
    drawings = [("Concept gained, fluency lost", shown)]
    if len(shown) > MOST_CURVES:
        drawings = [("Concept gained, fluency lost", kept), ("The same, other ways to repair", others)]
    right = frontiers.right_edge(direction)
    for part, (title, entries) in enumerate(drawings):
        beyond = sum(p["nll"] is not None and p["nll"] > right for entry in entries for p in entry["points"])
        note = paragraph(_TEXTS.curves(part == 0, direction["width"], beyond))
        yield figure(title, note, frontiers.frontier_curves(f"{i}-{part}", title, direction, entries, looks))


def _repair(i: int, direction: str, shown: Sequence[Json], looks: Mapping[str, frontiers.Look]) -> Iterator[Markup]:
    """How much of the edit is kept and how far off the manifold it leads, where that was measured."""

    def measured(name: str) -> list[Json]:
        return [entry for entry in shown if any(point.get(name) is not None for point in entry["points"])]

    if kept := measured("retention"):
        title = f"Edit kept along {direction}"
        drawn = frontiers.by_strength(f"retention-{i}", title, kept, looks, "retention", None, "edit kept")
        yield figure("Edit kept", "Share of the edit's component along the direction that is left after repair.", drawn)
    if off := measured("off_after"):
        title, names = f"Off-manifold score along {direction}", ("off_after", "off_before")
        drawn = frontiers.by_strength(f"off-{i}", title, off, looks, *names, "off-manifold score")
        yield figure("Off-manifold score", "Of the activation as it is used (lines) and before repair (dotted).", drawn)


def _by_loss(i: int, direction: Json, losses: Json, baseline: str, looks: Mapping[str, frontiers.Look]) -> Markup:
    series = _by_method(direction, losses)
    title = f"Area difference by held-out loss along {direction['direction']}"
    from_loss = {method: helps_from(entries) for method, entries in series.items()}
    helpful = [f"{method} from {number(loss)} down" for method, loss in from_loss.items() if loss is not None]
    never = [method for method, loss in from_loss.items() if loss is None]
    note = paragraph(_TEXTS.by_loss(baseline, helpful, never))
    drawn = frontiers.area_by_loss(f"by-loss-{i}", title, series, looks, f"area gained over {baseline}")
    return figure("Which prior is good enough", note, drawn)


def _side_by_side(rows: Sequence[Json], looks: Mapping[str, frontiers.Look]) -> Markup:
    by_prompt: dict[str, list[JudgedText]] = {}
    for row in rows:
        look = looks.get(row["method"])
        written = JudgedText(
            name="unsteered" if row["method"] == "none" else row["method"],
            text=row["text"].strip(),
            judged=f"concept {number(row['concept'])}, NLL {number(row['nll'])}",
            colour=COLOUR_NAMES[look.colour] if look else None,
        )
        by_prompt.setdefault(row["prompt_text"], []).append(written)
    return texts_by_prompt(by_prompt)


def _explained(result: Json) -> Markup:
    summary, prior = result["summary"], leading_prior(result)
    norm, priors = result.get("mean_norm"), len(_priors(summary))
    return paragraph(_TEXTS.explained(summary, norm, leading_method(result), priors, prior))


def _priors(summary: Json) -> list[str]:
    """The priors that repaired, in the order in which they were run."""
    directions = summary.get("directions", [])
    names = dict.fromkeys(entry["prior"] for direction in directions for entry in direction["methods"])
    return [name for name in names if name]


def _losses(result: Json, direction: Json) -> dict[str, float]:
    names = {entry["prior"] for entry in direction["methods"]}
    known = {name: loss for name, loss in _known_losses(result).items() if name in names}
    return known if len(known) > 1 else {}


def _known_losses(result: Json) -> dict[str, float]:
    priors = result.get("priors", {})
    return {name: prior["heldout_loss"] for name, prior in priors.items() if prior["heldout_loss"] is not None}


def _by_method(direction: Json, losses: Json) -> dict[str, list[tuple[float, Json]]]:
    found: dict[str, list[tuple[float, Json]]] = {}
    for entry in direction["methods"]:
        if entry["prior"] in losses and "area_difference" in entry:
            found.setdefault(entry["method"], []).append((losses[entry["prior"]], entry["area_difference"]))
    return {method: entries for method, entries in found.items() if len(entries) > 1}


def _shown(direction: Json, prior: str | None) -> list[Json]:
    """The methods that use no prior or this one."""
    return [entry for entry in direction["methods"] if entry["prior"] in (None, prior)]


def _led(result: Json, prior: str | None) -> list[tuple[Json, Json]]:
    """Each direction with the leading method's entry of a prior."""
    method = leading_method(result)
    directions = result["summary"]["directions"]
    return [(d, entry) for d in directions for entry in _shown(d, prior) if entry["method"] == method]
