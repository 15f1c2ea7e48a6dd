"""Path, loss, time grids and solvers of the flow; the only module that knows the time convention.

``t = 0`` is data and ``t = 1`` is noise: ``z_t = (1 - t) z_0 + t eps``, velocity ``eps - z_0`` (paper, flow matching).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.config import GRIDS, SOLVERS, Grid, Solver
from latentprior.utils.errors import InputError, unknown

Velocity = Callable[[Tensor, float], Tensor]
TWO_STAGE: tuple[Solver, ...] = ("midpoint", "heun")
SKIP_WIDTH = 0.05  # within this of either end of the path, the skip counts for more than the network
TRAIN_GRID = 1000  # the official code draws training times from a grid of 1000


def interpolate(
    z_0: Float[Tensor, "*n d"], noise: Float[Tensor, "*n d"], t: Float[Tensor, " ..."] | float
) -> Float[Tensor, "*n d"]:
    """The point ``z_t`` of the straight path between data and noise; `t` is a scalar or has one entry a row."""
    if isinstance(t, Tensor) and t.ndim:
        t = t[..., None]
    return z_0 + t * (noise - z_0)


def target(z_0: Float[Tensor, "*n d"], noise: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """The velocity of the path, ``eps - z_0``."""
    return noise - z_0


def normal_skip(t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``c(t)`` such that ``c(t) z_t`` is the velocity where the data is standard normal: ``E[eps - z_0 | z_t]``.

    ``c(t) = (2 t - 1) / ((1 - t)^2 + t^2)``, the covariance of velocity and `z_t` over the variance of `z_t`.
    """
    return (2 * t - 1) / ((1 - t) ** 2 + t**2)


def network_scale(t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Factor of the network's output beside `normal_skip`: zero at both ends of the path, nearly one between.

    ``t (1 - t) / sqrt((t^2 + w^2) ((1 - t)^2 + w^2))``. At the ends the skip is exact for any standardised data: the
    activation says nothing about the noise, nor the noise about the activation.
    """
    s = 1 - t
    return t * s * torch.rsqrt((t**2 + SKIP_WIDTH**2) * (s**2 + SKIP_WIDTH**2))


def training_times(u: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Uniform draws `u` in [0, 1) to the grid ``linspace(1, 0.001, 1000)[floor(1000 u)]``, so that times repeat."""
    index = (u * TRAIN_GRID).long().clamp_(0, TRAIN_GRID - 1)
    return official_knots(TRAIN_GRID).to(u.device)[index]


def official_knots(steps: int) -> Float[Tensor, " steps"]:
    """Times of the official sampler: `steps` points from 1 to 0.001, the step to 0 not included.

    In the precision and order of diffusers' FlowMatchEulerDiscreteScheduler: the values agree bit for bit.
    """
    smallest = float(np.float32(0.001)) * TRAIN_GRID
    return torch.from_numpy(np.linspace(TRAIN_GRID, smallest, steps) / TRAIN_GRID).float()


@dataclass(frozen=True)
class Schedule:
    """How a solver goes from noise to data; made by `schedule`."""

    solver: Solver
    knots: list[float]  # times between which it steps, from the start down to 0
    stages: list[int]  # velocity evaluations of each interval, 1 or 2

    @property
    def nfe(self) -> int:
        """Velocity evaluations in all."""
        return sum(self.stages)

    def times(self) -> list[float]:
        """The times at which `integrate` evaluates the velocity, in order."""
        times: list[float] = []
        integrate(lambda z, t: (times.append(t), z)[1], torch.zeros(1, 1), self)
        return times


def schedule(steps: int, *, t_start: float = 1.0, solver: Solver = "euler", grid: Grid = "uniform") -> Schedule:
    """Times and evaluations of an integration from `t_start` down to 0.

    `steps` are the evaluations. Two-stage solvers take intervals twice as long; an odd number leaves one Euler interval
    at the end. With ``grid="official"`` they are counted as the official code does: of the whole way from 1, of which a
    later start, at entry ``floor(steps (1 - t_start))``, executes the rest, and two-stage solvers evaluate twice in all
    intervals but the last, a thousandth wide.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if not 0 <= t_start <= 1:
        raise InputError(f"t_start must lie in [0, 1] (0 is data, 1 is noise), got {t_start}")
    two_stage = solver in TWO_STAGE
    if grid == "official":
        start = int(steps * (1 - t_start) + 1e-9)  # 20 * (1 - 0.9) is a hair under 2 in floating point
        knots = [*official_knots(steps)[start:].tolist(), 0.0]
        two = max(len(knots) - 2, 0) if two_stage else 0
    else:
        knots = [t_start * (1 - done / steps) for done in [*range(0, steps, 2 if two_stage else 1), steps]]
        two = steps - (len(knots) - 1)
    return Schedule(solver, knots, [2] * two + [1] * (len(knots) - 1 - two))


def holding(velocity: Velocity, g: Float[Tensor, "n d"], value: Float[Tensor, " n"]) -> Velocity:
    """The velocity whose data prediction ``z_t - t v`` has the component ``g . z_0 = value``, in each row.

    Where it has not, the prediction is moved as little as that takes, along `g` (rows of zero hold nothing). The flow
    stays free in all other directions, and adapts them to the held one.
    """
    towards = g / g.square().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)

    def held(z_t: Tensor, t: float) -> Tensor:
        v = velocity(z_t, t)
        if t == 0:  # the prediction is z_t itself, whatever the velocity
            return v
        excess = (g * (z_t - t * v)).sum(dim=-1) - value
        return v + (excess / t)[:, None] * towards

    return held


def hold(z: Float[Tensor, "n d"], g: Float[Tensor, "n d"], value: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """`z` with ``g . z = value`` in each row, moved as little as that takes."""
    norm = g.square().sum(dim=-1).clamp(min=torch.finfo(g.dtype).tiny)
    return z + ((value - (g * z).sum(dim=-1)) / norm)[:, None] * g


def integrate(velocity: Velocity, z: Float[Tensor, "n d"], schedule: Schedule) -> Tensor:
    """Integrate ``dz/dt = velocity(z, t)`` along the schedule's knots, from the first to the last.

    "euler" is the paper's sampler (order 1). "midpoint" and "heun" evaluate twice an interval (order 2). "ab2",
    Adams-Bashforth, is of order 2 with one evaluation an interval: it extrapolates from the one before.
    """
    before: tuple[Tensor, float] | None = None  # velocity and width of the interval before
    for t, t_next, stages in zip(schedule.knots, schedule.knots[1:], schedule.stages, strict=False):
        step = t_next - t
        v = velocity(z, t)
        if stages == 2 and schedule.solver == "midpoint":
            slope = velocity(z + step / 2 * v, t + step / 2)
        elif stages == 2 and schedule.solver == "heun":
            slope = (v + velocity(z + step * v, t_next)) / 2
        elif schedule.solver == "ab2" and before is not None:
            slope = v + step / (2 * before[1]) * (v - before[0])
        else:
            slope = v
        before = (v, step)
        z = z + step * slope
    return z
