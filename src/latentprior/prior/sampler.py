"""Integrating a denoiser's flow for many activations at once: `GLP.sample` and `GLP.project`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.utils.errors import InputError

CPU_CHUNK = 1024  # rows integrated together on a CPU: their hidden units stay in its cache


def integrate(
    denoiser: Denoiser,
    z: Float[Tensor, "n d"],
    schedule: flow.Schedule,
    layers: Tensor | None,
    held: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "n d"]:
    """Integrate along the schedule; the time path is computed once for all rows and steps.

    `layers` of a multi-layer prior are a scalar or [N]; `held` are directions [N, d] and the components [N] along them
    that the data prediction keeps.
    """
    times = sorted(set(schedule.times()))
    tables = denoiser.cached_factors(times)
    row_of = {t: i for i, t in enumerate(times)}

    def integrate_part(part: Tensor, part_layers: Tensor | None, *part_held: Tensor) -> Tensor:
        extra = None if part_layers is None else denoiser.layer_factors(part_layers)

        def velocity(z_t: Tensor, t: float) -> Tensor:
            i = row_of[t]
            factors = [table[i : i + 1] for table in tables]
            if extra is not None:
                factors = [a + b for a, b in zip(factors, extra, strict=True)]
            return denoiser.run(z_t, factors)

        return flow.integrate(flow.holding(velocity, *part_held) if part_held else velocity, part, schedule)

    chunk = CPU_CHUNK if z.device.type == "cpu" else max(len(z), 1)
    layer_parts = repeat(layers) if layers is None or layers.ndim == 0 else layers.split(chunk)
    held_parts = (part.split(chunk) for part in held or ())
    return torch.cat([integrate_part(*part) for part in zip(z.split(chunk), layer_parts, *held_parts, strict=False)])


def by_row(name: str, value: Tensor, leading: Sequence[int]) -> Tensor:
    """`value` itself if it is a scalar, else one entry for each activation of shape [*leading, d]: [N]."""
    if value.ndim == 0:
        return value
    try:
        return value.expand(*leading).reshape(-1)
    except RuntimeError as error:
        raise InputError(f"{name} has shape {list(value.shape)}, activations have {list(leading)}") from error
