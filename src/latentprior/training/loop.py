"""The training loop: optimizer steps over any iterator of batches, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from latentprior.config import Recipe
from latentprior.data.partition import Batch, BatchPartition
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loss import backward
from latentprior.training.noise import NoiseSamples
from latentprior.training.optim import AveragedWeights, optimizers, rate_share, set_rates
from latentprior.utils.errors import InputError, Stopped


class Diverged(InputError):
    """The loss or its gradient is not finite; the last saved state is good."""


class Exhausted(InputError):
    """The activations ended before the run did."""


@dataclass
class State:
    """Everything that changes while training."""

    denoiser: Denoiser
    model: nn.Module  # what is called in training: the denoiser, or what `parallelize` gave
    optimizers: list[torch.optim.Optimizer]
    average: AveragedWeights | None
    step: int = 0

    @classmethod
    def start(cls, denoiser: Denoiser, recipe: Recipe, model: nn.Module | None = None) -> State:
        """A new run; `denoiser` is on its device already, and `model` is what `parallelize` gave."""
        average = AveragedWeights(denoiser, recipe.ema) if recipe.ema else None
        return cls(denoiser, model or denoiser, optimizers(denoiser, recipe), average)

    @contextmanager
    def evaluated(self) -> Iterator[Denoiser]:
        """The denoiser with the weights to evaluate and save: their average, if there is one."""
        with self.average.in_place_of(self.denoiser) if self.average else nullcontext():
            yield self.denoiser
            if isinstance(self.denoiser, FSDPModule):
                self.denoiser.reshard()  # gives up the gathered weights that a forward pass alone leaves


class Figures(NamedTuple):
    """What one step came to; on a GPU loss and gradient norm are tensors that nobody has waited for."""

    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    rows: int  # of all processes


@dataclass
class TrainingLoop:
    """Optimizer steps of one run: `over` is the loop, `step` what it does with a batch.

    Step k draws the same noise and times whether or not the run was interrupted.
    """

    state: State  # where to start; changed in place
    normalizer: Normalizer
    recipe: Recipe
    steps: int  # the run's length; the schedule ends there
    precision: torch.dtype = torch.float32  # of the matrix work; weights and optimizer stay float32
    micro_batch: int | None = None  # rows of one forward and backward pass; all by default
    seed: int = 0
    partition: BatchPartition = field(default=None)  # pyright: ignore[reportAssignmentType]  # one shard and process

    def __post_init__(self) -> None:
        self.partition = self.partition or BatchPartition(self.recipe.batch_size)
        self._check = _FiniteCheck()

    def over(
        self, batches: Iterable[Batch | tuple[Tensor, Tensor | None]], *, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Figures]:
        """Make a step with each batch until `steps` are done; gives each step's figures once it is made.

        `batches` are this process's rows, from step ``state.step`` on. If `stop`, asked at every step, says so in one
        process, all of them stop after that step.

        Raises:
            Diverged: a loss or gradient is not finite. The update is not made; a GPU tells one step later.
            Exhausted: `batches` ended early in all processes. Those that end before the others take part without rows.
            Stopped: `stop` said so, or `batches` did, before the step that they were for.
        """
        several, width = len(self.normalizer.layers) > 1, self.normalizer.width
        nothing = Batch(torch.empty(0, width), torch.empty(0, dtype=torch.int64) if several else None)
        world, source = self.partition.world, iter(batches)
        try:
            while self.state.step < self.steps:
                batch = Batch(*next(source, nothing))  # pyright: ignore[reportArgumentType]
                rows, stopping = world.sum(torch.tensor([len(batch.x), int(stop())])).tolist()
                if not rows:
                    raise Exhausted(f"the activations ended after {self.state.step} of {self.steps} steps")
                yield self.step(batch, rows)
                if stopping and self.state.step < self.steps:  # not before the step: its rows were drawn already
                    raise Stopped(f"stopped after {self.state.step} of {self.steps} steps")
        except Stopped:
            self._check.finish()
            raise
        self._check.finish()

    def step(self, batch: Batch, rows: int) -> Figures:
        """One optimizer step with this process's `batch` of `rows` in all processes."""
        state, recipe = self.state, self.recipe
        samples = self.noise_samples(batch)
        loss = backward(
            state.model, self.normalizer, batch, samples, rows, self.partition, self.precision, self.micro_batch
        )
        norm = gradient_norm(state.denoiser)
        self._check.step(state, loss, norm)
        if norm.device.type != "cpu" or norm > recipe.clip:  # a GPU, where looking is waiting, always scales
            torch.nn.utils.clip_grads_with_norm_(state.denoiser.parameters(), recipe.clip, norm)
        share = rate_share(state.step, self.steps, recipe)
        set_rates(state.optimizers, share)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()  # to none: the next gradients are then taken over, not added to zeros
        if state.average is not None:
            state.average.update(state.denoiser, state.step)
        state.step += 1
        return Figures(loss, norm, recipe.learning_rate * share, rows)

    def noise_samples(self, batch: Batch) -> list[NoiseSamples]:
        """The noise and times of the next step, one for each of the recipe's samples of an activation."""
        count, width, device = self.recipe.noise_samples, self.normalizer.width, self.normalizer.mean.device
        return [
            NoiseSamples.draw(self.seed, number, self.partition, width, self.recipe, device).for_rows(batch)
            for number in range(self.state.step * count, (self.state.step + 1) * count)
        ]


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients together, over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _FiniteCheck:
    """Stops a run whose loss or gradient is not finite before the weights are changed.

    On a GPU, so that the host need not wait, fused AdamW leaves out the update by itself (`found_inf`), and the host
    reads each step's figures one step later. With Muon, and where weights are sharded, it waits.
    """

    def __init__(self) -> None:
        self._before: tuple[int, Tensor, torch.cuda.Event] | None = None

    def step(self, state: State, loss: Tensor, norm: Tensor) -> None:
        figures = torch.stack([loss, norm])
        fused = all(isinstance(o, torch.optim.AdamW) for o in state.optimizers)
        sharded = any(isinstance(p, DTensor) for p in state.denoiser.parameters())  # not mixed with a plain tensor
        if figures.device.type == "cpu" or sharded or not fused:
            _check_finite(state.step, figures)
            return
        bad = (~figures.isfinite().all()).float()
        for optimizer in state.optimizers:
            optimizer.grad_scale, optimizer.found_inf = None, bad  # pyright: ignore[reportAttributeAccessIssue]
        self.finish()
        copy = torch.empty(2, pin_memory=True).copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._before = state.step, copy, event

    def finish(self) -> None:
        """Look at the step before."""
        if self._before is not None:
            step, figures, event = self._before
            event.synchronize()
            _check_finite(step, figures)


def _check_finite(step: int, figures: Tensor) -> None:
    loss, norm = figures.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}; the last saved state is kept")
