"""One training run in its folder: the loop with what it logs, evaluates and saves on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.config import Recipe, TrainConfig
from latentprior.prior.cost import training_flops
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.training.checkpoint import latest, load_state, save_state
from latentprior.training.logger import TrainingLogger
from latentprior.training.loop import Exhausted, State, TrainingLoop
from latentprior.training.loss import heldout_loss
from latentprior.training.optim import initialise, principal_directions
from latentprior.training.parallel import CPU_MICRO_BATCH, parallelize, whole_weights
from latentprior.training.sources import ActivationSource, stored_heldout
from latentprior.utils.chips import data_sheet_peak, matrix_peak
from latentprior.utils.devices import fast_dtype
from latentprior.utils.errors import Stopped
from latentprior.utils.files import replace_json
from latentprior.utils.progress import Report
from latentprior.utils.provenance import stamp, versions
from latentprior.utils.random import generator_of

Json = dict[str, Any]

LEAST_SAMPLE, SAMPLE_PER_DIMENSION = 2**14, 16  # rows that principal directions are taken from
FIRST_CHECKPOINT = 2**16  # activations; then at every doubling


class Trainer:
    """Trains a prior on a source of activations; the state of a run with other `settings` is refused."""

    def __init__(
        self, config: TrainConfig, source: ActivationSource, settings: Json, device: torch.device, report: Report
    ) -> None:
        self.config, self.source, self.settings, self.device = config, source, settings, device
        self.output, self.partition, self.world = Path(config.run.output), source.partition, source.partition.world
        recipe, run = config.resolved_recipe(), config.run
        saved = latest(self.output / "steps", settings)
        heldout = stored_heldout(config, source.hookpoints)  # refused before the statistics are computed
        self.normalizer = source.normalizer().to(device)
        self.heldout = source.heldout() if heldout is None else heldout
        self.precision = fast_dtype(device) if run.precision == "auto" else getattr(torch, run.precision)
        self.state = self._new_state(recipe, resumed=saved is not None)
        if saved is not None:
            load_state(saved, self.state, self.world)
        self.position = (saved and saved.position) or {}
        self.steps = math.ceil(run.activations / recipe.batch_size)
        micro_batch = run.micro_batch or (CPU_MICRO_BATCH if device.type == "cpu" else None)
        self.loop = TrainingLoop(
            self.state, self.normalizer, recipe, self.steps, self.precision, micro_batch, run.seed, self.partition
        )
        peaks, done = self._peaks(recipe), self.position.get("activations", 0)
        self.logger = TrainingLogger(config, self.world, report, peaks, step=self.state.step, activations=done)
        self.ended: str | None = None

    def train(self, stop: Callable[[], bool]) -> None:
        """From where the run is to its end; leaves the prior in the folder.

        `Exhausted` if a store ended early, or a stream before its first step. The state is saved before `Stopped`.
        """
        source, state, logger = self.source, self.state, self.logger
        if not self.position:
            self.evaluate()
        self.saved_step, self.saved_at = state.step if self.position else None, time.perf_counter()
        logger.start(source.seconds())
        batches = source.batches(state.step, self.position.get("feed"), save=self.save)
        try:
            for figures in self.loop.over(batches, stop=stop):
                last, before = state.step == self.steps, logger.activations
                logger.step(state, figures, last=last)
                if last or _passes_checkpoint(before, logger.activations):
                    self.evaluate()
                    if not last:
                        self.save_prior(self.output / "checkpoints" / str(logger.activations))
                if last or self._save_due():
                    self.save()
                logger.report()
        except Exhausted as ended:
            if not state.step or (self.config.source == "store" and not self.config.store.follow):
                raise
            self.ended = str(ended)  # the text was shorter than the run: what is there is evaluated and saved
            self.evaluate()
            self.save()
        except Stopped:
            if state.step:
                self.save()
            raise
        finally:
            logger.close()
        source.close()
        self.save_prior(self.output)

    def evaluate(self) -> None:
        """Log the held-out loss of the weights that would be saved now."""
        if self.heldout is None:
            return
        x, layer, _ = self.heldout
        with self.logger.aside(), self.state.evaluated() as denoiser:
            loss, by_t = heldout_loss(denoiser, self.normalizer, x, layer, precision=self.precision, world=self.world)
        self.logger.evaluated(self.state.step, loss, by_t)

    def save(self) -> None:
        """Save the training state with its position in the data, unless that was done at this step."""
        with self.logger.aside():
            if self.state.step != self.saved_step:
                position = {"feed": self.source.position(), "activations": self.logger.activations}
                save_state(self.output / "steps", self.state, self.settings, position, self.world)
            self.source.saved()
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()

    def save_prior(self, folder: Path) -> None:
        """Write the prior that the state has arrived at."""
        with self.logger.aside(), self.state.evaluated() as denoiser:
            weights = whole_weights(denoiser)
            if not self.world.main:
                return
            with torch.device("meta"):  # no weights to be drawn first
                whole = Denoiser(denoiser.config)
            whole.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
            training = {"settings": self.settings, **self.summary()}
            provenance = {"source": self.source.source, "training": training, "versions": versions()}
            GLP(whole, self.normalizer, self.source.hookpoints, provenance).save_pretrained(folder)

    def summary(self) -> Json:
        """What the run has come to so far."""
        rows = self.logger.activations
        found: Json = {"activations": rows, "distinct": self.source.distinct(rows)}
        if left_out := self.source.left_out():
            found["left_out"] = left_out
        return found | self.logger.heldout | ({"ended": self.ended} if self.ended else {})

    def save_result(self, wall_seconds: float) -> None:
        """Write ``train.json``, which marks the run as complete."""
        result = stamp(self.config.without_groups(), seed=self.config.run.seed, wall_seconds=wall_seconds)
        result |= {
            "kind": "train",
            "settings": self.settings,
            "summary": self.summary(),
            "seconds": self.logger.seconds(self.source.seconds()),
            "processes": self.world.size,
        }
        if self.world.main:
            replace_json(self.output / "train.json", result, indent=2)
        self.world.wait()

    def _directions(self, recipe: Recipe) -> Tensor | None:
        """The principal directions of a sample of the activations, all layers together, if weights start from them."""
        if recipe.init != "principal":
            return None
        x, layer, _ = self.source.sample(max(LEAST_SAMPLE, SAMPLE_PER_DIMENSION * self.normalizer.width))
        return principal_directions(self.normalizer.normalize(x.to(self.device), layer))

    def _new_state(self, recipe: Recipe, *, resumed: bool) -> State:
        """The state to start from, with seeded initial weights; the global generator is left as it was.

        A run that is resumed gets all of it from its saved state.
        """
        run, source = self.config.run, self.source
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(run.seed)  # not torch.manual_seed: that would seed GPUs, too
            denoiser = Denoiser(self.config.resolved_prior().denoiser(source.hookpoints[0].width, source.blocks))
        if not resumed:
            initialise(denoiser, recipe, generator_of(run.seed), self._directions(recipe))
        denoiser = denoiser.to(self.device)
        model = parallelize(
            denoiser,
            self.world,
            parallel=run.parallel,
            precision=self.precision,
            compiled=run.compile == "on" or (run.compile == "auto" and self.device.type == "cuda"),
            float8=run.float8,
        )
        return State.start(denoiser, recipe, model)

    def _peaks(self, recipe: Recipe) -> dict[str, float]:
        """Activations a second, over all processes, at the device's peaks: the measured one and the data sheet's."""
        layers = len(self.source.hookpoints)
        cost = training_flops(self.state.denoiser.config, recipe, recipe.batch_size, layers=layers)
        flops = cost.activation / self.world.size + cost.update / recipe.batch_size  # each makes the whole update
        sheet = data_sheet_peak(self.device, self.precision)
        measured = {"measured_peak_share": matrix_peak(self.device, self.precision) / flops}
        return measured | ({"mfu": sheet / flops} if sheet else {})

    def _save_due(self) -> bool:
        """Whether it is time to save by the first process's clock."""
        due = time.perf_counter() - self.saved_at > self.config.run.save_seconds
        return bool(self.world.sum(torch.tensor(int(due and self.world.main))))


def _passes_checkpoint(before: int, done: int) -> bool:
    """Whether a doubling count of activations lies in (before, done]."""
    count = FIRST_CHECKPOINT
    while count <= before:
        count *= 2
    return count <= done
