"""A steering experiment from its configuration: `latentprior steer`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from latentprior.config import SteerConfig, to_dict
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.prior.loading import priors_of
from latentprior.steer.direction import write_direction
from latentprior.steer.frontier import summarise
from latentprior.steer.rate import Rater, rater_of
from latentprior.steer.repairs import PriorRepair
from latentprior.steer.runner import Bench, finished, losses_of, run_cells
from latentprior.steer.tasks import Case, cases_of, check_named
from latentprior.utils.errors import InputError
from latentprior.utils.files import check_folder, replace_text, replaced
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, unseen
from latentprior.utils.provenance import stamp


def steer(config: SteerConfig, *, phase: Phase = unseen) -> dict[str, Any]:
    """Load the language model and run the experiment (`experiment`).

    Raises:
        InputError: what `experiment` refuses, as far as it can be told without the model before that is loaded.
    """
    return experiment(config, lambda: load_llm(config.llm, config.device), phase=phase)


def experiment(config: SteerConfig, llm: Callable[[], tuple[Any, Any]], *, phase: Phase = unseen) -> dict[str, Any]:
    """Run the experiment and write ``results.parquet`` and ``steer.json`` into ``config.output``.

    Everything that is there already is kept: the same call continues an interrupted one, and opens a finished one.

    Args:
        llm: gives the language model of ``config.llm`` and its tokenizer; called when the rest is found to be in order.

    Returns:
        what is in ``steer.json``: the frontiers with their intervals, what each repair costs, the judges, the
        directions, and some texts.

    Raises:
        InputError: a prior that cannot be read or knows no mean norm, priors of different layers, a missing key of the
            judge; directions that are not there or do not fit; a folder that another process writes, or that holds an
            experiment with other settings.
    """
    check_folder(config.output)
    priors, hookpoint = load_priors(config)
    rate = rater_of(config)  # a missing key is found before the model is loaded
    directions = check_named(config, hookpoint)
    with locked(config.output) as folder:
        result = finished(config, priors, directions, folder)
        return result or _run(config, llm, priors, hookpoint, rate, phase)


def _run(
    config: SteerConfig,
    llm: Callable[[], tuple[Any, Any]],
    priors: dict[str, GLP],
    hookpoint: Hookpoint,
    rate: Rater,
    phase: Phase,
) -> dict[str, Any]:
    """The experiment in a folder that is this process's alone."""
    began = time.perf_counter()
    model, tokenizer = llm()
    hookpoint.check(model)
    row = next(iter(priors.values())).normalizer.rows(config.layer)
    mean_norm = float(next(iter(priors.values())).normalizer.mean_norm[row])
    folder = Path(config.output)
    with torch.random.fork_rng(devices=[]):
        cases = cases_of(config, model, tokenizer, hookpoint)
    for case in cases:
        write_direction(case.direction, folder / "directions" / f"{_slug(case.direction.name)}.safetensors")
    bench = Bench(config, model, tokenizer, priors, mean_norm, config.layer)
    table = run_cells(bench, cases, folder / "cells", report=phase("steer"))
    table, ratings = rate(table, cases, phase)
    with replaced(folder / "results.parquet") as partial:
        pq.write_table(table, partial, compression="zstd")
    result = {
        "kind": "frontier",
        "experiment": config.experiment,
        "hookpoint": hookpoint.to_dict(),
        "mean_norm": mean_norm,
        "summary": summarise(table, seed=config.seed),
        "repairs": _repairs(config, priors),
        "priors": losses_of(priors),
        "judges": {case.direction.name: case.judged_by for case in cases},
        "directions": [_described(case) for case in cases],
        "ratings": ratings,
        "texts": examples(table, config.examples),
    }
    result |= stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
    replace_text(folder / "steer.json", json.dumps(result, indent=1) + "\n")
    return result


def load_priors(config: SteerConfig) -> tuple[dict[str, GLP], Hookpoint]:
    """The priors by the names they were given, and the one hookpoint that they repair.

    Raises:
        InputError: a prior without hookpoint or mean norm, or priors of different hookpoints.
    """
    priors, hookpoint = priors_of(config.priors, layer=config.layer, device=config.device, precision=config.precision)
    for name, glp in priors.items():
        if not float(glp.normalizer.mean_norm[glp.normalizer.rows(config.layer)]) > 0:
            raise InputError(f"{name} does not know its layer's mean activation norm, the unit of strength")
    return priors, hookpoint


def _repairs(config: SteerConfig, priors: dict[str, GLP]) -> dict[str, Any]:
    """What each method's repair is, and its denoiser evaluations for each activation."""
    glp = next(iter(priors.values()))
    found = {}
    for method in config.methods:
        if (repair := config.repair_of(method)) is not None:
            found[method] = to_dict(repair) | {"nfe": PriorRepair(glp, repair).nfe}
    return found


def _described(case: Case) -> dict[str, Any]:
    direction = case.direction
    return {
        "name": direction.name,
        "kind": direction.kind,
        "norm": direction.norm,
        "concept": case.concept,
        "provenance": direction.provenance,
    }


def examples(table: pa.Table, prompts: int) -> list[dict[str, Any]]:
    """The rows of the first prompts, without the figures that the page does not show."""
    shown = ("direction", "method", "prior", "strength", "prompt_text", "text", "concept", "nll")
    return table.filter(pc.field("prompt") < prompts).select(shown).to_pylist()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
