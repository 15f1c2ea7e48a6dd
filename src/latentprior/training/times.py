"""Noise levels of training: how the times of one step are drawn, and what each row's error weighs at its time.

Both follow `Recipe`. Rows come in random order, so pairing them with ascending times is free; a micro-batch then
holds few distinct times, and the time path is computed once for each.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.config import Recipe
from latentprior.prior import flow
from latentprior.utils.random import keyed_generator

WEIGHT_LIMIT = 10.0  # of inverse densities: times near 0 and 1 are rare in a logit-normal law, and must not rule a step
_QUADRATURE = 4096  # points; the mean weight is then good to four digits
_LEAST = 2.0**-53  # keeps normal quantiles finite


def draw_times(seed: int, step: int, count: int, recipe: Recipe) -> Float[Tensor, " count"]:
    """The times of one step, ascending, float32 on the CPU: a function of `recipe`, `count` and (seed, step) alone.

    "grid" and "uniform" are independent draws. "stratified" and "logit_normal" cut [0, 1] into ``distinct_times``
    equally likely strata, draw one time in each, and spread the rows over the strata as evenly as possible; every time
    has its law at any count, as the rows left over go to strata chosen at random. Neighbouring seeds and steps give
    unrelated draws; `count` is the rows of the step, over all micro-batches and processes.
    """
    generator = keyed_generator(seed, step)
    match recipe.times:
        case "grid":
            return flow.training_times(torch.rand(count, generator=generator)).sort().values
        case "uniform":
            return torch.rand(count, generator=generator).sort().values
    strata = recipe.distinct_times
    drawn = (torch.arange(strata) + torch.rand(strata, generator=generator, dtype=torch.float64)) / strata
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    row = ((torch.arange(count) + offset) * (strata / count)).long().clamp_(max=strata - 1)
    return _quantile(drawn, recipe)[row].float()


def most_distinct(recipe: Recipe, rows: int) -> int:
    """The most distinct times that `rows` draws can have."""
    most = {"grid": flow.TRAIN_GRID, "uniform": rows}.get(recipe.times, recipe.distinct_times)
    return min(most, rows)


def loss_weights(t: Float[Tensor, " n"], recipe: Recipe) -> Float[Tensor, " n"] | None:
    """What multiplies each row's squared error, float32 on the times' device; None where all weigh the same.

    A weight depends on its own time alone, so micro-batches and processes need no agreement; its mean over the law
    that times are drawn from is 1, so the learning rate keeps its meaning.

    - "unbiased": ``1 / p(t)`` with p the density of the times, clipped at `WEIGHT_LIMIT`. Sampling from p then
      minimises what uniform sampling does (but for the clipped ends), with another variance.
    - "snr": ``(1 - t)^2 + t^2``. With ``z_t = (1 - t) z_0 + t eps``, the velocity is ``(z_t - z_0) / t``, so a
      velocity's squared error is that of ``z_0`` over ``t^2``, and this weight makes it ``(SNR + 1)`` times the error
      of ``z_0``, with ``SNR = ((1 - t) / t)^2``: the weighting of Salimans and Ho (2022). It is also the inverse
      of the velocity's variance given ``z_t`` for normal data of unit variance,
      ``2 - (2 t - 1)^2 / ((1 - t)^2 + t^2) = 1 / ((1 - t)^2 + t^2)``: weighted least squares, where every noise level
      adds the same noise to the gradient. Min-SNR (Hang et al., 2023) would be ``min((1 - t)^2, 5 t^2)``, which
      leaves the velocity at both ends of the path untrained, and the sampler needs it there.
    """
    if recipe.weighting == "none" or (recipe.weighting == "unbiased" and recipe.times != "logit_normal"):
        return None
    return (_raw_weight(t.double(), recipe) / _mean_weight(recipe)).float()


def _quantile(u: Tensor, recipe: Recipe) -> Tensor:
    """Uniform numbers to times of the recipe's law."""
    if recipe.times != "logit_normal":
        return u
    normal = torch.special.ndtri(u.clamp(_LEAST, 1 - _LEAST))
    return torch.sigmoid(recipe.logit_mean + recipe.logit_scale * normal)


def _raw_weight(t: Tensor, recipe: Recipe) -> Tensor:
    """The weight before it is scaled to mean 1."""
    if recipe.weighting == "snr":
        return (1 - t) ** 2 + t**2
    deviation = (torch.logit(t) - recipe.logit_mean) / recipe.logit_scale
    log_density = -0.5 * deviation.square() - math.log(recipe.logit_scale * math.sqrt(2 * math.pi))
    log_density = log_density - torch.log(t) - torch.log1p(-t)
    log_weight = (-log_density).nan_to_num(nan=math.inf)  # at 0 and 1 the density is 0: infinity less infinity
    return log_weight.clamp(max=math.log(WEIGHT_LIMIT)).exp()


def _mean_weight(recipe: Recipe) -> float:
    """Mean weight over the law of times, by the midpoint rule in its quantiles."""
    u = (torch.arange(_QUADRATURE, dtype=torch.float64) + 0.5) / _QUADRATURE
    return float(_raw_weight(_quantile(u, recipe), recipe).mean())
