"""A whole training run in a folder: store or language model -> prior, with exact resume on any number of processes."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentprior.config import TrainConfig, to_dict
from latentprior.data.partition import Batch, Deal, lanes_for
from latentprior.data.store.reader import ActivationStore
from latentprior.lm.hooks import same_places
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.training.checkpoint import Saved, changed_setting, latest, load_state
from latentprior.training.loop import Exhausted, State, train
from latentprior.training.optim import initialise
from latentprior.training.parallel import check_float8, placed
from latentprior.training.run import Run
from latentprior.training.sources import STREAM_ONLY, Feed, open_feed, stream_source
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.distributed import World, joined
from latentprior.utils.errors import InputError, Stopped
from latentprior.utils.files import replace_text
from latentprior.utils.locks import locked_by_first
from latentprior.utils.progress import Report, silent
from latentprior.utils.provenance import stamp
from latentprior.utils.random import generator_of

CPU_MICRO_BATCH = 1024
IRRELEVANT = (
    *("source", "store", "follow", "wait_seconds", "heldout", "output", "heldout_activations", "log_every"),
    *("save_seconds", "track", "device", "preset", "parallel", "compile", "buffer_device", "lanes", "record_to"),
    "disk_budget",
)
"""Options that do not change the weights, or that the feed's identity stands for."""


def fit(config: TrainConfig, *, report: Report = silent) -> GLP:
    """Train a prior as `config` says; the same call continues an interrupted run, bit for bit on one process.

    Under torchrun every process makes this call; a run may be continued by another number of processes. Leaves in
    ``config.output``: the prior (`GLP.save_pretrained`), ``checkpoints/<activations>`` at doubling counts of
    activations, ``log.jsonl``, ``train.json`` (result), ``steps/`` (training states) and, of a stream,
    ``statistics.safetensors``.

    Args:
        config: what to train on what.
        report: gets activations done and in all, with the latest losses.

    Returns:
        the prior, on the device it was trained on.

    Raises:
        InputError: an unusable store, model or text, held-out activations of another hookpoint, a folder with another
            run, or one that another process trains in.
        Diverged: a loss that is not finite; the last saved state is kept.
        Stopped: SIGTERM was received; the state was saved.
    """
    with joined(config.device) as world, ExitStack() as held, _sigterm() as stop:
        for folder in filter(None, (config.output, config.record_to)):
            held.enter_context(locked_by_first(folder, world))
        return _fit(config, world, report if world.main else silent, stop)


def _fit(config: TrainConfig, world: World, report: Report, stop: Callable[[], bool]) -> GLP:
    began = time.perf_counter()
    recipe = config.resolved_recipe()
    device = resolve_device(config.device)
    output = Path(config.output)
    deal = Deal(recipe.batch_size, _lanes(config, latest(output / "steps"), world), world)
    if config.float8:
        check_float8(device)
    before = _finished_settings(output)
    if before is not None and config.source == "llm":  # before the language model is loaded
        return _finished(output, before, _settings(config, deal, _stream_settings(config, before)), device)
    feed = open_feed(config, deal, device, stop)
    settings = _settings(config, deal, feed.identity | {"hookpoints": [h.place() for h in feed.hookpoints]})
    if before is not None:
        return _finished(output, before, settings, device)
    saved = latest(output / "steps", settings)  # refuses the state of another run
    heldout = _heldout_store(config, feed)

    normalizer = feed.normalizer(recipe).to(device)
    if config.heldout is None:
        heldout = feed.heldout(config.heldout_activations)
    precision = fast_dtype(device) if config.precision == "auto" else getattr(torch, config.precision)
    state = _placed_state(config, feed, world, device, precision)
    if saved is not None:
        load_state(saved, state, world)
    position = saved.position if saved else None
    steps = math.ceil(config.activations / recipe.batch_size)
    run = Run(config, feed, normalizer, heldout, precision, settings, deal, report, steps)
    run.start(state, position)
    feed.save = lambda: run.save(state)
    try:
        train(
            state,
            normalizer,
            feed.batches(state.step, position["feed"] if position else None),
            recipe,
            steps=steps,
            precision=precision,
            micro_batch=config.micro_batch or (CPU_MICRO_BATCH if device.type == "cpu" else None),
            seed=config.seed,
            deal=deal,
            after_step=run.after_step,
            stop=stop,
        )
    except Exhausted as ended:
        if config.source == "store" and not config.follow or not state.step:
            raise
        run.end_early(state, str(ended))
    except Stopped:
        if state.step:
            run.save(state)
        raise
    finally:
        run.close()
    feed.close()
    run.save_prior(state, output)
    result = stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
    result |= {
        "kind": "train",
        "settings": settings,
        "summary": run.summary(),
        "seconds": run.seconds(),
        "processes": world.size,
    }
    if world.main:
        replace_text(output / "train.json", json.dumps(result, indent=2) + "\n")
    world.wait()
    return GLP.from_pretrained(output, device=device)


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
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


