"""Held-out loss against activations of finished or running training runs, from their logs: a table and a figure.

python benchmarks/plot_runs.py official=runs/official-0,runs/official-1 fast=runs/fast-0 --figure docs/recipes.png

Each argument is a label and the folders of its runs (seeds). A curve is one run: schedules end with the run, so only
the last point of a run is what its recipe gives for that many activations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from latentprior.training.tracking import read_log

COLOURS = ("#8a8a8a", "#c44e00", "#0063a8", "#00824a", "#7a3fa0")


def evaluations(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's log that have a held-out loss, the untrained one left out."""
    lines = read_log(Path(folder) / "log.jsonl")
    return [line for line in lines if "heldout_loss" in line and line["activations"]]


def draw(runs: dict[str, list[str]], path: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for colour, (label, folders) in zip(COLOURS, runs.items(), strict=False):
        for i, folder in enumerate(folders):
            points = evaluations(folder)
            x, y = [p["activations"] for p in points], [p["heldout_loss"] for p in points]
            axes.plot(x, y, color=colour, lw=1.2, label=None if i else label)
            axes.plot(x[-1:], y[-1:], "o", color=colour, ms=5)
    axes.set(xscale="log", xlabel="activations trained on", ylabel="held-out loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="label=folder,folder,...")
    parser.add_argument("--figure", help="draw the curves into this PNG")
    options = parser.parse_args()
    runs = {label: folders.split(",") for label, _, folders in (run.partition("=") for run in options.runs)}
    print("| run | activations | held-out loss of each seed |\n|---|---|---|")
    for label, folders in runs.items():
        last = [evaluations(folder)[-1] for folder in folders]
        losses = ", ".join(f"{line['heldout_loss']:.4f}" for line in last)
        print(f"| {label} | {last[0]['activations']:,} | {losses} |")
    if options.figure:
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
