"""One visible training loop over any iterator of activations, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentprior.config import Recipe
from latentprior.data.partition import Batch, Deal
from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.noise import Draws
from latentprior.training.optim import AveragedWeights, learning_rate, optimizers, rate_share, set_rates
from latentprior.training.parallel import gradients_stay, reshard
from latentprior.utils.devices import to_device
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError, Stopped

BINS = 10  # of the held-out loss by noise level


class Diverged(InputError):
    """The loss or its gradient is not finite; the last saved state is good."""


class Exhausted(InputError):
    """The activations ended before the run did."""


@dataclass
class State:
    """Everything that changes while training."""

    denoiser: Denoiser
    optimizers: list[torch.optim.Optimizer]
    average: AveragedWeights | None
    step: int = 0
    model: nn.Module = field(default=None)  # pyright: ignore[reportAssignmentType]
    """What is called in training: the denoiser, or what reduces its gradients over processes (`placement.placed`)."""

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = self.denoiser

    @classmethod
    def start(cls, denoiser: Denoiser, recipe: Recipe, model: nn.Module | None = None) -> State:
        """A new run; `denoiser` is placed on its device already, and `model` is what `placement.placed` gave."""
        average = AveragedWeights(denoiser, recipe.ema) if recipe.ema else None
        return cls(denoiser, optimizers(denoiser, recipe), average, model=model or denoiser)

    @contextmanager
    def evaluated(self) -> Iterator[Denoiser]:
        """The denoiser with the weights to evaluate and save: their average, if there is one."""
        with self.average.in_place_of(self.denoiser) if self.average else nullcontext():
            yield self.denoiser
            reshard(self.denoiser)


def train(
    state: State,
    normalizer: Normalizer,
    batches: Iterable[Batch | tuple[Tensor, Tensor | None]],
    recipe: Recipe,
    *,
    steps: int,
    precision: torch.dtype = torch.float32,
    micro_batch: int | None = None,
    seed: int = 0,
    deal: Deal | None = None,
    after_step: Callable[[State, dict[str, Any]], Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train until `steps` optimizer steps are done.

    Args:
        state: where to start; `State.start` for a new run. Changed in place.
        normalizer: statistics of the training data.
        batches: this process's rows of each batch, from the batch of step `state.step` on.
        recipe: batch size, rates, averaging, time sampling.
        steps: the run's length; the schedule ends there.
        precision: of the matrix work; weights and optimizer stay float32.
        micro_batch: rows of one forward and backward pass.
        seed: of noise and times. Step k draws the same numbers whether or not the run was interrupted.
        deal: how batches are dealt over lanes and processes; one lane and process by default.
        after_step: called with the state and the step's figures: loss and gradient norm (on a GPU tensors that are
            not waited for), learning rate, rows.
        stop: asked at every step; if it says so in one process, all of them stop after that step.

    Raises:
        Diverged: a loss or gradient is not finite. The update is not made; a GPU tells one step later.
        Exhausted: `batches` ended early in all processes. Those that end before the others take part without rows.
        Stopped: `stop` said so, or `batches` did, before the step that they were for.
    """
    deal = deal or Deal(recipe.batch_size)
    device = normalizer.mean.device
    source = iter(batches)
    check = _FiniteCheck()
    while state.step < steps:
        try:
            x, layer, *places = next(source, _no_rows(normalizer))
        except Stopped:
            check.finish()
            raise
        batch = Batch(x, layer, *places)
        rows, stopping = deal.world.sum(torch.tensor([len(batch.x), int(stop())])).tolist()
        if not rows:
            raise Exhausted(f"the activations ended after {state.step} of {steps} steps")
        draws = [
            _of_rows(Draws.of(seed, number, deal, normalizer.width, recipe, device), batch, deal)
            for number in range(state.step * recipe.draws, (state.step + 1) * recipe.draws)
        ]
        loss = backward(
            state.model, normalizer, batch, draws, rows, deal=deal, precision=precision, micro_batch=micro_batch
        )
        norm = gradient_norm(state.denoiser)
        check.step(state, loss, norm)
        clip_gradients(state.denoiser, norm, recipe.clip)
        set_rates(state.optimizers, rate_share(state.step, steps, recipe))
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()  # to none: the next gradients are then taken over, not added to zeros
        if state.average is not None:
            state.average.update(state.denoiser, state.step)
        rate = learning_rate(state.step, steps, recipe)
        state.step += 1
        if after_step is not None:
            after_step(state, {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "rows": rows})
        if stopping and state.step < steps:  # not before the step: its activations were drawn already
            check.finish()
            raise Stopped(f"stopped after {state.step} of {steps} steps")
    check.finish()
    return state


def _no_rows(normalizer: Normalizer) -> Batch:
    """What a process without activations brings to a step of the others."""
    several = len(normalizer.layers) > 1
    return Batch(torch.empty(0, normalizer.width), torch.empty(0, dtype=torch.int64) if several else None)


