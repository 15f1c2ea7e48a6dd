"""The flow-matching loss: of a batch with its gradient, and of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latentprior.data.partition import Batch, BatchPartition
from latentprior.prior import flow
from latentprior.prior.normalizer import Normalizer
from latentprior.training.noise import NoiseSamples
from latentprior.training.parallel import gradients_stay
from latentprior.utils.devices import to_device
from latentprior.utils.distributed import ALONE, World

BINS = 10  # of the held-out loss by noise level


def backward(
    model: nn.Module,
    normalizer: Normalizer,
    batch: Batch,
    samples: Sequence[NoiseSamples],
    rows: int,
    partition: BatchPartition,
    precision: torch.dtype,
    micro_batch: int | None,
) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters, one micro-batch at a time; returns the loss.

    `rows` are those of all processes: each one's gradient counts by its true share. All run the same number of
    micro-batches, the last ones empty where there are fewer rows. With several `samples` the loss is their mean.
    """
    device = normalizer.mean.device
    size = micro_batch or partition.most_rows
    parts = [slice(begin, begin + size) for begin in range(0, partition.most_rows, size)]
    passes = [(drawn, part) for drawn in samples for part in parts]
    total = torch.zeros((), device=device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        # One autocast region for all micro-batches: weights are cast once, not once for each.
        for i, (drawn, part) in enumerate(passes):
            with gradients_stay(model, i < len(passes) - 1):
                errors = squared_errors(model, normalizer, batch, drawn, part)
                if drawn.weight is not None:
                    errors = errors * to_device(drawn.weight[part], device)
                loss = errors.sum() / (rows * len(samples))
                # Processes' gradients are averaged, while the loss is a sum of their shares.
                (loss * partition.world.size).backward()
            total += loss.detach()
    if partition.world.size > 1:
        torch.distributed.all_reduce(total)
    return total


def squared_errors(
    model: nn.Module, normalizer: Normalizer, batch: Batch, samples: NoiseSamples, part: slice = slice(None)
) -> Tensor:
    """Mean squared error [n] of the velocity of some rows, on the normalizer's device."""
    device = normalizer.mean.device
    row = None if batch.layer is None else normalizer.known_rows(batch.layer[part])
    z_0 = normalizer.standardised(to_device(batch.x[part], device), 0 if row is None else row)
    some = samples.select(part)
    distinct, index = some.times()
    z_t = flow.interpolate(z_0, some.noise, distinct[index])
    # All layers that the prior serves, and which of them each row has: nothing is looked for in the data.
    several = {} if row is None else {"layer": normalizer.layers, "layer_index": to_device(row, device)}
    predicted = model(z_t, distinct, time_index=index, **several)
    return (predicted.float() - flow.target(z_0, some.noise)).square().mean(dim=1)


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
    world: World = ALONE,
) -> tuple[Tensor, Tensor]:
    """Each row's loss at fixed noise and time: squared error [N] float32, and its bin of the noise level [N].

    Times are spread evenly over [0, 1], and the same rows get the same noise and times at every call. Bin i of `BINS`
    begins at time i / BINS. With several processes each gets the errors of every size-th row only.
    """
    device = normalizer.mean.device
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    strata = min(200, len(x))
    t = ((torch.arange(len(x)) * strata // len(x)) + 0.5) / strata
    own = slice(world.rank, None, world.size)
    batch = Batch(x[own], None if layer is None else layer[own])
    samples = NoiseSamples(noise[own].to(device), t[own])
    errors = []
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        # As many chunks in every process, the last ones empty: a sharded denoiser needs all of them at each.
        for begin in range(0, -(-len(x) // world.size), chunk):
            errors.append(squared_errors(denoiser, normalizer, batch, samples, slice(begin, begin + chunk)).cpu())
    return torch.cat(errors), (t[own] * BINS).long().clamp_(max=BINS - 1)


def heldout_loss(
    denoiser: nn.Module,
    normalizer: Normalizer,
    x: Tensor,
    layer: Tensor | None = None,
    *,
    precision: torch.dtype = torch.float32,
    world: World = ALONE,
) -> tuple[float, list[float]]:
    """Held-out loss, overall and in each bin of the noise level; every process of `world` takes its share of rows."""
    error, bins = heldout_errors(denoiser, normalizer, x, layer, precision=precision, world=world)
    sums = torch.zeros(2, BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, error.double())
    sums[1] = torch.bincount(bins, minlength=BINS)
    loss, count = world.sum(sums)
    return float(loss.sum() / count.sum()), (loss / count.clamp(min=1)).tolist()
