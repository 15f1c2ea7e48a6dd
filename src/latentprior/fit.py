"""A whole training run in a folder: store -> prior, with log, held-out loss, checkpoints and exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.checkpoint import changed_setting, load_latest, save_state
from latentprior.config import TrainConfig, to_dict
from latentprior.denoiser import Denoiser
from latentprior.errors import InputError
from latentprior.files import replace_text
from latentprior.llm import fast_dtype, resolve_device
from latentprior.normalizer import Normalizer
from latentprior.prior import GLP
from latentprior.progress import Report, silent
from latentprior.provenance import stamp, versions
from latentprior.store import ActivationStore
from latentprior.track import Log, read_log
from latentprior.train import State, heldout_loss, train

FIRST_CHECKPOINT = 2**16  # activations; then at every doubling
CPU_MICRO_BATCH = 1024


def fit(config: TrainConfig, *, report: Report = silent) -> GLP:
    """Train a prior on an activation store as `config` says; the same call continues an interrupted run.

    Leaves in ``config.output``: the prior (`GLP.save_pretrained`), ``checkpoints/<activations>`` at doubling counts
    of activations, ``log.jsonl``, ``train.json`` (result) and ``steps/`` (training states).

    Args:
        config: what to train on what.
        report: gets activations done and in all, with the latest losses.

    Raises:
        InputError: an unusable store, held-out activations of another hookpoint, or a folder with another run.
        Diverged: a loss that is not finite; the last saved state is kept.
    """
    began = time.perf_counter()
    recipe = config.resolved_recipe()
    device = resolve_device(config.device)
    precision = fast_dtype(device) if config.precision == "auto" else getattr(torch, config.precision)
    store = ActivationStore(config.store)
    heldout = _heldout_rows(config, store)
    output = Path(config.output)
    settings = _settings(config, store)
    if (output / "train.json").is_file():
        return _finished(output, settings)

    normalizer = Normalizer.from_moments(store.moments()).to(device)
    denoiser = initial_denoiser(config, store).to(device)
    state = State.start(denoiser, recipe)
    resumed = load_latest(output / "steps", state, settings)
    batches = store.batches(recipe.batch_size, seed=config.seed, start=state.step)
    steps = math.ceil(config.activations / recipe.batch_size)
    output.mkdir(parents=True, exist_ok=True)
    log = Log(output / "log.jsonl", track=config.track, config=to_dict(config), resume_step=state.step)
    run = _Run(config, store, normalizer, heldout, precision, settings, log, report, steps)
    try:
        if resumed:
            run.restore(state)
        else:
            run.evaluate(state)
        train(
            state,
            normalizer,
            batches,
            recipe,
            steps=steps,
            precision=precision,
            micro_batch=config.micro_batch or (CPU_MICRO_BATCH if device.type == "cpu" else None),
            seed=config.seed,
            after_step=run.after_step,
        )
    finally:
        log.close()
    glp = run.prior(state)
    glp.save_pretrained(output)
    result = stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
    result |= {"kind": "train", "settings": settings, "summary": run.summary(state)}
    replace_text(output / "train.json", json.dumps(result, indent=2) + "\n")
    return glp.eval().requires_grad_(False)  # as it comes back from the folder


def initial_denoiser(config: TrainConfig, store: ActivationStore) -> Denoiser:
    """A denoiser with seeded initial weights; the global generator is left as it was."""
    blocks = store.manifest["source"].get("blocks") if len(store.layers) > 1 else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed: that would seed GPUs, too
        return Denoiser(config.denoiser(store.width, blocks))


class _Run:
    """What happens beside the steps of one run: held-out loss, log, checkpoints, saved states."""

    def __init__(
        self,
        config: TrainConfig,
        store: ActivationStore,
        normalizer: Normalizer,
        heldout: tuple[Tensor, Tensor | None] | None,
        precision: torch.dtype,
        settings: dict[str, Any],
        log: Log,
        report: Report,
        steps: int,
    ) -> None:
        self.config, self.store, self.normalizer, self.heldout = config, store, normalizer, heldout
        self.precision, self.settings, self.log, self.report, self.steps = precision, settings, log, report, steps
        self.batch = config.resolved_recipe().batch_size
        self.output = Path(config.output)
        self.shown: dict[str, Any] = {}
        self.last_evaluation: dict[str, Any] = {}
        self.window: list[float] = []
        self.saved_at = time.monotonic()
        self.logged_at, self.logged_step = time.monotonic(), 0

    def restore(self, state: State) -> None:
        """Take over what an interrupted run had found when it saved `state`."""
        self.logged_step = state.step
        for line in read_log(self.output / "log.jsonl"):
            if "heldout_loss" in line:
                self._evaluated({key: line[key] for key in ("heldout_loss", "heldout_loss_by_t")})

    def after_step(self, state: State, figures: dict[str, float]) -> None:
        done = state.step * self.batch
        last = state.step == self.steps
        self.window.append(figures["loss"])
        if state.step % self.config.log_every == 0 or last:
            self._log(state, figures)
        if last or done in self._due(state.step):
            self.evaluate(state)
            if not last:
                self.prior(state).save_pretrained(self.output / "checkpoints" / str(done))
        if last or time.monotonic() - self.saved_at > self.config.save_seconds:
            save_state(self.output / "steps", state, self.settings)
            self.saved_at = time.monotonic()
        self.report(min(done, self.config.activations), self.config.activations, self.shown)

    def _log(self, state: State, figures: dict[str, float]) -> None:
        now = time.monotonic()
        rate = (state.step - self.logged_step) * self.batch / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_step = now, state.step
        loss = sum(self.window) / len(self.window)
        self.window.clear()
        self.shown["loss"] = loss
        self.log.write(
            {"step": state.step, "activations": state.step * self.batch, **figures, "loss": loss, "per_second": rate}
        )

    def _due(self, step: int) -> Iterator[int]:
        """The checkpoint counts that this step is the first to reach, as this step's count."""
        before, done = (step - 1) * self.batch, step * self.batch
        count = FIRST_CHECKPOINT
        while count <= done:
            if count > before:
                yield done
            count *= 2

    def evaluate(self, state: State) -> None:
        """Held-out loss of the weights that would be saved now."""
        if self.heldout is None:
            return
        loss, by_t = heldout_loss(state.evaluated(), self.normalizer, *self.heldout, precision=self.precision)
        self._evaluated({"heldout_loss": loss, "heldout_loss_by_t": by_t})
        self.log.write({"step": state.step, "activations": state.step * self.batch, **self.last_evaluation})

    def _evaluated(self, figures: dict[str, Any]) -> None:
        self.shown["held-out"] = figures["heldout_loss"]
        self.last_evaluation = figures

    def prior(self, state: State) -> GLP:
        provenance = {
            "source": self.store.manifest["source"],
            "training": {"settings": self.settings, **self.summary(state)},
            "versions": versions(),
        }
        return GLP(state.evaluated(), self.normalizer, self.store.hookpoints, provenance)

    def summary(self, state: State) -> dict[str, Any]:
        return {"activations": state.step * self.batch, "distinct": len(self.store), **self.last_evaluation}


