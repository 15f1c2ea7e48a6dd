"""One task, all sources: what every feature's probe says, as JSON-ready values."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch

from latentprior.config import ProbeConfig
from latentprior.probe.sources import Source
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


def probe_task(task: Task, sources: Sequence[Source], maps: Sequence[Source], config: ProbeConfig) -> Json:
    """Probe every source on one task; `maps` are the first prior at the noise levels of the map by block and t.

    Returns:
        `rows`: for each source and selection the chosen unit with its AUC; `winners`: the top units; `blocks`: the
        AUC by block of the MLP neurons; `map`: that of each of `maps`; `sparse`: k-sparse and dense probes.
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
            _probe_source(task, source, features, config, result)
        with _timed(seconds, "sparse"):
            result["sparse"] += _sparse(source, features, config)
    return result | {"seconds": seconds}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


def _probe_source(task: Task, source: Source, features: TaskFeatures, config: ProbeConfig, result: Json) -> None:
    """Add the source's rows, top units and blocks to `result`."""
    if config.method == "logistic":
        units: OneD = logistic_1d(features.x, features.y, candidates=config.candidates, folds=config.folds)
        chosen = {SCREENED: (units, units.best())}
    else:
        units = probe_1d(features.x, features.y, candidates=None, folds=config.folds)
        key = int.from_bytes(blake2b(task.name.encode(), digest_size=8).digest())  # another order for every task
        order = torch.randperm(len(task.train), generator=keyed_generator(config.seed, key))
        shuffled = features.y[order.to(features.y.device)]
        chance = probe_1d(features.x, shuffled, candidates=config.candidates, folds=config.folds)
        screened = units.best(config.candidates)
        chosen = {SCREENED: (units, screened), ALL: (units, units.best()), CHANCE: (chance, chance.best())}
        if source.name == "mlp-neurons":
            result["blocks"] = _by_block(units, features, source, config)
    for selection, (probes, index) in chosen.items():
        (found,) = _describe(probes, [index], features, source)
        result["rows"].append({"source": source.name, "selection": selection, **found})
    top = units.validation_auc.argsort(descending=True, stable=True)[:TOP_UNITS].tolist()
    for rank, found in enumerate(_describe(units, top, features, source)):
        result["winners"].append({"source": source.name, "rank": rank, **found})


def _describe(probes: OneD, indices: Sequence[int], features: TaskFeatures, source: Source) -> list[Json]:
    found = []
    for candidate, auc in zip(indices, features.test_aucs(probes, indices), strict=True):
        t, block, index = source.locate(int(probes.units[candidate]))
        aucs = {"test_auc": auc, "validation_auc": float(probes.validation_auc[candidate])}
        found.append(aucs | {"block": block, "index": index, "t": t, "sign": int(probes.sign[candidate])})
    return found


def _by_block(probes: OneD, features: TaskFeatures, source: Source, config: ProbeConfig) -> list[float]:
    """Test AUC of the unit that is chosen among the screened ones of each block."""
    blocks = probes.units // source.width
    chosen = []
    for block in range(source.blocks):
        indices = (blocks == block).nonzero().squeeze(1)[: config.candidates]
        chosen.append(int(indices[probes.validation_auc[indices].argmax()]))
    return features.test_aucs(probes, chosen)


def _sparse(source: Source, features: TaskFeatures, config: ProbeConfig) -> Iterator[Json]:
    for k in (*config.sparse, *([None] if config.dense else [])):
        if k is None or k <= source.units:
            fitted = sparse_probe(features.x, features.y, features.x_test, features.y_test, k=k, folds=config.folds)
            yield {"source": source.name, "k": k, "test_auc": fitted.test_auc, "validation_auc": fitted.validation_auc}
