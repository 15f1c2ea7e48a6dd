"""One task, all sources: what every feature's probe says, as JSON-ready values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from latentprior.config import ProbeConfig
from latentprior.probe.sources import Draws, Source
from latentprior.probe.tasks import Task
from latentprior.stats.auc import OneD, probe_1d
from latentprior.stats.logistic import logistic_1d, sparse_probe
from latentprior.utils.random import keyed_generator

TOP_UNITS = 20  # of each task and source that are kept
SCREENED, ALL, CHANCE = "screened", "all", "chance"
Json = dict[str, Any]


class TaskFeatures:
    """Features of a task's training and test rows, with their labels."""

    def __init__(self, task: Task, source: Source) -> None:
        features = source.features(task.used())
        self.x, self.x_test = features[: len(task.train)], features[len(task.train) :]
        sides = (task.labels[task.train], task.labels[task.test])
        self.y, self.y_test = (torch.from_numpy(labels).to(features.device) for labels in sides)

    def test_aucs(self, probes: OneD, indices: Sequence[int]) -> list[float]:
        return probes.test_auc(torch.tensor(indices, device=self.x.device), self.x_test, self.y_test).tolist()


class Probes(NamedTuple):
    """1-D probes of a source's features on one task."""

    units: OneD
    chance: OneD | None
    """Those of permuted training labels; fitted probes have none."""


def probe_task(
    task: Task, sources: Sequence[Source], maps: Sequence[Source], config: ProbeConfig, draws: Draws | None = None
) -> Json:
    """Probe every source on one task; `maps` are the first prior at the noise levels of the map by block and t.

    Returns:
        `rows`: for each source and selection, and each of `draws`, the chosen unit with its AUC; `winners`: the top
        units; `blocks`: the AUC by block of the MLP neurons; `map`: that of each of `maps`; `sparse`: k-sparse and
        dense probes.
    """
    result: Json = {"task": task.name, "family": task.family, "train": len(task.train), "test": len(task.test)}
    result |= {name: [] for name in ("rows", "winners", "blocks", "map", "sparse")}
    seconds = {"features": 0.0, "probes": 0.0, "sparse": 0.0}
    for source in (*sources, *maps):
        with _timed(seconds, "features"):
            features = TaskFeatures(task, source)
        with _timed(seconds, "probes"):
            if source in maps:
                probes = probe_1d(features.x, features.y, candidates=None, folds=config.folds)
                result["map"].append(_by_block(probes, features, source, config))
                continue
            _probe_source(task, source, features, config, result, draws if draws and draws.source is source else None)
        with _timed(seconds, "sparse"):
            result["sparse"] += _sparse(source, features, config)
    return result | {"seconds": seconds}


def add_draws(result: Json, task: Task, draws: Draws, config: ProbeConfig) -> bool:
    """Add the draws that `result` of `probe_task` lacks, since its run had fewer or none; False if it lacks none."""
    there = {row["draw"] for row in result["rows"] if row["source"] == draws.name}
    subsets = {draw: subset for draw, subset in enumerate(draws.subsets()) if draw not in there}
    if not subsets:
        return False
    with _timed(result["seconds"], "features"):
        features = TaskFeatures(task, draws.source)
    with _timed(result["seconds"], "probes"):
        probes = _probes(task, features, config, torch.stack(list(subsets.values())))
        for draw, subset in subsets.items():
            result["rows"] += _draw_rows(draws, draw, subset, probes, features, config)
    return True


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


