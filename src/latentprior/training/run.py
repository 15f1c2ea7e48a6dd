"""What happens beside the steps of a training run: held-out loss, log, checkpoints, saved states, where time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.config import DenoiserConfig, Recipe, TrainConfig, to_dict
from latentprior.data.partition import Batch, Deal
from latentprior.prior.cost import muon_flops_per_step, training_flops_per_activation
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.training.checkpoint import save_state
from latentprior.training.loop import State, heldout_loss
from latentprior.training.parallel import whole_weights
from latentprior.training.sources import Feed
from latentprior.training.times import most_distinct
from latentprior.training.tracking import Log, read_log
from latentprior.utils.chips import data_sheet_peak, matrix_peak
from latentprior.utils.progress import Report
from latentprior.utils.provenance import versions

FIRST_CHECKPOINT = 2**16  # activations; then at every doubling


class Run:
    """One run in its folder; every process has one, the first one writes."""

    def __init__(
        self,
        config: TrainConfig,
        feed: Feed,
        normalizer: Normalizer,
        heldout: Batch | None,
        precision: torch.dtype,
        settings: dict[str, Any],
        deal: Deal,
        report: Report,
        steps: int,
    ) -> None:
        self.config, self.feed, self.normalizer, self.heldout = config, feed, normalizer, heldout
        self.precision, self.settings, self.deal, self.report, self.steps = precision, settings, deal, report, steps
        self.output, self.world = Path(config.output), deal.world
        self.activations = 0
        self.ended: str | None = None
        self.shown: dict[str, Any] = {}
        self.last_evaluation: dict[str, Any] = {}
        self.beside = 0.0  # seconds in evaluations and saves
        self.log: Log | None = None
        self._window: list[Tensor] = []

    def start(self, state: State, position: dict[str, Any] | None) -> None:
        """Open the log and take over what an interrupted run had found when it saved `state`."""
        self.activations = position["activations"] if position else 0
        self.saved_step = state.step if position else None
        if self.world.main:
            self.output.mkdir(parents=True, exist_ok=True)
            path = self.output / "log.jsonl"
            self.log = Log(path, track=self.config.track, config=to_dict(self.config), resume_step=state.step)
        self.peak = matrix_peak(self.normalizer.mean.device, self.precision)
        self.data_sheet = data_sheet_peak(self.normalizer.mean.device, self.precision)
        self.work = step_flops(state.denoiser.config, self.config.resolved_recipe(), len(self.feed.hookpoints))
        if position is None:
            self.evaluate(state)
        elif self.world.main:
            for line in read_log(self.output / "log.jsonl"):
                if "heldout_loss" in line:
                    self._evaluated({key: line[key] for key in ("heldout_loss", "heldout_loss_by_t")})
        self.began = self.saved_at = self.logged_at = time.perf_counter()
        self.beside, self.logged_rows = 0.0, self.activations
        self.before = self.feed.seconds()  # the warm-up's

    def after_step(self, state: State, figures: dict[str, Any]) -> None:
        """Log, evaluate and save what is due."""
        before, self.activations = self.activations, self.activations + figures["rows"]
        last = state.step == self.steps
        self._window.append(figures["loss"])
        if state.step % self.config.log_every == 0 or last:
            self._log(state, figures)
        if last or _passes_checkpoint(before, self.activations):
            self.evaluate(state)
            if not last:
                self.save_prior(state, self.output / "checkpoints" / str(self.activations))
        if last or self._save_due():
            self.save(state)
        self.report(min(self.activations, self.config.activations), self.config.activations, self.shown)

    def _save_due(self) -> bool:
        """Whether it is time to save, as the first process's clock says."""
        due = time.perf_counter() - self.saved_at > self.config.save_seconds
        return bool(self.world.sum(torch.tensor(int(due and self.world.main))))

    def save(self, state: State) -> None:
        """Save the training state with its position in the data, unless that was done at this step."""
        with self._beside():
            if state.step != self.saved_step:
                position = {"feed": self.feed.position(), "activations": self.activations}
                save_state(self.output / "steps", state, self.settings, position, self.world)
            self.feed.saved()
        self.saved_at, self.saved_step = time.perf_counter(), state.step

    def save_prior(self, state: State, folder: Path) -> None:
        """Write the prior that the state has arrived at."""
        with self._beside(), state.evaluated() as denoiser:
            weights = whole_weights(denoiser)
            if self.world.main:
                with torch.device("meta"):  # no weights to be drawn first
                    whole = Denoiser(denoiser.config)
                whole.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
                provenance = {
                    "source": self.feed.source,
                    "training": {"settings": self.settings, **self.summary()},
                    "versions": versions(),
                }
                GLP(whole, self.normalizer, self.feed.hookpoints, provenance).save_pretrained(folder)

    def evaluate(self, state: State) -> None:
        """Held-out loss of the weights that would be saved now."""
        if self.heldout is None:
            return
        with self._beside(), state.evaluated() as denoiser:
            loss, by_t = heldout_loss(
                denoiser,
                self.normalizer,
                self.heldout.x,
                self.heldout.layer,
                precision=self.precision,
                world=self.world,
            )
        self._evaluated({"heldout_loss": loss, "heldout_loss_by_t": by_t})
        if self.log is not None:
            self.log.write({"step": state.step, "activations": self.activations, **self.last_evaluation})

    def end_early(self, state: State, reason: str) -> None:
        """The text was shorter than the run: what is there is evaluated and saved."""
        self.ended = reason
        self.evaluate(state)
        self.save(state)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def summary(self) -> dict[str, Any]:
        """What the run has come to so far."""
        found = {"activations": self.activations, "distinct": self.feed.distinct(self.activations)}
        left_out = self.feed.left_out()
        found |= {"left_out": left_out} if left_out else {}
        return found | self.last_evaluation | ({"ended": self.ended} if self.ended else {})

    def seconds(self) -> dict[str, float]:
        """Where the time of this process went since it started or continued the run, without the warm-up."""
        parts = {name: seconds - self.before[name] for name, seconds in self.feed.seconds().items()}
        parts["evaluating and saving"] = self.beside
        return {"training": time.perf_counter() - self.began - sum(parts.values())} | parts

    def _evaluated(self, figures: dict[str, Any]) -> None:
        self.shown["held-out"] = figures["heldout_loss"]
        self.last_evaluation = figures

    def _log(self, state: State, figures: dict[str, Any]) -> None:
        loss = float(torch.stack(self._window).mean())  # waits for the GPU, once for many steps
        self._window.clear()
        now, rows = time.perf_counter(), self.activations - self.logged_rows
        rate = rows / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_rows = now, self.activations
        self.shown["loss"] = loss
        if self.log is not None:
            line = {"step": state.step, "activations": self.activations, "loss": loss}
            line |= {"gradient_norm": float(figures["gradient_norm"]), "learning_rate": figures["learning_rate"]}
            flops = rate * self.work / (self.deal.batch * self.world.size)
            line |= {"per_second": rate, "measured_peak_share": flops / self.peak}
            self.log.write(line | ({"mfu": flops / self.data_sheet} if self.data_sheet else {}))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.beside += time.perf_counter() - began


def step_flops(config: DenoiserConfig, recipe: Recipe, layers: int) -> float:
    """FLOPs of the matrix products of one optimizer step, as executed: the time path runs once for each distinct time.

    The figure for "grid" and "logit_normal" is an upper bound: times that happen to coincide are computed once.
    """
    distinct = most_distinct(recipe, recipe.batch_size) / recipe.batch_size
    several = layers / recipe.batch_size if layers > 1 else 0.0
    work = training_flops_per_activation(config, distinct_times=distinct, distinct_layers=several) * recipe.batch_size
    work *= recipe.draws
    return work + (muon_flops_per_step(config) if recipe.optimizer == "muon" else 0.0)


def _passes_checkpoint(before: int, done: int) -> bool:
    """Whether a doubling count of activations lies in (before, done]."""
    count = FIRST_CHECKPOINT
    while count <= before:
        count *= 2
    return count <= done
