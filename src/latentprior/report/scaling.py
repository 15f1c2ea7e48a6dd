"""The page of a sweep: its figures, its section, its sentences and leading figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from latentprior.report.blocks import NOTHING, Headline, figure, pair, prose, stack, table
from latentprior.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, legend, log_x, svg
from latentprior.report.templating import lines, macros, paragraph
from latentprior.utils.formatting import MISSING, interval, number, power, with_intervals

Json = Mapping[str, Any]

_TEXTS = macros("scaling.html.jinja")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MARKERS = "os^Dvp*"  # another number of them than of colours: 28 sizes before two look the same
RUNS = {"envelope": "compute-optimal runs", "all": "all runs"}
COMPUTES = {"executed": "as executed", "6ND": "6 N D"}
MEASURES = {
    "frechet": "Fréchet distance",
    "frechet_raw": "Fréchet distance, raw",
    "delta_lm": "delta LM loss",
}


def section(sweep: Json) -> Markup:
    """Figures and tables of a sweep; nothing without one."""
    if not (runs := sweep.get("runs")):
        return NOTHING
    law, correlations = leading_law(sweep), sweep["correlations"]
    note = paragraph(_TEXTS.by_compute(_fitted_to(law) if law else None))
    losses = figure("Held-out loss against training compute", note, loss_by_compute(runs, law))
    drawn = []
    for measure in ("frechet", "delta_lm"):
        if measure in correlations:
            name, found = MEASURES[measure], correlations[measure]
            note = paragraph(_TEXTS.by_loss(measure, found))
            bound = sweep["bound"][measure] if measure == "frechet" else None
            drawn.append(figure(f"{name[0].upper()}{name[1:]} by loss", note, measure_by_loss(runs, measure, bound)))
    tables = [_runs(runs), _laws(sweep["laws"]), _correlations(correlations)]
    return stack(pair(prose(_explained(sweep)), losses), pair(*drawn), *tables)


def sentences(sweep: Json) -> list[Markup]:
    """A sweep in plain words."""
    if not (runs := sweep.get("runs")):
        return []
    law, found = leading_law(sweep), sweep["correlations"]
    ranks = [(MEASURES[name], found[name]) for name in found if name != "frechet_raw" and "spearman" in found[name]]
    return lines(_TEXTS.sentences(runs, law, _fitted_to(law) if law else "", ranks))


def headlines(sweep: Json) -> Iterator[Headline]:
    """Figures of a sweep worth large type."""
    if not (runs := sweep.get("runs")):
        return
    if law := leading_law(sweep):
        note = f"95% interval {interval(law['alpha_interval'])}; {_fitted_to(law)}"
        yield Headline("Exponent α", number(law["alpha"]), "", note)
        known = "" if law["E_pinned"] else "; not determined by these runs"
        yield Headline("Irreducible loss E", number(law["E"]), "", f"95% interval {interval(law['E_interval'])}{known}")
    best = min(runs, key=lambda run: run["heldout_loss"])
    note = f"{_size(best)}, {best['activations']:,} activations"
    yield Headline("Best held-out loss", number(best["heldout_loss"]), "", note)
    found = sweep["correlations"].get("delta_lm", {})
    name = "delta LM loss"
    if "spearman" not in found:
        found, name = sweep["correlations"].get("frechet", {}), "Fréchet distance"
    if "spearman" in found:
        note = f"Spearman, 95% interval {interval(found['spearman_interval'])}"
        yield Headline(f"Loss and {name}", number(found["spearman"]), "", note)


def leading_law(sweep: Json) -> Json | None:
    """The law by executed FLOPs through the compute-optimal runs, or if these have none, through all of them."""
    laws = [law for law in sweep.get("laws", []) if law["compute"] == "executed" and "failed" not in law]
    return min(laws, key=lambda law: list(RUNS).index(law["runs"]), default=None)


def loss_by_compute(runs: Sequence[Json], law: Json | None) -> Markup:
    """Held-out loss over training FLOPs on log axes: a line for each size, the envelope, the law and its band."""

    def draw(axes: Axes) -> None:
        for size, colour, marker, chosen in _by_size(runs):
            budgets: dict[float, list[float]] = {}
            for run in chosen:
                budgets.setdefault(run["flops"], []).append(run["heldout_loss"])
                axes.plot(run["flops"], run["heldout_loss"], marker, color=colour)
            means = [(flops, float(np.mean(losses))) for flops, losses in sorted(budgets.items())]
            axes.plot(*zip(*means, strict=True), color=colour, marker=marker, markersize=0, label=size)
        losses = [run["heldout_loss"] for run in runs]
        optimal = sorted((run["flops"], run["heldout_loss"]) for run in runs if run["optimal"])
        axes.plot(*zip(*optimal, strict=True), color=INK, linestyle=":", linewidth=1.4, label="compute-optimal")
        if law:
            curve = law["curve"]
            axes.plot(curve["compute"], curve["loss"], color=INK, linewidth=1.4, label="law")
            axes.fill_between(curve["compute"], curve["low"], curve["high"], color=INK, alpha=0.12, linewidth=0)
            losses.append(curve["loss"][-1])
        log_x(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: power(x)))
        axes.set_yscale("log")
        axes.set_ylim(0.97 * min(losses), 1.03 * max(losses))
        _plain(axes)
        axes.set(xlabel="training compute, FLOPs", ylabel="held-out loss")
        legend(axes)

    return svg("scaling", draw, "Held-out loss over training compute, by size")


def measure_by_loss(runs: Sequence[Json], measure: str, bound: float | None) -> Markup:
    """Another measure of the same runs over their loss, logarithmic where it is positive, and its lower bound."""
    values = [run[measure] for run in runs]

    def draw(axes: Axes) -> None:
        for size, colour, marker, chosen in _by_size(runs):
            points = [(run["heldout_loss"], run[measure]) for run in chosen]
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=size)
            for run in chosen:
                if ends := run.get(f"{measure}_interval"):
                    axes.plot([run["heldout_loss"]] * 2, ends, color=colour, linewidth=1.2, alpha=0.35)
        if bound is not None:
            axes.axhline(bound, color=MUTED, linestyle="--", linewidth=1.2)
        if min(values) > 0:
            axes.set_yscale("log")
            _plain(axes)
        unit = ", nats" if measure == "delta_lm" else ""
        axes.set(xlabel="held-out loss", ylabel=f"{MEASURES[measure]}{unit}")
        legend(axes)

    return svg(f"by-loss-{measure}", draw, f"{MEASURES[measure]} over held-out loss, by size")


def _plain(axes: Axes) -> None:
    """Round numbers on a log axis that spans less than a decade or two."""
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _by_size(runs: Sequence[Json]) -> Iterator[tuple[str, str, str, list[Json]]]:
    """Each size, from small to large, with its colour, its marker and its runs."""
    sizes = dict.fromkeys(_size(run) for run in sorted(runs, key=lambda run: run["parameters"]))
    for i, size in enumerate(sizes):
        yield size, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], [run for run in runs if _size(run) == size]


def _size(run: Json) -> str:
    return f"d {run['d_model']} × {run['blocks']}"


def _fitted_to(law: Json) -> str:
    return f"all {law['points']} runs" if law["runs"] == "all" else f"the {law['points']} {RUNS[law['runs']]}"


def _explained(sweep: Json) -> Markup:
    optimal = [run for run in sweep["runs"] if run["optimal"]]
    largest = max(run["activations"] for run in sweep["runs"])
    ended = sum(run["activations"] == largest for run in optimal)
    failed = [
        f"{RUNS[x['runs']]}: {x['failed']}" for x in sweep["laws"] if x["compute"] == "executed" and "failed" in x
    ]
    return paragraph(_TEXTS.explained(leading_law(sweep), len(optimal), ended, failed))


def _runs(runs: Sequence[Json]) -> Markup:
    columns = {
        "Run": _size,
        "Parameters": lambda run: number(run["parameters"]),
        "Activations": lambda run: f"{run['activations']:,}",
        "FLOPs": lambda run: number(run["flops"]),
        "6 N D": lambda run: number(run["flops_6nd"]),
        "Held-out loss": lambda run: f"{run['heldout_loss']:.4f}",
        "Fréchet": lambda run: number(run["frechet"]),
        "Fréchet, raw": lambda run: number(run["frechet_raw"]),
    }
    if "delta_lm" in runs[0]:
        columns["Delta LM loss"] = lambda run: number(run["delta_lm"])
        columns["95% interval"] = lambda run: interval(run["delta_lm_interval"])
    if len({run["seed"] for run in runs}) > 1:
        columns["Seed"] = lambda run: str(run["seed"])
    columns["Optimal"] = lambda run: "yes" if run["optimal"] else MISSING
    rows = [[shown(run) for shown in columns.values()] for run in runs]
    note = "From cheap to dear. Fréchet distances are standardised unless it says raw. Optimal: compute-optimal."
    return table("All runs", note, list(columns), rows)


def _laws(laws: Sequence[Json]) -> Markup:
    header = ["Fitted to", "FLOPs", "Runs", "E", "95% interval", "A", "95% interval", "α", "95% interval", "Residual"]
    rows = []
    for law in laws:
        fitted = [MISSING] * 8
        if "failed" not in law:
            values = with_intervals(*((law[name], law[f"{name}_interval"]) for name in ("E", "A", "alpha")))
            fitted = [str(law["points"]), *values, f"{law['residual']:.2%}"]
        rows.append([RUNS[law["runs"]].capitalize(), COMPUTES[law["compute"]], *fitted])
    note = "Intervals are from a bootstrap over runs; the residual is relative, root mean square."
    return table("Laws L(C) = E + A C^−α", note, header, rows)


def _correlations(correlations: Json) -> Markup:
    header = ["Loss and", "Runs", "Pearson", "95% interval", "Spearman", "95% interval"]
    rows = [
        [
            MEASURES[measure],
            str(found["points"]),
            *with_intervals(*((found[name], found[f"{name}_interval"]) for name in ("pearson", "spearman"))),
        ]
        for measure, found in correlations.items()
        if "failed" not in found
    ]
    return table("Correlations over runs", "Intervals are from a bootstrap over runs.", header, rows)
