"""1-D probes by rank statistics against scikit-learn's fitted ones, on the real tasks of a recording.

python benchmarks/bench_probing.py runs/probe/recording runs/prior [--tasks 12] [--parts equality ratio all]

Three parts: do both give the same AUCs; how many times faster are rank statistics for all candidates of a task, folds
and selection included; and how long does probing every meta-neuron of the prior on all recorded tasks take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from latentprior.config import ProbeConfig
from latentprior.data import corpus
from latentprior.prior.loading import priors_of
from latentprior.probe.benchmark import TaskFeatures
from latentprior.probe.recording import Recording
from latentprior.probe.sources import Source, layer_output, meta_neurons, mlp_neurons
from latentprior.probe.tasks import Task, find_task
from latentprior.stats.auc import OneD, class_difference, probe_1d, stratified_folds
from latentprior.stats.logistic import logistic_1d
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator

PARTS = ("equality", "ratio", "all")
MAX_TEST = 500
UNDETERMINED = 1e-6  # standard deviations between the class means: below, the solver's tolerance decides the sign


def measure(
    recording: str,
    prior: str,
    tasks: int = 12,
    features: int = 300,
    candidates: int = 512,
    repeats: int = 3,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Results of the parts; tasks are those all of whose texts `recording` holds, test rows 500 at most."""
    config = ProbeConfig([prior], output="", recording=recording, candidates=candidates)
    held = Recording(recording)
    priors, _ = priors_of([prior], device="cpu", precision=config.precision)
    units = meta_neurons(config, held, priors[prior], prior)
    sources = [layer_output(held), *([mlp_neurons(held)] if held.mlp_hookpoints else []), units]
    found = recorded_tasks(held)
    result: dict[str, Any] = {"benchmark": "probing", "recorded_tasks": len(found)}
    with torch.no_grad():
        if "equality" in parts:
            result["equality"] = equality(found[:tasks], sources, features)
        if "ratio" in parts:
            result["candidates"] = candidates
            result |= time_ratio(TaskFeatures(found[0], units), candidates, repeats)
        if "all" in parts:
            result["all"] = all_units(found, units, config)
    return result


def recorded_tasks(recording: Recording) -> list[Task]:
    found = []
    for name in corpus.binary_tasks():
        task = find_task(name, max_test=MAX_TEST, text="", label="")
        if recording.has(task.used()).all():
            found.append(task)
    if not found:
        raise InputError(f"{recording.folder} holds no whole task")
    return found


def equality(tasks: Sequence[Task], sources: Sequence[Source], features: int) -> dict[str, Any]:
    """The largest differences between both methods over tasks, with as many features drawn from each source.

    Features whose class means are equal in some training part are counted, not compared: their coefficient is zero up
    to the solver's tolerance, so it is that which decides the sign.
    """
    rows = []
    for number, task in enumerate(tasks):
        splits = [TaskFeatures(task, source) for source in sources]
        counts = [len(part) for part in torch.arange(features).tensor_split(len(sources))]
        drawn = [
            torch.randperm(split.x.shape[1], generator=keyed_generator(number, place))[:count]
            for place, (split, count) in enumerate(zip(splits, counts, strict=True))
        ]
        x, x_test = (
            torch.cat([getattr(split, name)[:, units].float() for split, units in zip(splits, drawn, strict=True)], 1)
            for name in ("x", "x_test")
        )
        rows.append({"task": task.name, **compared(x, splits[0].y, x_test, splits[0].y_test)})
    worst = {name: max(row[name] for row in rows) for name in ("validation_difference", "test_difference")}
    totals = {name: sum(row[name] for row in rows) for name in ("features", "undetermined", "other_sign", "same_pick")}
    return {**worst, **totals, "tasks": [row["task"] for row in rows], "of_tasks": rows}


def compared(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> dict[str, Any]:
    """One task's differences, signs that differ, and whether both choose the same feature."""
    ranked, fitted = probe_1d(x, y, candidates=None), logistic_1d(x, y, candidates=None)
    if ranked.units.tolist() != fitted.units.tolist():
        raise RuntimeError("the methods rank the candidates differently")
    determined = smallest_difference(x, y)[ranked.units] > UNDETERMINED
    places = torch.arange(len(ranked.units))
    test = ranked.test_auc(places, x_test, y_test) - fitted.test_auc(places, x_test, y_test)
    validation = ranked.validation_auc - fitted.validation_auc
    return {
        "features": len(places),
        "undetermined": int((~determined).sum()),
        "validation_difference": float(validation[determined].abs().max()),
        "test_difference": float(test[determined].abs().max()),
        "other_sign": int((ranked.sign != fitted.sign)[determined].sum()),
        "same_pick": int(ranked.best() == fitted.best()),
        "test_auc": float(ranked.test_auc(torch.tensor([ranked.best()]), x_test, y_test)),
    }


def smallest_difference(x: Tensor, y: Tensor, folds: int = 5) -> Tensor:
    """[f] least class-mean difference of each feature over all training parts, in its standard deviations."""
    fold = stratified_folds(y, folds)
    parts = [fold != k for k in range(folds + 1)]
    differences = torch.stack([class_difference(x[part], y[part]).abs() for part in parts]).amin(dim=0)
    varies = x.amax(dim=0) > x.amin(dim=0)
    return torch.where(varies, differences / x.double().std(dim=0, correction=0), 0)


def time_ratio(split: TaskFeatures, candidates: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of both on one task and one thread: screening, folds, selection, the chosen one's test AUC.

    A fitted run is too long for others on the machine not to be in the way, so it is not the clock that counts.
    """

    def seconds(method: Any) -> tuple[float, OneD]:
        start = time.process_time()
        probes = method(split.x, split.y, candidates=candidates)
        split.test_aucs(probes, [probes.best()])
        return time.process_time() - start, probes

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            seconds(probe_1d)  # warms up
            slow, fitted = seconds(logistic_1d)
            runs = [seconds(probe_1d) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    fast = min(run[0] for run in runs)
    return {
        "units": split.x.shape[1],
        "seconds": round(fast, 4),
        "seconds_logistic": round(slow, 2),
        "ratio": round(slow / fast, 1),
        "same_pick": runs[0][1].best() == fitted.best(),
        "threads": 1,
    }


def all_units(tasks: Sequence[Task], units: Source, config: ProbeConfig) -> dict[str, Any]:
    """Seconds for every meta-neuron on all tasks, the choice among the screened and among all, and their test AUCs."""
    computing = probing = 0.0
    screened, chosen = [], []
    for task in tasks:
        start = time.perf_counter()
        split = TaskFeatures(task, units)
        had = time.perf_counter()
        probes = probe_1d(split.x, split.y, candidates=None, folds=config.folds)
        of_screened, of_all = split.test_aucs(probes, [probes.best(config.candidates), probes.best()])
        probing += time.perf_counter() - had
        computing += had - start
        screened.append(of_screened)
        chosen.append(of_all)
    return {
        "tasks": len(tasks),
        "units": units.units,
        "seconds_units": round(computing, 1),
        "seconds_probing": round(probing, 2),
        "threads": torch.get_num_threads(),
        "mean_test_auc_screened": sum(screened) / len(screened),
        "mean_test_auc_all": sum(chosen) / len(chosen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="folder of activations that `latentprior probe` recorded")
    parser.add_argument("prior", help="folder of a prior of the same hookpoint")
    parser.add_argument("--tasks", type=int, default=12, help="tasks of the equality part (default: %(default)s)")
    parser.add_argument("--features", type=int, default=300, help="features of each of them (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=512, help="features that are timed (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of ours; the fastest counts (default: 3)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
