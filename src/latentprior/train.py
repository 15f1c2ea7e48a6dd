"""One visible training loop over any iterator of activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior import flow
from latentprior.config import Recipe
from latentprior.denoiser import Denoiser
from latentprior.errors import InputError
from latentprior.normalizer import Normalizer
from latentprior.optim import AveragedWeights, adamw, learning_rate

Batch = tuple[Tensor, Tensor | None]  # raw activations [B, d], their layers [B] or None
BINS = 10  # of the held-out loss by noise level


class Diverged(InputError):
    """The loss or its gradient is not finite; the last saved state is good."""


@dataclass
class State:
    """Everything that changes while training."""

    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None
    step: int = 0

    @classmethod
    def start(cls, denoiser: Denoiser, recipe: Recipe) -> State:
        average = AveragedWeights(denoiser, recipe.ema) if recipe.ema else None
        return cls(denoiser, adamw(denoiser, recipe), average)

    def evaluated(self) -> Denoiser:
        """The weights to evaluate and save: the average if there is one."""
        if self.average is None:
            return self.denoiser
        averaged = copy.deepcopy(self.denoiser)
        averaged.load_state_dict(self.average.state_dict())
        return averaged


@dataclass(frozen=True)
class Draws:
    """The randomness of one step: noise [B, d] and ascending times [B], a function of seed and step alone."""

    noise: Tensor
    t: Tensor

    @classmethod
    def of(cls, seed: int, step: int, shape: torch.Size, recipe: Recipe) -> Draws:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        noise = torch.randn(shape, generator=generator)
        if recipe.times == "grid":
            # Sorted, so that a micro-batch holds few distinct times; rows are in random order, so pairing is free.
            return cls(noise, flow.training_times(torch.rand(shape[0], generator=generator)).sort().values)
        strata = recipe.distinct_times
        t = (torch.arange(strata) + torch.rand(strata, generator=generator)) / strata
        return cls(noise, t.repeat_interleave(shape[0] // strata))


def train(
    state: State,
    normalizer: Normalizer,
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    steps: int,
    precision: torch.dtype = torch.float32,
    micro_batch: int | None = None,
    seed: int = 0,
    after_step: Callable[[State, dict[str, float]], Any] | None = None,
) -> State:
    """Train until `steps` optimizer steps are done.

    Args:
        state: where to start; `State.start` for a new run. Changed in place.
        normalizer: statistics of the training data.
        batches: raw activations and layers, from the batch of step `state.step` on.
        recipe: batch size, rates, averaging, time sampling.
        steps: the run's length; the schedule ends there.
        precision: of the matrix work; weights and optimizer stay float32.
        micro_batch: rows of one forward and backward pass.
        seed: of noise and times. Step k draws the same numbers whether or not the run was interrupted.
        after_step: called with the state and the step's figures: loss, gradient norm, rate.

    Raises:
        Diverged: a loss or gradient is not finite; raised before the update.
        InputError: `batches` ended early.
    """
    source = iter(batches)
    while state.step < steps:
        batch = next(source, None)
        if batch is None:
            raise InputError(f"the activations ended after {state.step} of {steps} steps")
        x, layer = batch
        rate = learning_rate(state.step, steps, recipe)
        draws = Draws.of(seed, state.step, x.shape, recipe)
        loss = backward(state.denoiser, normalizer, x, layer, draws, precision=precision, micro_batch=micro_batch)
        norm = gradient_norm(state.denoiser)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"step {state.step}: loss {loss}, gradient norm {norm}; the last saved state is kept")
        if norm > recipe.clip:  # else scaling would only read and write every gradient
            torch.nn.utils.clip_grads_with_norm_(state.denoiser.parameters(), recipe.clip, torch.tensor(norm))
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad()  # to none: the next gradients are then taken over, not added to zeros
        if state.average is not None:
            state.average.update(state.denoiser, state.step)
        state.step += 1
        if after_step is not None:
            after_step(state, {"loss": loss, "gradient_norm": norm, "learning_rate": rate})
    return state


def gradient_norm(model: nn.Module) -> float:
    """Euclidean norm of all gradients together."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def backward(
    denoiser: Denoiser,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None,
    draws: Draws,
    *,
    precision: torch.dtype,
    micro_batch: int | None,
) -> float:
    """Add the gradient of the batch's mean loss to the parameters, one micro-batch at a time; returns the loss.

    On a CPU a micro-batch whose hidden units fit the cache saves more memory traffic than its smaller matrices cost.
    """
    device = normalizer.mean.device
    rows = micro_batch or len(x)
    total = 0.0
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        # One autocast region for all micro-batches: weights are cast once, not once for each.
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            predicted, target = _predict(denoiser, normalizer, x, layer, draws, part)
            loss = F.mse_loss(predicted, target) * (len(target) / len(x))
            loss.backward()
            total += float(loss.detach())
    return total


def _predict(
    denoiser: Denoiser, normalizer: Normalizer, x: Tensor, layer: Tensor | None, draws: Draws, part: slice
) -> tuple[Tensor, Tensor]:
    """Predicted and true velocity [n, d] float32 of some rows, on the normalizer's device."""
    device = normalizer.mean.device
    chosen = None if layer is None else layer[part].to(device)
    z_0 = normalizer.normalize(x[part].to(device), chosen)
    noise, t = draws.noise[part].to(device), draws.t[part].to(device)
    return denoiser(flow.interpolate(z_0, noise, t), t, chosen).float(), flow.target(z_0, noise)


@torch.no_grad()
def heldout_errors(
    denoiser: Denoiser,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Each row's loss at fixed noise and time: squared error [N] float32, and its bin of the noise level [N].

    Times are spread evenly over [0, 1]; the same rows get the same noise and times at every call, so that two calls
    compare. Bin i of `BINS` covers times from i / BINS to (i + 1) / BINS.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator)
    strata = min(200, len(x))
    t = ((torch.arange(len(x)) * strata // len(x)) + 0.5) / strata
    device = normalizer.mean.device
    errors = []
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for begin in range(0, len(x), chunk):
            part = slice(begin, begin + chunk)
            predicted, target = _predict(denoiser, normalizer, x, layer, Draws(noise, t), part)
            errors.append((predicted - target).square().mean(dim=1).cpu())
    return torch.cat(errors), (t * BINS).long().clamp_(max=BINS - 1)


def heldout_loss(
    denoiser: Denoiser,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
) -> tuple[float, list[float]]:
    """Held-out loss, overall and in each bin of the noise level."""
    error, bins = heldout_errors(denoiser, normalizer, x, layer, precision=precision)
    by_t = torch.zeros(BINS).index_add_(0, bins, error) / torch.bincount(bins, minlength=BINS).clamp(min=1)
    return float(error.mean()), by_t.tolist()
