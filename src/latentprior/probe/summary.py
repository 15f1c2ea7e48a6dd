"""Means over tasks with their intervals: what a probing run says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from latentprior.probe.benchmark import ALL, CHANCE, SCREENED
from latentprior.probe.sources import Source
from latentprior.stats.bootstrap import bootstrap_interval

Json = dict[str, Any]
Table = Mapping[tuple[str, str], Mapping[str, np.ndarray]]
TIE = 1e-12  # AUCs that differ by less are equal


def summarise(tasks: Sequence[Mapping[str, Any]], sources: Sequence[Source], maps: Sequence[Source], seed: int) -> Json:
    """Means over tasks, of which there is at least one, with 95% bootstrap intervals over them.

    Args:
        tasks, sources, maps: what `probe_task` gave for each, and what it got.

    Returns:
        JSON-ready: "scores" by source and selection, "paired" differences of the first prior from every other source,
        "families", "grid" (by block and t), "mlp_blocks", "scaling" (AUC against held-out loss) and "sparse".
    """
    names = [source.name for source in sources]
    columns = {key: _column(tasks, *key) for key in product(names, (SCREENED, ALL, CHANCE))}
    table: Table = {key: values for key, values in columns.items() if len(values["test_auc"])}
    scores = []
    for (source, selection), values in table.items():
        validation = {"validation": float(values["validation_auc"].mean())}
        scores.append({"source": source, "selection": selection} | mean_auc(values["test_auc"], seed) | validation)
    return {
        "scores": scores,
        "paired": list(_paired(table, names, seed)),
        "families": _families(tasks, names),
        "grid": _grid(tasks, maps),
        "mlp_blocks": _blocks(tasks),
        "scaling": _scaling(table, sources, seed),
        "sparse": list(_sparse(tasks, names, seed)),
    }


def mean_auc(values: np.ndarray, seed: int) -> Json:
    """The mean of one AUC a task, with its interval; no interval for a single task."""
    interval = bootstrap_interval(values, seed=seed) if len(values) > 1 else None
    return {"auc": float(values.mean()), "interval": interval}


def _column(tasks: Sequence[Mapping[str, Any]], source: str, selection: str) -> dict[str, np.ndarray]:
    rows = [r for task in tasks for r in task["rows"] if (r["source"], r["selection"]) == (source, selection)]
    return {name: np.array([row[name] for row in rows]) for name in ("test_auc", "validation_auc")}


def _paired(table: Table, names: Sequence[str], seed: int) -> Iterable[Json]:
    """The first prior's AUCs minus every other source's, task by task."""
    first = "meta-neurons"
    for selection in (SCREENED, ALL):
        for other in names:
            if other == first or (first, selection) not in table or (other, selection) not in table:
                continue
            difference = table[first, selection]["test_auc"] - table[other, selection]["test_auc"]
            found = mean_auc(difference, seed)
            yield {
                "a": first,
                "b": other,
                "selection": selection,
                "difference": found["auc"],
                "interval": found["interval"],
                "wins": int((difference > TIE).sum()),
                "ties": int((np.abs(difference) <= TIE).sum()),
                "tasks": len(difference),
            }


def _families(tasks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Json]:
    found = []
    for family in dict.fromkeys(task["family"] for task in tasks):
        members = [task for task in tasks if task["family"] == family]
        scores = {name: float(_column(members, name, SCREENED)["test_auc"].mean()) for name in names}
        found.append({"family": family, "tasks": len(members), "scores": scores})
    return sorted(found, key=lambda entry: -entry["tasks"])


def _grid(tasks: Sequence[Mapping[str, Any]], maps: Sequence[Source]) -> Json | None:
    if not maps:
        return None
    auc = np.mean([task["map"] for task in tasks], axis=0).T  # [blocks, times]
    return {
        "prior": maps[0].prior,
        "blocks": list(range(maps[0].blocks)),
        "times": [source.times[0] for source in maps],
        "auc": auc.tolist(),
    }


def _blocks(tasks: Sequence[Mapping[str, Any]]) -> list[Json]:
    rows = [task["blocks"] for task in tasks if task["blocks"]]
    means = np.mean(rows, axis=0).tolist() if rows else []
    return [{"block": block, "auc": auc} for block, auc in enumerate(means)]


def _scaling(table: Table, sources: Sequence[Source], seed: int) -> list[Json]:
    known = [s for s in sources if s.kind == "prior" and s.heldout_loss is not None and (s.name, SCREENED) in table]
    found = []
    for source in known if len(known) > 1 else []:
        trained = {name: getattr(source, name) for name in ("prior", "heldout_loss", "activations")}
        found.append({"source": source.name} | trained | mean_auc(table[source.name, SCREENED]["test_auc"], seed))
    return found


def _sparse(tasks: Sequence[Mapping[str, Any]], names: Sequence[str], seed: int) -> Iterable[Json]:
    rows = [row for task in tasks for row in task["sparse"]]
    for name in names:
        for k in dict.fromkeys(row["k"] for row in rows if row["source"] == name):
            values = np.array([row["test_auc"] for row in rows if (row["source"], row["k"]) == (name, k)])
            yield {"source": name, "k": k, **mean_auc(values, seed)}