def _settings(config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    """What decides the weights: two runs that agree in this are one run."""
    values = to_dict(replace(config, recipe=to_dict(config.resolved_recipe())))
    for key in ("output", "heldout", "heldout_activations", "log_every", "save_seconds", "track", "device", "preset"):
        del values[key]
    values["store"] = store.manifest["statistics"]["sha256"]  # by its rows: the folder may move
    values["rows"] = len(store)
    values["hookpoints"] = [h.to_dict() for h in store.hookpoints]
    return json.loads(json.dumps(values))  # tuples to lists, as the saved settings come back


def _heldout_rows(config: TrainConfig, store: ActivationStore) -> tuple[Tensor, Tensor | None] | None:
    """Held-out activations, the same at every call, and their layers."""
    if config.heldout is None:
        return None
    heldout = ActivationStore(config.heldout)
    if heldout.hookpoints != store.hookpoints:
        raise InputError(f"{config.heldout} was recorded at other hookpoints than {config.store}")
    size = min(config.heldout_activations, len(heldout))
    return next(heldout.batches(size, seed=0))


def _finished(output: Path, settings: dict[str, Any]) -> GLP:
    """The prior of a run that was complete already."""
    before = json.loads((output / "train.json").read_text(encoding="utf-8"))["settings"]
    if difference := changed_setting(before, settings):
        raise InputError(f"{output} holds a finished run with {difference}: choose another output")
    return GLP.from_pretrained(output)
