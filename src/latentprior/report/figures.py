"""The report's figures, as SVG text whose colours are CSS variables: one drawing serves a light and a dark page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

from latentprior.utils.formatting import Number

# matplotlib takes real colours only: each is drawn as a stand-in for the CSS variable that replaces it in the SVG.
_VARIABLES = ("ink", "muted", "rule", "blue", "orange", "green", "purple")
COLOUR_NAMES = {f"#fe01{index:02x}": name for index, name in enumerate(_VARIABLES)}
INK, MUTED, RULE, BLUE, ORANGE, GREEN, PURPLE = COLOUR_NAMES

SIZE = (6.4, 4.3)  # inches; at 72 points an inch about the width of a phone, so that text is legible there too
SQUARE = (6.0, 5.7)
FONT = 12.0

# The axes' style; its colours are those of `_VARIABLES`.
STYLE = files("latentprior.report").joinpath("templates", "figures.mplstyle")


class Look(NamedTuple):
    """How a source or a method is drawn, the same in all figures."""

    colour: str
    marker: str
    line: str


Line = Sequence[tuple[Number, Number]]
Label = tuple[Number, Number, str, str]

REPLACEMENTS = {"prior": BLUE, "compared": GREEN, "gaussian": ORANGE, "noise": PURPLE}
COMPARED = ((GREEN, "s"), (PURPLE, "^"), (ORANGE, "D"))  # priors beside the one that a page is about


def training_curve(log: Sequence[Mapping[str, Any]]) -> Markup:
    """Training and held-out loss over activations seen, from the lines of ``log.jsonl``."""
    kinds = (("loss", "training", MUTED, "-", ""), ("heldout_loss", "held out", BLUE, "-", "o"))

    def draw(axes: Axes) -> None:
        for key, label, colour, line, marker in kinds:
            seen = [(row["activations"], row[key]) for row in log if key in row and row["activations"] > 0]
            if seen:
                axes.plot(*zip(*seen, strict=True), line, marker=marker, color=colour, label=label)
        log_x(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep="\N{NO-BREAK SPACE}"))
        axes.set(xlabel="activations seen", ylabel="loss")
        legend(axes)

    return svg("training", draw, "Training and held-out loss over activations seen")


def loss_by_t(by_t: Sequence[Mapping[str, Any]], compared: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """Held-out loss in each bin of the noise level, with its interval where there is one; and of others by name."""
    centres = [sum(row["t"]) / 2 for row in by_t]

    def draw(axes: Axes) -> None:
        axes.plot(centres, [row["loss"] for row in by_t], "o-", color=BLUE, label="this prior")
        for (name, rows), (colour, marker) in zip(compared.items(), cycle(COMPARED)):
            losses = [row["loss"] for row in rows]
            axes.plot(centres, losses, linestyle="-", marker=marker, color=colour, label=name)
        if all("interval" in row for row in by_t):
            low, high = np.transpose([row["interval"] for row in by_t])
            axes.fill_between(centres, low, high, color=BLUE, alpha=0.25, linewidth=0)
        axes.set(xlim=(0, 1), xlabel="noise level t (0 = data, 1 = noise)", ylabel="held-out loss")
        axes.set_ylim(bottom=0)
        if compared:
            legend(axes)

    return svg("by-t", draw, "Held-out loss by noise level")


def pca_scatter(pca: Mapping[str, Any]) -> tuple[Markup, Markup]:
    """Real and generated activations on the two leading principal components, on equal axes."""
    clouds = {kind: np.asarray(pca[kind]) for kind in ("real", "generated")}
    low, high = (f([f(cloud, axis=0) for cloud in clouds.values()], axis=0) for f in (np.min, np.max))
    middle, half = (low + high) / 2, 0.54 * (high - low).max()

    def drawing(kind: str, colour: str) -> Markup:
        def draw(axes: Axes) -> None:
            axes.plot(*clouds[kind].T, "o", color=colour, markersize=3.6, markeredgewidth=0, alpha=0.5)
            axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
            axes.set_aspect("equal")
            axes.set_title(kind, loc="left", color=colour, fontsize=1.1 * FONT)
            for i, set_label in enumerate((axes.set_xlabel, axes.set_ylabel)):
                set_label(f"principal component {i + 1} ({pca['variance_share'][i]:.1%} of variance)")

        return svg(f"pca-{kind}", draw, f"{kind.capitalize()} activations on two principal components", size=SQUARE)

    return drawing("real", MUTED), drawing("generated", BLUE)


def delta_bars(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], values: Sequence[str]) -> Markup:
    """Delta LM loss of every replacement with its interval: bars on a log axis if all are positive."""
    deltas = np.array([row["delta"] for row in rows])
    intervals = np.array([row["interval"] for row in rows])
    log = bool((deltas > 0).all())

    def draw(axes: Axes) -> None:
        left = np.append(intervals[intervals[:, 0] > 0, 0], 0.5 * deltas.min()).min() if log else 0.0
        for y, (row, delta, (low, high)) in enumerate(zip(rows, deltas, intervals, strict=True)):
            colour = REPLACEMENTS.get(row["method"], MUTED)
            axes.barh(y, delta - left, left=left, height=0.5, color=colour, alpha=0.75, linewidth=0)
            axes.plot([max(low, left) if log else low, high], [y, y], color=INK, linewidth=1.6)
            axes.annotate(values[y], (max(high, delta), y), (6, 0), textcoords="offset points", va="center")
        if log:
            axes.set_xlim(left, 1.9 * intervals.max())
            log_x(axes)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        else:
            axes.margins(x=0.2)
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(False)  # every bar carries its value
        axes.spines["left"].set_visible(not log)
        axes.invert_yaxis()
        axes.set_xlabel("added next-token loss, nats" + (" (log scale)" if log else ""))

    return svg("delta-lm", draw, "Delta LM loss of each replacement", size=(SIZE[0], 1.3 + 0.62 * len(rows)))


def place(axes: Axes, labels: Sequence[Label], lines: Sequence[Line]) -> None:
    """Write `labels` (x, y, text, colour) beside their points where they hide least of points and `lines`.

    A label that has room only over another one is left out.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is final: data and pixels now correspond
    drawn = np.concatenate([_dense(axes.transData.transform(line)) for line in lines])
    points = axes.transData.transform([label[:2] for label in labels])
    frame = axes.get_window_extent()
    directions = np.array([(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for point, (x, y, text, colour) in zip(points, labels, strict=True):
        half = np.array([0.32 * FONT * len(text) + 1, 0.48 * FONT])
        places = []
        for offset in directions * (half + 6):
            low, high = point + offset - half, point + offset + half
            inside = frame.contains(*low) and frame.contains(*high)
            if inside and not any((low < b).all() and (a < high).all() for a, b in taken):
                hidden = _within(drawn, low, high) + 10 * _within(points, low - 4, high + 4)
                places.append((hidden, len(places), offset, (low, high)))
        if places:
            *_, offset, box = min(places)
            taken.append(box)
            axes.annotate(text, (x, y), offset, textcoords="offset points", ha="center", va="center", color=colour)


def _within(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> int:
    return int(((low < points) & (points < high)).all(axis=1).sum())


def _dense(line: np.ndarray, spacing: float = 3.0) -> np.ndarray:
    """Points along a polyline [P, 2], every `spacing` pixels."""
    if len(line) < 2:
        return line
    along = np.concatenate([[0.0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
    at = np.arange(0.0, along[-1] + spacing, spacing)
    return np.stack([np.interp(at, along, column) for column in line.T], axis=1)


def log_x(axes: Axes) -> None:
    """A logarithmic axis whose ticks are few and labelled."""
    axes.set_xscale("log")
    axes.autoscale_view(scaley=False)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, columns: int = 4) -> None:
    """The series' names above the drawing."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.4, handletextpad=0.5)


def svg(name: str, draw: Callable[[Axes], None], label: str, size: tuple[float, float] = SIZE) -> Markup:
    """One drawing as an ``<svg>`` element whose ids start with `name`."""
    buffer = io.StringIO()
    with as_file(STYLE) as drawn_in, style.context(["default", drawn_in]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # inline, it would style the whole page
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), drawn)  # coordinates, not text
    for colour, variable in COLOUR_NAMES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    return Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip())
