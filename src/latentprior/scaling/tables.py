"""A sweep's result as tables of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentprior.utils.formatting import COUNTS, Table, decimals, estimate, number, scaled


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The runs, the laws, the correlations, and why any of these are missing."""
    measured = "delta_lm" in result["runs"][0]
    header = ("size", "params", "budget", "FLOPs", "loss", "Fréchet", *(["delta LM"] if measured else []), "best")
    runs = [
        [
            f"{run['d_model']}x{run['blocks']}",
            scaled(run["parameters"], COUNTS),
            f"{run['activations']:,}",
            number(run["flops"]),
            decimals(run["heldout_loss"], 4),
            number(run["frechet"]),
            *([number(run["delta_lm"])] if measured else []),
            "*" if run["optimal"] else "",
        ]
        for run in result["runs"]
    ]
    yield Table("Runs, from cheap to dear (*: compute-optimal)", header, runs)
    laws, correlations = result["laws"], result["correlations"]
    fitted = [
        [f"{law['runs']}, {law['compute']}", *(_estimated(law, name) for name in ("E", "A", "alpha"))]
        for law in laws
        if "failed" not in law
    ]
    if fitted:
        yield Table("L(C) = E + A C^-alpha, 95% intervals", ("runs, FLOPs", "E", "A", "alpha"), fitted)
    related = [
        [measure, _estimated(found, "pearson"), _estimated(found, "spearman")]
        for measure, found in correlations.items()
        if "failed" not in found
    ]
    if related:
        yield Table("Correlation with the loss, 95% intervals", ("measure", "Pearson", "Spearman"), related)
    missing = [[f"law, {law['runs']}, {law['compute']}", law["failed"]] for law in laws if "failed" in law]
    missing += [[f"loss and {name}", found["failed"]] for name, found in correlations.items() if "failed" in found]
    if missing:
        yield Table("Could not be computed", ("what", "why"), missing)


def _estimated(values: Mapping[str, Any], name: str) -> str:
    return estimate(values[name], values[f"{name}_interval"])
