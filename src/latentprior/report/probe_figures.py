"""The figures of a probing result: AUC by source, sparsity, block, noise level and held-out loss."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from latentprior.report.figures import (
    BLUE,
    FONT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SIZE,
    Line,
    Look,
    legend,
    place,
    svg,
)
from latentprior.utils.formatting import Number

Json = Mapping[str, Any]
Interval = Sequence[Number] | None

COLOURS = {"prior": BLUE, "mlp": GREEN, "raw": ORANGE, "sae": PURPLE, "control": MUTED}
MARKERS = "osD^vP*"
LINES = ("-", "--", "-.", ":")
AUC = "mean test AUC"
NAME = 22  # characters of a name in one line
LONGEST = 24  # of a label beside a point
CELLS = 110.0  # points of text of five digits that a row of cells has room for
FAINT, STRONG = 0.05, 0.5  # opacity of the lowest and of the highest cell: text stays legible on both


class Source(NamedTuple):
    """One row of the dot plot: what the source is called, how it looks, and its score by selection."""

    label: str
    look: Look
    scores: Mapping[str, Json]


class Prior(NamedTuple):
    """One prior: its held-out loss, its AUC with an interval, and what it is called."""

    loss: Number
    auc: Number
    interval: Interval
    label: str


def source_looks(sources: Sequence[Json]) -> dict[str, Look]:
    """A colour for each kind of source, a marker for each source of a kind."""
    seen: Counter[str] = Counter()
    looks = {}
    for source in sources:
        nth, kind = seen[source["kind"]], source["kind"]
        line = "--" if kind == "control" else LINES[nth % len(LINES)]
        looks[source["name"]] = Look(COLOURS.get(kind, INK), MARKERS[nth % len(MARKERS)], line)
        seen[kind] += 1
    return looks


def auc_dots(sources: Sequence[Source]) -> Markup:
    """AUC of every source with its interval: filled among screened units, hollow among all, a bar for chance."""
    marks = {"screened": ("screened units", 0.0), "all": ("all units", 0.25), "chance": ("permuted labels", 0.0)}
    names = [_wrapped(source.label) for source in sources]

    def draw(axes: Axes) -> None:
        drawn = set()
        for row, source in enumerate(sources):
            for selection, (_, offset) in marks.items():
                score = source.scores.get(selection)
                if score is None or score["auc"] is None:
                    continue
                drawn.add(selection)
                y, chance = row + offset, selection == "chance"
                colour = MUTED if chance else source.look.colour
                if ends := score["interval"]:
                    axes.plot(ends, [y, y], color=colour, linewidth=1.4, alpha=0.4 if chance else 0.8)
                axes.plot(score["auc"], y, **_mark(selection, colour))
        for selection in marks:
            if selection in drawn:
                colour = MUTED if selection == "chance" else INK
                axes.plot([], [], linestyle="", label=marks[selection][0], **_mark(selection, colour))
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(AUC)
        if drawn:
            legend(axes)

    height = 1.2 + len(names) * max(0.46, 0.1 + 0.22 * _lines(names))
    return svg("probe-auc", draw, "Mean test AUC of every source with its interval", size=(SIZE[0], height))


def auc_by_sparsity(series: Sequence[tuple[str, Look, Mapping[int | None, Json]]]) -> Markup:
    """AUC of k-sparse probes over k, all units (None) last; `series` are label, look and scores by k of each source."""
    counts = {k for _, _, by_k in series for k in by_k}
    ks: list[int | None] = [*sorted(k for k in counts if k is not None), *([None] if None in counts else [])]
    names = [_wrapped(label) for label, _, _ in series]
    columns = 2 if len(names) > 1 else 1

    def draw(axes: Axes) -> None:
        for i, (name, (_, look, by_k)) in enumerate(zip(names, series, strict=True)):
            dodge = 0.64 * ((i + 0.5) / len(series) - 0.5)
            known = [(x + dodge, by_k[k]) for x, k in enumerate(ks) if k in by_k and by_k[k]["auc"] is not None]
            path = [(x, score["auc"]) for x, score in known]
            style: dict[str, Any] = {"marker": look.marker, "linestyle": look.line, "label": name}
            axes.plot([x for x, _ in path], [y for _, y in path], color=look.colour, linewidth=1.3, **style)
            for x, score in known:
                if score["interval"]:
                    axes.plot([x, x], score["interval"], color=look.colour, linewidth=1.1, alpha=0.45)
        axes.set_xticks(range(len(ks)), ["all" if k is None else str(k) for k in ks])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="units in the probe", ylabel=AUC)
        legend(axes, columns)

    height = 3.7 + 0.23 * _lines(names) * -(-len(names) // columns)
    return svg("probe-sparse", draw, "Mean test AUC over the number of units in a probe", size=(SIZE[0], height))


def auc_grid(grid: Json) -> Markup:
    """AUC by block and noise level, each value written in its cell; the highest is bold."""
    rows, times = grid["auc"], grid["times"]
    known = [value for row in rows for value in row if value is not None]
    low, high = min(known), max(known)
    size = min(FONT, CELLS / len(times))

    def draw(axes: Axes) -> None:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value is None:
                    continue
                alpha = FAINT + (STRONG - FAINT) * ((value - low) / (high - low) if high > low else 0.5)
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=BLUE, alpha=alpha, linewidth=0))
                weight = "bold" if value == high else "normal"
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=size, fontweight=weight)
        axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
        axes.set_yticks(range(len(rows)), [str(block) for block in grid["blocks"]])
        axes.set(xlim=(-0.5, len(times) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set(xlabel="noise level t (0 = data, 1 = noise)", ylabel="block of the prior")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    label = "Mean test AUC by block of the prior and noise level"
    return svg("probe-grid", draw, label, size=(SIZE[0], 1.1 + 0.5 * len(rows)))


def auc_by_block(blocks: Sequence[Json]) -> Markup:
    """AUC of the MLP neurons of each block of the language model."""
    points = [(entry["block"], entry["auc"]) for entry in blocks if entry["auc"] is not None]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), "o-", color=GREEN)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="block of the language model", ylabel=AUC)

    return svg("probe-blocks", draw, "Mean test AUC of MLP neurons by block of the language model")


def auc_by_loss(priors: Sequence[Prior], references: Sequence[tuple[str, Look, Number]]) -> Markup:
    """AUC of several priors over their held-out loss, and of other sources as lines (label, look, AUC)."""

    def draw(axes: Axes) -> None:
        lines: list[Line] = []
        for prior in priors:
            axes.plot(prior.loss, prior.auc, "o", color=BLUE)
            if prior.interval:
                axes.plot([prior.loss] * 2, prior.interval, color=BLUE, linewidth=1.2, alpha=0.5)
                lines.append([(prior.loss, end) for end in prior.interval])
        axes.margins(x=0.12, y=0.12)
        axes.invert_xaxis()
        edges, (bottom, top) = axes.get_xlim(), axes.get_ylim()
        bottom, top = (f([end, *(auc for *_, auc in references)]) for f, end in ((min, bottom), (max, top)))
        near = 0.012 * (top - bottom)  # a label that all but touches a line is hard to read too
        for (label, look, auc), line in zip(references, LINES[1:], strict=False):
            axes.axhline(auc, color=look.colour, linestyle=line, linewidth=1.3, label=_wrapped(label, 2 * NAME))
            lines += [[(edge, auc + shift) for edge in edges] for shift in (-near, 0, near)]
        axes.set(xlabel="held-out loss of the prior (better to the right)", ylabel=AUC)
        if references:
            legend(axes, 1)
        written = [(prior.loss, prior.auc, _shortened(prior.label), INK) for prior in priors]
        place(axes, written, [*lines, *([(prior.loss, prior.auc)] for prior in priors)])

    height = SIZE[1] + 0.23 * sum(_lines([_wrapped(label, 2 * NAME)]) for label, _, _ in references)
    return svg("probe-loss", draw, "Mean test AUC over held-out loss of the priors", size=(SIZE[0], height))


def _mark(selection: str, colour: str) -> dict[str, Any]:
    if selection == "chance":
        return {"marker": "|", "color": colour, "markersize": 11, "markeredgewidth": 2}
    face = colour if selection == "screened" else "none"
    return {"marker": "o", "color": colour, "markerfacecolor": face, "markersize": 6.5, "markeredgewidth": 1.5}


def _wrapped(name: str, width: int = NAME) -> str:
    return "\n".join(textwrap.wrap(name, width))


def _lines(names: Iterable[str]) -> int:
    """Of the longest of wrapped names."""
    return max((name.count("\n") + 1 for name in names), default=1)


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else "\N{HORIZONTAL ELLIPSIS}" + name[1 - LONGEST :]
