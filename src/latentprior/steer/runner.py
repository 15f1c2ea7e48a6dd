"""Directions x strengths x methods x prompts: steered texts and what they measure, cell by cell, resumable.

A *cell* is one direction, one method and (if it repairs) one prior, with all prompts and strengths. It is a Parquet
file below ``cells``; a run that was interrupted, or one with more directions, methods or priors, makes only the cells
that are not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentprior.config import SteerConfig, settings_of, to_dict
from latentprior.data.prompts import Prompts
from latentprior.judge.fluency import conditional_nll, repetition
from latentprior.lm.edits import EditCounts
from latentprior.prior.glp import GLP
from latentprior.prior.loading import heldout_loss
from latentprior.steer.direction import Direction
from latentprior.steer.estimate import random_direction
from latentprior.steer.generate import Trace, continued
from latentprior.steer.intervention import Edit, steering
from latentprior.steer.repairs import PriorRepair
from latentprior.steer.tasks import Case
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text, replaced
from latentprior.utils.progress import Report, silent
from latentprior.utils.provenance import versions

SETTINGS = "settings.json"  # of the cells


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One direction, one method, one prior."""

    case: Case
    method: str
    prior: str
    """Empty if the method has no prior."""

    @property
    def file(self) -> str:
        return file_of(self.case.direction.name, self.method, self.prior)


def file_of(direction: str, method: str, prior: str) -> str:
    """The name of a cell's file."""
    return f"{method}-{_digest(json.dumps([direction, method, prior]).encode())}.parquet"


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that a cell needs."""

    config: SteerConfig
    model: Any
    tokenizer: Any
    priors: dict[str, GLP]
    mean_norm: float
    """Of the layer: the unit of strength."""
    layer: int | None
    """As the priors are called: None for priors of one layer."""

    @cached_property
    def scorer(self) -> GLP:
        """The prior that says how far activations are off the data: one for all, so that scores compare."""
        return self.priors[self.config.priors[0]]

    def strengths(self, method: str) -> list[float]:
        return [0.0] if method == "none" else self.config.signed_strengths()

    def measured(self, cell: Cell) -> tuple[pa.Table, EditCounts]:
        """The rows of a cell, and what was edited for them."""
        tables, counts = zip(*self._parts(cell), strict=True)
        return pa.concat_tables(tables), EditCounts(counts)

    def _parts(self, cell: Cell) -> Iterator[tuple[pa.Table, EditCounts]]:
        """The rows of a cell, some prompts at a time."""
        strengths = self.strengths(cell.method)
        step = max(1, self.config.batch_rows // len(strengths))
        for start in range(0, len(cell.case.prompts), step):
            yield self._rows(cell, strengths, start, cell.case.prompts.select(slice(start, start + step)))

    def _rows(self, cell: Cell, strengths: list[float], first: int, prompts: Prompts) -> tuple[pa.Table, EditCounts]:
        count, copies = len(prompts), len(strengths)
        numbers = [first + i for i in range(count) for _ in strengths]
        signed = torch.tensor(strengths, dtype=torch.float64).repeat(count)
        repair = self._repair(cell)
        trace = Trace(repair, len(numbers), self.mean_norm, keep=self.config.new_tokens // 2)
        edit = Edit(self._direction(cell), signed)
        context = steering(
            self.model, edit, mean_norm=self.mean_norm, positions=self.config.positions, repair=trace, check_model=False
        )
        share = self.config.positions != "all"
        with repair or nullcontext():
            ids, counts = continued(self.model, prompts, copies, self.config.new_tokens, context, share=share)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        repeats = [repetition(row) for row in ids.tolist()]
        off = trace.off_manifold(self.scorer, self.layer, self.config.seed)
        steered = cell.method != "none"
        table = pa.table(
            {
                "direction": [cell.case.direction.name] * len(texts),
                "method": [cell.method] * len(texts),
                "prior": [cell.prior] * len(texts),
                "strength": signed.numpy(),
                "prompt": np.array(numbers),
                "prompt_text": [text for text in prompts.texts for _ in strengths],
                "text": texts,
                "concept": np.asarray(cell.case.judge(texts), np.float64),
                "nll": conditional_nll(self.model, prompts.inputs(), ids, copies=copies),
                **{name: [row[name] for row in repeats] for name in repeats[0]},
                "retention": trace.retention().double().numpy() if steered else [None] * len(texts),
                "off_clean": off[0].double().numpy(),
                "off_before": off[1].double().numpy(),
                "off_after": off[2].double().numpy(),
                "moved": trace.moved().double().numpy(),
            },
            schema=SCHEMA,
        )
        return table, counts

    def _direction(self, cell: Cell) -> Direction:
        """The cell's direction, or for the controls a random one."""
        direction = cell.case.direction
        if not cell.method.startswith("random"):
            return direction
        vector = random_direction(direction.hookpoint.width, self.config.seed)
        return Direction.of(vector, direction.hookpoint, "random", "random", seed=self.config.seed)

    def _repair(self, cell: Cell) -> PriorRepair | None:
        repair = self.config.repair_of(cell.method)
        return None if repair is None else PriorRepair(self.priors[cell.prior], repair, seed=self.config.seed)


