"""A steering experiment from its configuration: `latentprior steer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from latentprior.config import SteerConfig, to_dict
from latentprior.judge.endpoint import endpoint_of
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.prior.loading import packages_of, priors_of
from latentprior.steer.conditions import finished, losses_of, write_rows
from latentprior.steer.direction import write_direction
from latentprior.steer.frontier import summarise
from latentprior.steer.rate import rate_texts
from latentprior.steer.repairs import PriorRepair
from latentprior.steer.runner import Runner, run_conditions
from latentprior.steer.tasks import SteeringTask, check_named, steering_tasks
from latentprior.utils.errors import InputError
from latentprior.utils.files import check_folder, replace_json
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, unseen
from latentprior.utils.provenance import stamp
from latentprior.utils.results import Result

ROWS = "summary.directions.methods.points"  # what a result is as a table
SHOWN = ("direction", "method", "prior", "strength", "prompt_text", "text", "concept", "nll")  # on the page


def steer(config: SteerConfig, *, phase: Phase = unseen) -> Result:
    """Load the language model and run the experiment."""
    return experiment(config, lambda: load_llm(config.llm, config.device), phase=phase)


def experiment(config: SteerConfig, llm: Callable[[], tuple[Any, Any]], *, phase: Phase = unseen) -> Result:
    """Run the experiment and write ``results.parquet`` and ``steer.json`` into ``config.output``.

    Everything that is there already is kept: the same call continues an interrupted one, and opens a finished one.
    `llm` gives the language model and its tokenizer; it is called when the rest is found to be in order.
    """
    check_folder(config.output)
    priors, hookpoint = load_priors(config)
    endpoint = endpoint_of(config.judge, Path(config.output) / "ratings.jsonl")
    directions = check_named(config, hookpoint)
    with locked(config.output) as folder:
        if result := finished(config, priors, directions, folder):
            return Result(result, table=ROWS)
        began, first = time.perf_counter(), priors[config.priors[0]]
        model, tokenizer = llm()
        hookpoint.check(model)
        with torch.random.fork_rng(devices=[]):
            tasks = steering_tasks(config, model, tokenizer, hookpoint)
        for direction in (task.direction for task in tasks):
            slug = "".join(c if c.isalnum() else "-" for c in direction.name)
            write_direction(direction, folder / "directions" / f"{slug}.safetensors")
        runner = Runner(config, model, tokenizer, priors, first.normalizer.norm_unit(config.layer), config.layer)
        table = run_conditions(runner, tasks, folder / "cells", report=phase("steer"))
        table, ratings = rate_texts(config, endpoint, table, tasks, phase)
        write_rows(table, folder / "results.parquet")
        result = {
            "kind": "frontier",
            "experiment": config.experiment,
            "hookpoint": hookpoint.to_dict(),
            "mean_norm": runner.mean_norm,
            "summary": summarise(table, seed=config.seed),
            "repairs": _repairs(config, first),
            "priors": losses_of(priors),
            "judges": {task.direction.name: task.judged_by for task in tasks},
            "directions": _described(tasks),
            "ratings": ratings,
            "texts": table.filter(pc.field("prompt") < config.examples).select(SHOWN).to_pylist(),
        }
        spent, packages = time.perf_counter() - began, packages_of(priors.values())
        result |= stamp(to_dict(config), seed=config.seed, wall_seconds=spent, packages=packages)
        replace_json(folder / "steer.json", result)
    return Result(result, table=ROWS)


def load_priors(config: SteerConfig) -> tuple[dict[str, GLP], Hookpoint]:
    """The priors by the names they were given, and the one hookpoint that they repair; all know its mean norm."""
    priors, hookpoint = priors_of(config.priors, layer=config.layer, device=config.device, precision=config.precision)
    for name, glp in priors.items():
        if not float(glp.normalizer.mean_norm[glp.normalizer.rows(config.layer)]) > 0:
            raise InputError(f"{name} does not know its layer's mean activation norm, the unit of strength")
    return priors, hookpoint


def _repairs(config: SteerConfig, glp: GLP) -> dict[str, Any]:
    repairs = {method: repair for method in config.methods if (repair := config.repair_of(method)) is not None}
    return {method: to_dict(repair) | {"nfe": PriorRepair(glp, repair).nfe} for method, repair in repairs.items()}


def _described(tasks: Sequence[SteeringTask]) -> list[dict[str, Any]]:
    return [
        {"name": d.name, "kind": d.kind, "norm": d.norm, "concept": task.concept, "provenance": d.provenance}
        for task in tasks
        for d in [task.direction]
    ]