def _probe_source(
    task: Task, source: Source, features: TaskFeatures, config: ProbeConfig, result: Json, draws: Draws | None
) -> None:
    """Add the rows, top units and blocks of the source, and the rows of draws from it, to `result`."""
    subsets = draws.subsets() if draws else None
    probes = _probes(task, features, config, subsets)
    for selection, found in _chosen(probes, features, source, config):
        result["rows"].append({"source": source.name, "selection": selection, **found})
    if draws and subsets is not None:
        for draw, subset in enumerate(subsets):
            result["rows"] += _draw_rows(draws, draw, subset, probes, features, config)
    if source.name == "mlp-neurons" and config.method == "rank":
        result["blocks"] = _by_block(probes.units, features, source, config)
    # Fitted are only candidates: this source's come first, those that only a draw has come after.
    validation = probes.units.validation_auc[: config.candidates if config.method == "logistic" else None]
    top = validation.argsort(descending=True, stable=True)[:TOP_UNITS].tolist()
    for rank, found in enumerate(_describe(probes.units, top, features, source)):
        result["winners"].append({"source": source.name, "rank": rank, **found})


def _probes(
    task: Task, features: TaskFeatures, config: ProbeConfig, subsets: Bool[Tensor, "s f"] | None = None
) -> Probes:
    """Probes among which `_chosen` can choose, also from each of `subsets` of the features."""
    subsets = None if subsets is None else subsets.to(features.x.device)
    options: dict[str, Any] = {"folds": config.folds, "subsets": subsets}
    if config.method == "logistic":
        return Probes(logistic_1d(features.x, features.y, candidates=config.candidates, **options), None)
    key = int.from_bytes(blake2b(task.name.encode(), digest_size=8).digest())  # another order for every task
    order = torch.randperm(len(task.train), generator=keyed_generator(config.seed, key))
    shuffled = features.y[order.to(features.y.device)]
    units = probe_1d(features.x, features.y, candidates=None, **options)
    return Probes(units, probe_1d(features.x, shuffled, candidates=config.candidates, **options))


def _chosen(
    probes: Probes, features: TaskFeatures, source: Source, config: ProbeConfig, among: Tensor | None = None
) -> Iterator[tuple[str, Json]]:
    """Each selection with the unit that it chooses, of all or of those `among` [f] bool."""
    units, chance = probes
    chosen = {SCREENED: (units, units.best(config.candidates, among))}
    if chance is not None:
        chosen[ALL] = (units, units.best(None, among))
        chosen[CHANCE] = (chance, chance.best(config.candidates, among))
    for selection, (found, index) in chosen.items():
        (described,) = _describe(found, [index], features, source)
        yield selection, described


def _draw_rows(
    draws: Draws, draw: int, subset: Tensor, probes: Probes, features: TaskFeatures, config: ProbeConfig
) -> Iterator[Json]:
    for selection, found in _chosen(probes, features, draws.source, config, subset.to(features.x.device)):
        yield {"source": draws.name, "selection": selection, **found, "draw": draw}


def _describe(probes: OneD, indices: Sequence[int], features: TaskFeatures, source: Source) -> list[Json]:
    found = []
    for candidate, auc in zip(indices, features.test_aucs(probes, indices), strict=True):
        t, block, index = source.locate(int(probes.units[candidate]))
        aucs = {"test_auc": auc, "validation_auc": float(probes.validation_auc[candidate])}
        found.append(aucs | {"block": block, "index": index, "t": t, "sign": int(probes.sign[candidate])})
    return found


def _by_block(probes: OneD, features: TaskFeatures, source: Source, config: ProbeConfig) -> list[float]:
    """Test AUC of the unit that is chosen among the screened ones of each block."""
    blocks = torch.arange(source.units, device=probes.units.device) // source.width
    chosen = [probes.best(config.candidates, blocks == block) for block in range(source.blocks)]
    return features.test_aucs(probes, chosen)


def _sparse(source: Source, features: TaskFeatures, config: ProbeConfig) -> Iterator[Json]:
    for k in (*config.sparse, *([None] if config.dense else [])):
        if k is None or k <= source.units:
            fitted = sparse_probe(features.x, features.y, features.x_test, features.y_test, k=k, folds=config.folds)
            yield {"source": source.name, "k": k, "test_auc": fitted.test_auc, "validation_auc": fitted.validation_auc}
