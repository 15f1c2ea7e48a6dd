"""Means over tasks with their intervals: what a probing run says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from latentprior.probe.benchmark import ALL, CHANCE, SCREENED
from latentprior.probe.sources import Draws, Source
from latentprior.stats.bootstrap import bootstrap_interval

Json = dict[str, Any]
Table = Mapping[tuple[str, str], Mapping[str, np.ndarray]]
TIE = 1e-12  # AUCs that differ by less are equal


def summarise(
    tasks: Sequence[Mapping[str, Any]], sources: Sequence[Source | Draws], maps: Sequence[Source], seed: int
) -> Json:
    """Means over tasks, of which there is at least one, with 95% bootstrap intervals over them.

    Of draws a task's AUC is the mean over them.

    Args:
        tasks, sources, maps: what `probe_task` gave for each, and what it got, draws among the sources.

    Returns:
        JSON-ready: "scores" by source and selection, those of draws with their spread ("draws"), "paired" differences
        of the first prior from every other source, "families", "grid" (by block and t), "mlp_blocks", "scaling" (AUC
        against held-out loss) and "sparse".
    """
    names = [source.name for source in sources]
    drawn = {source.name for source in sources if isinstance(source, Draws)}
    columns = {key: _column(tasks, *key) for key in product(names, (SCREENED, ALL, CHANCE))}
    table: Table = {key: values for key, values in columns.items() if len(values["test_auc"])}
    scores = []
    for (source, selection), values in table.items():
        validation = {"validation": float(values["validation_auc"].mean())}
        found = {"source": source, "selection": selection} | mean_auc(values["test_auc"], seed) | validation
        scores.append(found | ({"draws": _spread(tasks, source, selection)} if source in drawn else {}))
    return {
        "scores": scores,
        "paired": list(_paired(table, names, seed)),
        "families": _families(tasks, names),
        "grid": _grid(tasks, maps),
        "mlp_blocks": _blocks(tasks),
        "scaling": _scaling(table, sources, seed),
        "sparse": list(_sparse(tasks, names, seed)),
    }


def task_scores(task: Mapping[str, Any]) -> Json:
    """A task's screened test AUC of each source ("scores"), of draws the mean, with their standard deviation ("sd")."""
    names = dict.fromkeys(row["source"] for row in task["rows"])
    aucs = {name: np.array(_by_draw([task], name, SCREENED, "test_auc")[0]) for name in names}
    scores = {name: float(values.mean()) for name, values in aucs.items()}
    spread = {name: _sd(values) for name, values in aucs.items() if len(values) > 1}
    described = {"task": task["task"], "family": task["family"], "scores": scores}
    return described | ({"sd": spread} if spread else {})


def mean_auc(values: np.ndarray, seed: int) -> Json:
    """The mean of one AUC a task, with its interval; no interval for a single task."""
    interval = bootstrap_interval(values, seed=seed) if len(values) > 1 else None
    return {"auc": float(values.mean()), "interval": interval}


def _column(tasks: Sequence[Mapping[str, Any]], source: str, selection: str) -> dict[str, np.ndarray]:
    """One value for each task that has any."""
    columns = {name: _by_draw(tasks, source, selection, name) for name in ("test_auc", "validation_auc")}
    return {name: np.array([np.mean(values) for values in column]) for name, column in columns.items()}


def _by_draw(tasks: Sequence[Mapping[str, Any]], source: str, selection: str, name: str) -> list[list[float]]:
    """The values of each task that has any: one for each draw, a single one of a source that is not drawn."""
    found = [
        [row for row in task["rows"] if (row["source"], row["selection"]) == (source, selection)] for task in tasks
    ]
    ordered = [sorted(rows, key=lambda row: row.get("draw") or 0) for rows in found if rows]
    return [[row[name] for row in rows] for rows in ordered]


def _spread(tasks: Sequence[Mapping[str, Any]], source: str, selection: str) -> Json:
    """How test AUCs differ between draws: those of a single task, and the means over tasks."""
    aucs = np.array(_by_draw(tasks, source, selection, "test_auc"))  # [tasks, draws]
    means = aucs.mean(axis=0)
    within = None if len(means) < 2 else float(aucs.std(axis=1, ddof=1).mean())
    ends = {"lowest": float(means.min()), "highest": float(means.max())}
    return {"number": len(means), "sd": _sd(means), "sd_within_task": within} | ends


def _sd(values: np.ndarray) -> float | None:
    """The standard deviation of a sample; None for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


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


def _scaling(table: Table, sources: Sequence[Source | Draws], seed: int) -> list[Json]:
    priors = [source for source in sources if isinstance(source, Source) and source.kind == "prior"]
    known = [prior for prior in priors if prior.heldout_loss is not None and (prior.name, SCREENED) in table]
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
