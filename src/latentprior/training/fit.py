"""A whole training run in a folder: store or language model -> prior, with exact resume on any number of processes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from latentprior.config import TrainConfig
from latentprior.data.partition import BatchPartition, shards_for
from latentprior.prior.glp import GLP
from latentprior.training.checkpoint import latest
from latentprior.training.parallel import check_float8
from latentprior.training.sources import open_source, stream_source
from latentprior.training.trainer import Trainer
from latentprior.utils.devices import resolve_device
from latentprior.utils.distributed import World, joined
from latentprior.utils.locks import locked_by_first
from latentprior.utils.progress import Report, silent
from latentprior.utils.settings import check_settings


def fit(config: TrainConfig, *, report: Report = silent) -> GLP:
    """Train a prior as `config` says; the same call continues an interrupted run, bit for bit on one process.

    Under torchrun every process makes this call; a run may be continued by another number of processes. Leaves in
    ``config.run.output``: the prior (`GLP.save_pretrained`), ``checkpoints/<activations>`` at doubling counts of
    activations, ``log.jsonl``, ``train.json`` (result), ``steps/`` (training states) and, of a stream,
    ``statistics.safetensors``.

    Raises:
        Diverged: a loss that is not finite; the last saved state is kept.
        Stopped: SIGTERM was received; the state was saved.
    """
    with joined(config.run.device) as world, ExitStack() as held, _sigterm_noted() as stop:
        device = resolve_device(config.run.device)
        for folder in filter(None, (config.run.output, config.stream.record_to)):
            held.enter_context(locked_by_first(folder, world))
        return _fit(config, world, device, report if world.main else silent, stop)


def _fit(config: TrainConfig, world: World, device: torch.device, report: Report, stop: Callable[[], bool]) -> GLP:
    began = time.perf_counter()
    output = Path(config.run.output)
    partition = _partition(config, world)
    if config.run.float8:
        check_float8(device)
    finished = output / "train.json"
    before = json.loads(finished.read_text(encoding="utf-8"))["settings"] if finished.is_file() else None
    if before is not None and config.source == "llm":  # before the language model is loaded
        source, identity = None, _stream_identity(config, before)
    else:
        source = open_source(config, partition, device, stop)
        identity = source.identity | {"hookpoints": [h.place() for h in source.hookpoints]}
    # What decides the weights, the rows included: two runs that agree in this are one run.
    settings = config.settings() | identity | {"lanes": partition.shards}
    if before is not None or source is None:
        check_settings(output, "a finished run", before, settings)
    else:
        trainer = Trainer(config, source, settings, device, report)
        trainer.train(stop)
        trainer.save_result(time.perf_counter() - began)
    return GLP.from_pretrained(output, device=device)


@contextmanager
def _sigterm_noted() -> Iterator[Callable[[], bool]]:
    """While it is open SIGTERM, by which schedulers pre-empt a job, is noted and not obeyed at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _partition(config: TrainConfig, world: World) -> BatchPartition:
    """Of as many document shards as the interrupted run had, or as asked for."""
    batch, shards = config.resolved_recipe().batch_size, config.stream.document_shards
    before = latest(Path(config.run.output, "steps"))
    if shards is None and before is not None:
        shards = before.settings.get("lanes", 1)
    return BatchPartition(batch, shards or shards_for(batch, world.size), world)


def _stream_identity(config: TrainConfig, before: dict[str, Any]) -> dict[str, Any]:
    """A stream's own part of the settings; what only the language model could tell is taken from an earlier run."""
    blocks = before.get("source_of_rows", {}).get("blocks")
    told = {key: before[key] for key in ("hookpoints", "turns") if key in before}
    return {"source_of_rows": stream_source(config) | {"blocks": blocks}} | told
