"""The figures of a steering experiment: frontiers, repair over strength, and gain over the prior's quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from latentprior.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, Label, Line, Look, legend, place, svg

Json = Mapping[str, Any]

STYLES = {"plain": (ORANGE, "o"), "repaired": (BLUE, "s"), "paper": (BLUE, "s"), "paired": (GREEN, "^")}
COLOURS = (PURPLE, INK, BLUE, GREEN)  # of methods without a colour of their own
MARKERS = "DvPX*<>"
CONTROLS = ("random", "shuffled", "control")
BEYOND = 1.3  # how far the axis goes, in ranges that are compared
COLUMNS = 3  # of the legend
MOST_NUMBERED = 4  # curves in one drawing whose points carry their strengths; with more, the first one's do


def frontier_curves(name: str, title: str, direction: Json, shown: Sequence[Json], looks: Mapping[str, Look]) -> Markup:
    """Gain against NLL: every method's points in the order of their strengths, and its frontier."""
    start, width, right = direction["unsteered"]["nll"]["value"], direction["width"], right_edge(direction)

    numbered = [entry["method"] for entry in shown if not is_control(entry["method"])]
    numbered = numbered if len(numbered) <= MOST_NUMBERED else numbered[:1]

    def draw(axes: Axes) -> None:
        obstacles: list[Line] = []
        labels: list[Label] = [(start, 0.0, "", INK)]
        lowest = start
        for entry in shown:
            colour, marker, line = looks[entry["method"]]
            points = [p for p in entry["points"] if p["nll"] is not None and p["nll"] <= right]
            path = [(start, 0.0), *((p["nll"], p["gain"]) for p in points)]
            lowest = min(lowest, *(x for x, _ in path))
            hull = [(x, y) for x, y in entry["frontier"] if x <= right]
            hull.append((right, float(np.interp(right, *np.transpose(entry["frontier"])))))
            axes.plot(*zip(*path, strict=True), ":", color=colour, linewidth=1, alpha=0.6)
            for cross in (cross for point in points for cross in _cross(point)):
                axes.plot(*zip(*cross, strict=True), color=colour, linewidth=1.1, alpha=0.3)
            axes.plot(*zip(*hull, strict=True), color=colour, linestyle=line)
            axes.plot(*zip(*path[1:], strict=True) if points else ((), ()), marker, color=colour)
            axes.plot([], [], marker=marker, color=colour, linestyle=line, label=entry["method"])
            obstacles += [hull, path]
            vertices = {round(x, 9) for x, _ in entry["frontier"]} if entry["method"] in numbered else set()
            labels += [
                (p["nll"], p["gain"], f"{p['strength']:g}", colour) for p in points if round(p["nll"], 9) in vertices
            ]
        axes.axvline(start + width, color=MUTED, linestyle="--", linewidth=1)
        axes.plot(start, 0.0, "*", color=INK, markersize=11, label="unsteered")
        axes.set_xlim(lowest - 0.05 * width, right)
        axes.set(xlabel="negative log-likelihood, nats a token (lower = more fluent)", ylabel="concept gained")
        legend(axes, COLUMNS)
        place(axes, labels, obstacles)

    return svg(f"frontier-{name}", draw, f"{title} along {direction['direction']}", size=_size(len(shown), 4.8))


def right_edge(direction: Json) -> float:
    """The largest NLL that is drawn."""
    return direction["unsteered"]["nll"]["value"] + BEYOND * direction["width"]


def by_strength(
    name: str, title: str, shown: Sequence[Json], looks: Mapping[str, Look], solid: str, dotted: str | None, axis: str
) -> Markup:
    """One or two measures of every method over the strength."""

    def draw(axes: Axes) -> None:
        for entry in shown:
            colour, marker, line = looks[entry["method"]]
            for measure, style, shape in ((solid, line, marker), (dotted, ":", "")):
                known = [(p["strength"], p[measure]) for p in entry["points"] if measure and p.get(measure) is not None]
                if known:
                    label = entry["method"] if measure == solid else None
                    axes.plot(*zip(*known, strict=True), color=colour, linestyle=style, marker=shape, label=label)
        axes.set(xlabel="strength, mean norms", ylabel=axis)
        axes.set_xlim(left=0)
        legend(axes, COLUMNS)

    return svg(name, draw, title, size=_size(len(shown)))


def area_by_loss(name: str, title: str, series: Mapping[str, Sequence[tuple[float, Json]]], looks: Mapping[str, Look],
                 axis: str) -> Markup:  # fmt: skip
    """Area difference of every method over the held-out loss of the prior it used."""

    def draw(axes: Axes) -> None:
        for method, entries in series.items():
            colour, marker, line = looks[method]
            ordered = sorted(entries, key=lambda entry: entry[0])
            points = [(loss, difference["value"]) for loss, difference in ordered]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=method)
            for loss, difference in ordered:
                if ends := difference["interval"]:
                    axes.plot([loss] * 2, ends, color=colour, linewidth=1.2, alpha=0.4)
        axes.axhline(0, color=MUTED, linestyle="--", linewidth=1.2)
        axes.invert_xaxis()
        axes.set(xlabel="held-out loss of the prior (better to the right)", ylabel=axis)
        legend(axes, COLUMNS)

    return svg(name, draw, title, size=_size(len(series)))


def _size(names: int, height: float = 3.6) -> tuple[float, float]:
    """Inches, with room for the legend."""
    return 6.4, height + 0.25 * -(-(names + 1) // COLUMNS)


def _cross(point: Json) -> list[Line]:
    x, y = point["nll"], point["gain"]
    (left, right), (low, high) = point["nll_interval"] or (x, x), point["gain_interval"] or (y, y)
    return [[(left, y), (right, y)], [(x, low), (x, high)]]


def method_looks(summary: Json) -> dict[str, Look]:
    """Every method's look, the same one in all drawings."""
    looks: dict[str, Look] = {}
    others = controls = 0
    for method in dict.fromkeys(entry["method"] for d in summary["directions"] for entry in d["methods"]):
        if method in STYLES:
            looks[method] = Look(*STYLES[method], "-")
        elif is_control(method):
            looks[method] = Look(MUTED, "xvd+"[controls % 4], "--")
            controls += 1
        else:
            line = "-" if others < 2 else "-."  # the other colours are those of `STYLES`
            looks[method] = Look(COLOURS[others % len(COLOURS)], MARKERS[others % len(MARKERS)], line)
            others += 1
    return looks


def is_control(method: str) -> bool:
    return any(word in method for word in CONTROLS)
