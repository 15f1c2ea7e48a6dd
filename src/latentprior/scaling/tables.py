"""A sweep's result as tables of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Title, header and rows of each table: the runs, the laws, the correlations, and why any of these are missing."""
    measured = "delta_lm" in result["runs"][0]
    header = ("size", "params", "budget", "FLOPs", "loss", "Fréchet", *(["delta LM"] if measured else []), "best")
    runs = [
        [
            f"{run['d_model']}x{run['blocks']}",
            f"{run['parameters'] / 1e6:.3g}M",
            f"{run['activations']:,}",
            f"{run['flops']:.2e}",
            f"{run['heldout_loss']:.4f}",
            f"{run['frechet']:.3g}",
            *([f"{run['delta_lm']:.3g}"] if measured else []),
            "*" if run["optimal"] else "",
        ]
        for run in result["runs"]
    ]
    yield "Runs, from cheap to dear (*: compute-optimal)", header, runs
    laws, correlations = result["laws"], result["correlations"]
    fitted = [
        [f"{law['runs']}, {law['compute']}", *(spread(law, name) for name in ("E", "A", "alpha"))]
        for law in laws
        if "failed" not in law
    ]
    if fitted:
        yield "L(C) = E + A C^-alpha, 95% intervals", ("runs, FLOPs", "E", "A", "alpha"), fitted
    related = [
        [measure, spread(found, "pearson"), spread(found, "spearman")]
        for measure, found in correlations.items()
        if "failed" not in found
    ]
    if related:
        yield "Correlation with the loss, 95% intervals", ("measure", "Pearson", "Spearman"), related
    missing = [[f"law, {law['runs']}, {law['compute']}", law["failed"]] for law in laws if "failed" in law]
    missing += [[f"loss and {name}", found["failed"]] for name, found in correlations.items() if "failed" in found]
    if missing:
        yield "Not to be had", ("what", "why"), missing


def spread(values: Mapping[str, Any], name: str) -> str:
    """A figure with its interval."""
    low, high = values[f"{name}_interval"]
    return f"{values[name]:.3g} ({low:.3g} to {high:.3g})"