def _lanes(config: TrainConfig, before: Saved | None, world: World) -> int:
    """As many lanes as the interrupted run had, or as asked for."""
    batch = config.resolved_recipe().batch_size
    if config.lanes is None and before is not None:
        return before.settings.get("lanes", 1)
    return config.lanes or lanes_for(batch, world.size)


def _placed_state(config: TrainConfig, feed: Feed, world: World, device: torch.device, precision: torch.dtype) -> State:
    """The state to start from, with seeded initial weights; the global generator is left as it was."""
    recipe = config.resolved_recipe()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed: that would seed GPUs, too
        denoiser = Denoiser(config.denoiser(feed.hookpoints[0].width, feed.blocks))
    initialise(denoiser, recipe, generator_of(config.seed))
    denoiser = denoiser.to(device)
    model = placed(
        denoiser,
        world,
        parallel=config.parallel,
        precision=precision,
        compiled=config.compile == "on" or (config.compile == "auto" and device.type == "cuda"),
        float8=config.float8,
    )
    return State.start(denoiser, recipe, model)


def _settings(config: TrainConfig, deal: Deal, of_feed: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights: two runs that agree in this are one run."""
    values = to_dict(replace(config, recipe=to_dict(config.resolved_recipe())))
    for key in (*IRRELEVANT, *STREAM_ONLY):
        del values[key]
    values |= of_feed | {"lanes": deal.lanes}
    return json.loads(json.dumps(values))  # tuples to lists, as the saved settings come back


def _stream_settings(config: TrainConfig, before: dict[str, Any]) -> dict[str, Any]:
    """A stream's own part of the settings; what only the language model could tell is taken from an earlier run."""
    blocks = before.get("source_of_rows", {}).get("blocks")
    told = {key: before[key] for key in ("hookpoints", "turns") if key in before}
    return {"source_of_rows": stream_source(config) | {"blocks": blocks}} | told


def _heldout_store(config: TrainConfig, feed: Feed) -> Batch | None:
    """Activations of a held-out store, the same at every call, and their layers."""
    if config.heldout is None:
        return None
    heldout = ActivationStore(config.heldout)
    layers = [h.layer for h in feed.hookpoints] if config.layers else heldout.layers
    if not same_places([h for h in heldout.hookpoints if h.layer in layers], feed.hookpoints):
        raise InputError(f"{config.heldout} was recorded at other hookpoints than the activations to train on")
    size = min(config.heldout_activations, len(heldout.rows_at(layers)))
    return Batch(*next(heldout.batches(size, seed=0, layers=layers)))


def _finished_settings(output: Path) -> dict[str, Any] | None:
    """The settings of the run that is complete in `output`, if there is one."""
    path = output / "train.json"
    return json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() else None


def _finished(output: Path, before: dict[str, Any], settings: dict[str, Any], device: torch.device) -> GLP:
    """The prior of a run that was complete already."""
    if difference := changed_setting(before, settings):
        raise InputError(f"{output} holds a finished run with {difference}: choose another output")
    return GLP.from_pretrained(output, device=device)