def _of_rows(draws: Draws, batch: Batch, deal: Deal) -> Draws:
    if batch.places is not None:
        return draws.select(batch.places)
    if len(batch.x) == deal.rows:
        return draws
    if len(batch.x):
        raise InputError(f"a batch has {len(batch.x)} rows, not {deal.rows}")
    return draws.select(slice(0))


def backward(
    model: nn.Module,
    normalizer: Normalizer,
    batch: Batch,
    draws: Sequence[Draws],
    rows: int,
    *,
    deal: Deal,
    precision: torch.dtype,
    micro_batch: int | None,
) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters, one micro-batch at a time; returns the loss.

    `rows` are those of all processes: each one's gradient counts by its true share. All run the same number of
    micro-batches, the last ones empty where there are fewer rows. With several `draws` the loss is their mean.

    On a CPU a micro-batch whose hidden units fit the cache saves more memory traffic than its smaller matrices cost.
    """
    device = normalizer.mean.device
    size = micro_batch or deal.most_rows
    count = -(-deal.most_rows // size)
    total = torch.zeros((), device=device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        # One autocast region for all micro-batches: weights are cast once, not once for each.
        for i in range(count * len(draws)):
            with gradients_stay(model, i < count * len(draws) - 1):
                part, drawn = slice(i % count * size, (i % count + 1) * size), draws[i // count]
                errors = squared_errors(model, normalizer, batch, drawn, part)
                if drawn.weight is not None:
                    errors = errors * to_device(drawn.weight[part], device)
                loss = errors.sum() / (rows * len(draws))
                # Processes' gradients are averaged, while the loss is a sum of their shares.
                (loss * deal.world.size).backward()
            total += loss.detach()
    if deal.world.size > 1:
        torch.distributed.all_reduce(total)
    return total


def squared_errors(
    model: nn.Module, normalizer: Normalizer, batch: Batch, draws: Draws, part: slice = slice(None)
) -> Tensor:
    """Mean squared error [n] of the velocity of some rows, on the normalizer's device."""
    device = normalizer.mean.device
    row = None if batch.layer is None else normalizer.known_rows(batch.layer[part])
    z_0 = normalizer.standardised(to_device(batch.x[part], device), 0 if row is None else row)
    some = draws.select(part)
    distinct, index = some.times()
    z_t = flow.interpolate(z_0, some.noise, distinct[index])
    # All layers that the prior serves, and which of them each row has: nothing is looked for in the data.
    several = {} if row is None else {"layer": normalizer.layers, "layer_index": to_device(row, device)}
    predicted = model(z_t, distinct, time_index=index, **several)
    return (predicted.float() - flow.target(z_0, some.noise)).square().mean(dim=1)


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients together, over all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, norm: Tensor, most: float) -> None:
    """Scale gradients of norm `norm` down to at most `most`."""
    if norm.device.type == "cpu" and norm <= most:
        return  # scaling would only read and write every gradient; a GPU, where looking is waiting, does it
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)


class _FiniteCheck:
    """Stops a run whose loss or gradient is not finite before the weights are changed.

    On a GPU the host would have to wait for the figures. There fused AdamW leaves out the update by itself
    (`found_inf`), and the host reads each step's figures one step later. With Muon, and where weights are sharded, the
    host waits.
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


@torch.no_grad()
def heldout_errors(
    denoiser: nn.Module,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    chunk: int = 1024,
    world: World | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row's loss at fixed noise and time: squared error [N] float32, and its bin of the noise level [N].

    Times are spread evenly over [0, 1]; the same rows get the same noise and times at every call, so that two calls
    compare. Bin i of `BINS` covers times from i / BINS to (i + 1) / BINS. With several processes each gets the errors
    of every size-th row only.
    """
    world = world or World()
    device = normalizer.mean.device
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    strata = min(200, len(x))
    t = ((torch.arange(len(x)) * strata // len(x)) + 0.5) / strata
    own = slice(world.rank, None, world.size)
    batch = Batch(x[own], None if layer is None else layer[own])
    draws = Draws(noise[own].to(device), t[own])
    errors = []
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        # As many chunks in every process, the last ones empty: a sharded denoiser needs all of them at each.
        for begin in range(0, -(-len(x) // world.size), chunk):
            errors.append(squared_errors(denoiser, normalizer, batch, draws, slice(begin, begin + chunk)).cpu())
    return torch.cat(errors), (t[own] * BINS).long().clamp_(max=BINS - 1)


def heldout_loss(
    denoiser: nn.Module,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    world: World | None = None,
) -> tuple[float, list[float]]:
    """Held-out loss, overall and in each bin of the noise level; every process of `world` takes its share of rows."""
    world = world or World()
    error, bins = heldout_errors(denoiser, normalizer, x, layer, precision=precision, world=world)
    sums = torch.zeros(2, BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, error.double())
    sums[1] = torch.bincount(bins, minlength=BINS)
    loss, count = world.sum(sums)
    return float(loss.sum() / count.sum()), (loss / count.clamp(min=1)).tolist()
