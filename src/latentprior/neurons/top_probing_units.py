"""The probing tasks that a unit is among the best at, from a run of `latentprior probe`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from latentprior.data.store.manifest import damaged
from latentprior.lm.hooks import Hookpoint
from latentprior.neurons.store import reading
from latentprior.utils.errors import InputError

TOP_UNITS = "winners.parquet"
SOURCE = "meta-neurons"
_COLUMNS = ("task", "source", "t", "block", "index", "rank", "sign", "test_auc")


class ProbedTask(NamedTuple):
    """A task that a unit is among the best at: its rank by validation AUC, from the best, and its test AUC.

    The sign is +1 if the unit is larger in the class that sorts last, -1 if in the other.
    """

    rank: int
    task: str
    auc: float
    sign: int


def read_top_probing_units(
    folder: str | Path, t: float, hookpoint: Hookpoint, *, blocks: int, d_mlp: int
) -> dict[int, list[ProbedTask]]:
    """The tasks of each unit (``block * d_mlp + index``) at the noise level nearest to `t`, its best ranks first.
    The probing run in `folder` must be one of this `hookpoint` and of a prior of this shape.
    """
    folder = Path(folder)
    _check_hookpoint(folder / "probe.json", hookpoint)
    path = folder / TOP_UNITS
    with reading(path, f"{folder} holds no probing run: {TOP_UNITS} is missing"):
        rows = pq.ParquetFile(path).read(columns=list(_COLUMNS)).to_pylist()
    if rows and set(_COLUMNS) - rows[0].keys():
        raise damaged(path, f"it lacks the column {sorted(set(_COLUMNS) - rows[0].keys())[0]!r}")
    rows = [row for row in rows if row["source"] == SOURCE and row["t"] is not None]
    if not rows:
        raise InputError(f"{path} names no {SOURCE}: probe a prior with the source {SOURCE!r}")
    nearest = min({row["t"] for row in rows}, key=lambda found: (abs(found - t), found))
    tasks: dict[int, list[ProbedTask]] = defaultdict(list)
    for row in rows:
        if row["t"] != nearest:
            continue
        if not (0 <= row["block"] < blocks and 0 <= row["index"] < d_mlp):
            raise InputError(
                f"{folder} probed a prior of another shape: it has unit {row['index']} of block {row['block']}, "
                f"this one {blocks} blocks of {d_mlp} units"
            )
        task = ProbedTask(row["rank"], row["task"], row["test_auc"], row["sign"])
        tasks[row["block"] * d_mlp + row["index"]].append(task)
    return {unit: sorted(found, key=lambda task: (task.rank, -task.auc, task.task)) for unit, found in tasks.items()}


def _check_hookpoint(path: Path, hookpoint: Hookpoint) -> None:
    with reading(path, f"{path.parent} holds no probing run: {path.name} is missing"):
        probed = Hookpoint.from_dict(json.loads(path.read_bytes())["hookpoint"])
    if not probed.same_place(hookpoint):
        raise InputError(f"{path.parent} probed {probed}, this prior belongs to {hookpoint}")