_NUMBERS = ("concept", "nll", "distinct_2", "distinct_3")
_MEASURES = ("retention", "off_clean", "off_before", "off_after", "moved")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("direction", "method", "prior")),
        ("strength", pa.float64()),
        ("prompt", pa.int64()),
        *((name, pa.string()) for name in ("prompt_text", "text")),
        *((name, pa.float64()) for name in _NUMBERS),
        ("longest_repeat", pa.int64()),
        ("tokens", pa.int64()),
        *((name, pa.float64()) for name in _MEASURES),
    ]
)


def cells(config: SteerConfig, cases: Sequence[Case]) -> list[Cell]:
    """Every cell of an experiment."""
    return [Cell(case, method, prior) for case in cases for method, prior in ways(config)]


def ways(config: SteerConfig) -> list[tuple[str, str]]:
    """The methods, each with every prior; those without repair once for all priors, without a name."""
    methods = list(dict.fromkeys(["none", "plain", *config.methods]))
    return [(method, prior) for method in methods for prior in (config.priors if config.repair_of(method) else [""])]


def finished(
    config: SteerConfig, priors: Mapping[str, GLP], directions: Sequence[Direction], folder: Path
) -> dict[str, Any] | None:
    """The result of an experiment that has nothing left to do; None if there is none.

    That is what the very same configuration left, with priors of the same held-out losses and, of the experiment
    "files", the same `directions`, if its cells are still there and no rating of a text failed.

    Raises:
        InputError: a method whose texts all equal the unsteered ones, as `run_cells`.
    """
    path = folder / "steer.json"
    if not path.is_file() or not (folder / "results.parquet").is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"config": to_dict(config), "priors": losses_of(priors)}
    if any(result.get(key) != value for key, value in json.loads(json.dumps(wanted)).items()):
        return None
    names = [found["name"] for found in result["directions"]]
    files = [folder / "cells" / file_of(name, *way) for name in names for way in ways(config)]
    if not all(file.is_file() for file in files) or (result["ratings"] and result["ratings"]["failed"]):
        return None
    kept = json.loads((folder / "cells" / SETTINGS).read_text(encoding="utf-8"))
    if config.experiment == "files" and kept["directions"] != _digests(directions):
        return None
    for name in names:
        tables = {way: pq.read_table(folder / "cells" / file_of(name, *way)) for way in ways(config)}
        for way, table in tables.items():
            if way[0] != "none":
                _refuse_unchanged(way[0], name, table, tables["none", ""])
    return result


def losses_of(priors: Mapping[str, GLP]) -> dict[str, dict[str, Any]]:
    """The held-out loss of every prior, as the result has it."""
    return {name: {"heldout_loss": heldout_loss(glp)} for name, glp in priors.items()}


def _digests(directions: Iterable[Direction]) -> dict[str, str]:
    return {d.name: _digest(d.vector.numpy().tobytes()) for d in directions}


def run_cells(bench: Bench, cases: Sequence[Case], folder: Path, *, report: Report = silent) -> pa.Table:
    """Make the cells that are not in `folder` yet; returns the rows of all.

    Raises:
        InputError: the folder holds cells of other settings; or a method whose texts all equal the unsteered ones at
            every strength, which is never a result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(bench.config, cases, folder)
    wanted = cells(bench.config, cases)
    tables, unsteered = [], {}
    for done, cell in enumerate(wanted):
        path, counts = folder / cell.file, None
        report(done, len(wanted), {"method": cell.method})
        if path.is_file():
            table = pq.read_table(path)
        else:
            table, counts = bench.measured(cell)
        if cell.method == "none":
            unsteered[cell.case.direction.name] = table
        else:
            name = cell.case.direction.name
            _refuse_unchanged(cell.method, name, table, unsteered[name], counts)
        if counts is not None:
            with replaced(path) as partial:
                pq.write_table(table, partial, compression="zstd")
        tables.append(table)
    report(len(wanted), len(wanted), {})
    return pa.concat_tables(tables)


def _refuse_unchanged(
    method: str, direction: str, table: pa.Table, unsteered: pa.Table, counts: EditCounts | None = None
) -> None:
    """Raise `InputError` if no text of a cell at any strength differs from the unsteered one of its prompt."""
    plain = dict(zip(unsteered["prompt"].to_pylist(), unsteered["text"].to_pylist(), strict=True))
    steered = [row for row in table.select(["prompt", "text", "strength"]).to_pylist() if row["strength"]]
    if steered and all(row["text"] == plain[row["prompt"]] for row in steered):
        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
        did = f"; {counts}" if counts is not None else ""
        raise InputError(
            f"method {method!r} along {direction!r} changed none of {len(steered)} texts at any "
            f"strength: nothing to report ({installed}{did})"
        )


def _check_settings(config: SteerConfig, cases: Sequence[Case], folder: Path) -> None:
    """Cells of one folder are made with the same settings, but for those that only say which cells there are."""
    path = folder / SETTINGS
    mine = json.loads(json.dumps(settings_of(config) | {"llm": to_dict(config.llm)}))
    if config.store is None:
        del mine["store"]  # older folders name one that no experiment but "sae" reads
    if config.experiment == "files":  # a file may change under its name; other directions follow from the settings
        mine["directions"] = _digests(case.direction for case in cases)
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if different := [key for key in mine if saved.get(key) != mine[key]]:
            raise InputError(
                f"{folder.parent} holds an experiment with another {different[0]} "
                f"({saved.get(different[0])}, not {mine[different[0]]}): choose another --output"
            )
        return
    replace_text(path, json.dumps(mine, indent=1) + "\n")
