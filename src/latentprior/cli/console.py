"""What the command line shows: progress bars and tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.table import Table as Grid

from latentprior.utils.formatting import Table, interval, number
from latentprior.utils.progress import Phase, Report

out = Console()
err = Console(stderr=True)


@contextmanager
def bars() -> Iterator[Phase]:
    """Progress bars with rate and time left; gives a function from a phase's name to its `Report`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}"),
    )
    progress = Progress(*columns, console=err)
    try:

        def phase(name: str) -> Report:
            tasks: list[TaskID] = []
            first: list[tuple[int, float]] = []  # a resumed phase starts in the middle: its rate counts from there

            def report(done: int, total: int | None, figures: Mapping[str, Any]) -> None:
                now = time.monotonic()
                if not tasks:  # a phase that reuses what is there, or fails before it starts, shows no bar
                    progress.start()
                    tasks.append(progress.add_task(name, total=total, completed=done, amount="", figures=""))
                    first.append((done, now))
                rate = (done - first[0][0]) / max(now - first[0][1], 1e-9)
                shown = [] if total is None else ["left"]  # belongs to the time before it
                shown += [f"{rate:,.0f}/s"] if rate >= 1 else []
                shown += [f"{k} {number(v) if isinstance(v, float) else v}" for k, v in figures.items()]
                amount = f"{done:,}" if total is None else f"{min(done, total):,}/{total:,}"
                progress.update(tasks[0], completed=done, total=total, amount=amount, figures="  ".join(shown))

            return report

        yield phase
    finally:
        if progress.live.is_started:  # without a bar, stopping would print an empty line
            progress.stop()


def left_out(counts: Mapping[str, int]) -> str:
    """What a store's manifest or a training run's summary says was left out, in words."""
    parts = [f"{counts[reason]:,} {reason}" for reason in ("sinks", "nonfinite") if counts[reason]]
    if counts["cut_tokens"]:
        parts.append(f"{counts['cut_tokens']:,} tokens of {counts['cut_documents']:,} documents beyond max_length")
    return ", ".join(parts) or "none"


def table(title: str, values: Mapping[str, Any]) -> None:
    """A table of names and values."""
    shown = Grid(title=title, show_header=False, title_justify="left")
    for key, value in values.items():
        shown.add_row(key, f"{value:,}" if isinstance(value, int) else escape(str(value)))
    out.print(shown)


STATUS_STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def print_checks(checks: Iterable[tuple[str, str, str]]) -> None:
    """The doctor's table: name, status ("ok", "failed", "skipped") and detail of each check."""
    shown = Grid("check", "", Column("detail", overflow="fold"), title="latentprior doctor", title_justify="left")
    for name, status, detail in checks:
        shown.add_row(name, f"[{STATUS_STYLES[status]}]{status}[/]", escape(detail))
    out.print(shown)


def print_tables(tables: Iterable[Table], words: int = 1, *, whole: bool = False) -> None:
    """Tables whose first `words` columns align left, and are never broken if `whole`; the others align right."""
    for title, header, rows in tables:
        left = [Column(escape(name), no_wrap=whole) for name in header[:words]]
        right = [Column(escape(name), justify="right") for name in header[words:]]
        shown = Grid(*left, *right, title=escape(title), title_justify="left")
        for row in rows:
            shown.add_row(*map(escape, row))
        out.print(shown)


def print_evaluation(result: dict[str, Any]) -> None:
    """Distances and delta LM loss as tables."""
    header = ("source", "solver", "NFE", "Fréchet", "x bound", "sliced Wasserstein", "two-sample AUC")
    bound = result["distribution"][0]["frechet"]["total"]
    rows = []
    for row in result["distribution"]:
        total = row["frechet"]["total"]
        figures = (total, total / bound, row["sliced_wasserstein"], row["two_sample_auc"])
        source, way = row.get("prior", row["source"]), [row.get("solver", ""), str(row.get("nfe", ""))]
        rows.append([source, *way, *map(number, figures)])
    print_tables([Table("Real against generated activations (held-out, standardised)", header, rows)], 2, whole=True)
    if lm := result.get("delta_lm"):
        rows = []
        for row in lm["rows"]:
            t_start = "" if row["t_start"] is None else str(row["t_start"])
            rows.append([row.get("prior", row["method"]), t_start, number(row["delta"]), interval(row["interval"])])
        title = f"Delta LM loss (nats, by {lm['weighted_by']}; clean {number(lm['clean_loss'])})"
        print_tables([Table(title, ("replacement", "t_start", "delta", "95% interval"), rows)])


def print_losses(result: dict[str, Any], shipped: dict[str, Any]) -> None:
    """Held-out loss of a demo's prior and of the shipped one, or how that is installed."""
    losses = {"this demo's": result["heldout_loss"]}
    losses |= {row["prior"]: row["heldout_loss"] for row in result.get("compared", [])}
    shown = {prior: f"{number(loss['mean'])} {interval(loss['interval'])}" for prior, loss in losses.items()}
    if not shipped["prior"]:
        shown["shipped prior"] = f"not installed: {shipped['install']}" if shipped["install"] else "none is installed"
    table("Held-out loss of the priors", shown)


def print_frontiers(result: dict[str, Any]) -> None:
    """Area under each method's concept-fluency frontier, and its distance from the baseline's."""
    summary = result["summary"]
    header = ("method", "prior", "mean gain", f"less {summary['baseline']}", "95% interval")
    for direction in summary["directions"]:
        rows = []
        for entry in direction["methods"]:
            over = entry.get("area_difference", {"value": None, "interval": None})
            compared = [number(over["value"]), interval(over["interval"])]
            rows.append([entry["method"], entry["prior"] or "", number(entry["area"]), *compared])
        title = f"{direction['direction']} ({direction['prompts']} prompts)"
        print_tables([Table(title, header, rows)], 2)
