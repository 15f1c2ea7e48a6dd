"""Runs conditions: continues every prompt of a task under every strength, and measures each text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from latentprior.config import SteerConfig
from latentprior.data.prompts import Prompts
from latentprior.judge.fluency import conditional_nll, repetition
from latentprior.lm.edits import EditCounts
from latentprior.prior.glp import GLP
from latentprior.steer.conditions import Condition, conditions, keep_settings, refuse_unchanged, write_rows
from latentprior.steer.direction import Direction
from latentprior.steer.estimate import random_direction
from latentprior.steer.generate import EditMonitor, generate_continuations
from latentprior.steer.intervention import Edit, steering
from latentprior.steer.repairs import PriorRepair
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.progress import Report, silent

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("direction", "method", "prior")),
        ("strength", pa.float64()),
        ("prompt", pa.int64()),
        *((name, pa.string()) for name in ("prompt_text", "text")),
        *((name, pa.float64()) for name in ("concept", "nll", "distinct_2", "distinct_3")),
        ("longest_repeat", pa.int64()),
        ("tokens", pa.int64()),
        *((name, pa.float64()) for name in ("retention", "off_clean", "off_before", "off_after", "moved")),
    ]
)


def run_conditions(runner: Runner, tasks: Sequence[SteeringTask], folder: Path, *, report: Report = silent) -> pa.Table:
    """Run the conditions that are not in `folder` yet; returns the rows of all."""
    keep_settings(runner.config, tasks, folder)
    wanted = conditions(runner.config, tasks)
    tables, unsteered = [], {}
    for done, condition in enumerate(wanted):
        path, name, counts = folder / condition.file, condition.direction, None
        report(done, len(wanted), {"method": condition.method})
        if path.is_file():
            table = pq.read_table(path)
        else:
            table, counts = runner.run(condition)
        if condition.method == "none":
            unsteered[name] = table
        else:
            refuse_unchanged(condition.method, name, table, unsteered[name], counts)
        if counts is not None:
            write_rows(table, path)
        tables.append(table)
    report(len(wanted), len(wanted), {})
    return pa.concat_tables(tables)


@dataclass(frozen=True, eq=False)
class Runner:
    """What every condition needs, and how one is run."""

    config: SteerConfig
    model: Any
    tokenizer: Any
    priors: dict[str, GLP]
    mean_norm: float  # of the layer: the unit of strength
    layer: int | None  # as the priors are called: None for priors of one layer

    def run(self, condition: Condition) -> tuple[pa.Table, EditCounts]:
        """The rows of a condition, one for each prompt and strength, and what was edited for them."""
        tables, counts = [], []
        strengths = [0.0] if condition.method == "none" else self.config.signed_strengths()
        step, prompts = max(1, self.config.batch_rows // len(strengths)), condition.task.prompts
        for start in range(0, len(prompts), step):
            part = prompts.select(slice(start, start + step))
            ids, monitor, edited = self._generate(condition, part, strengths)
            tables.append(self._measure(condition, part, start, strengths, ids, monitor))
            counts.append(edited)
        return pa.concat_tables(tables), EditCounts(counts)

    def _generate(
        self, condition: Condition, prompts: Prompts, strengths: list[float]
    ) -> tuple[Tensor, EditMonitor, EditCounts]:
        config = self.config.repair_of(condition.method)
        repair = None if config is None else PriorRepair(self.priors[condition.prior], config, seed=self.config.seed)
        rows = len(prompts) * len(strengths)
        monitor = EditMonitor(repair, rows, self.mean_norm, keep=self.config.new_tokens // 2)
        direction = condition.task.direction
        if condition.method.startswith("random"):
            vector = random_direction(direction.hookpoint.width, self.config.seed)
            direction = Direction.of(vector, direction.hookpoint, "random", "random", seed=self.config.seed)
        edit = Edit(direction, torch.tensor(strengths, dtype=torch.float64).repeat(len(prompts)))
        options: dict[str, Any] = {"positions": self.config.positions, "repair": monitor, "check_model": False}
        context = steering(self.model, edit, mean_norm=self.mean_norm, **options)
        size = {"copies": len(strengths), "new_tokens": self.config.new_tokens}
        with repair or nullcontext():
            share = self.config.positions != "all"
            ids, counts = generate_continuations(self.model, prompts, context=context, share=share, **size)
        return ids, monitor, counts

    def _measure(
        self,
        condition: Condition,
        prompts: Prompts,
        first: int,
        strengths: list[float],
        ids: Tensor,
        monitor: EditMonitor,
    ) -> pa.Table:
        """The rows of continuations `ids`; `first` is the number of the first of `prompts`."""
        copies = len(strengths)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        repeats = [repetition(row) for row in ids.tolist()]
        scorer = self.priors[self.config.priors[0]]  # one prior scores all, so that scores compare
        off = monitor.off_manifold(scorer, self.layer, self.config.seed).double().numpy()
        steered = condition.method != "none"
        return pa.table(
            {
                **{name: [getattr(condition, name)] * len(texts) for name in ("direction", "method", "prior")},
                "strength": np.tile(strengths, len(prompts)),
                "prompt": np.repeat(np.arange(first, first + len(prompts)), copies),
                "prompt_text": [text for text in prompts.texts for _ in strengths],
                "text": texts,
                "concept": np.asarray(condition.task.judge(texts), np.float64),
                "nll": conditional_nll(self.model, prompts.inputs(), ids, copies=copies),
                **{name: [row[name] for row in repeats] for name in repeats[0]},
                "retention": monitor.retention().double().numpy() if steered else [None] * len(texts),
                **dict(zip(("off_clean", "off_before", "off_after"), off, strict=True)),
                "moved": monitor.moved().double().numpy(),
            },
            schema=SCHEMA,
        )
