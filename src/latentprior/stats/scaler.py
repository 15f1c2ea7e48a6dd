"""Standardising features by their moments on training rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.utils.errors import InputError

CHUNK = 1 << 18  # numbers in float64 at a time: few enough to stay in the processor's cache
STEPS = 2.0**40


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale``; features that do not vary become zero."""

    mean: Float[Tensor, " f"]
    scale: Float[Tensor, " f"]
    """Standard deviation of the training rows, infinite for features that do not vary."""

    @classmethod
    def of(cls, x: Float[Tensor, "n f"]) -> Scaler:
        means, scales = [], []
        for part in x.split(columns(x), dim=1):
            mean = part.double().mean(dim=0)
            deviation = part.double() - mean
            varies = (part != part[0]).any(dim=0)  # rounding leaves constants a deviation
            means.append(mean)
            scales.append(torch.where(varies, deviation.square_().mean(dim=0).sqrt_(), torch.inf))
        mean = torch.cat(means)
        if not mean.isfinite().all():
            raise InputError("features to be probed must be finite")
        return cls(mean, torch.cat(scales))

    def select(self, units: Int[Tensor, " k"]) -> Scaler:
        return Scaler(self.mean[units], self.scale[units])

    def __call__(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Standardised features, float64, in steps of 2^-40.

        Gates leave values such as 1e-30 beside others of 10. In floating point their order does not survive the mean's
        subtraction and the probe's intercept, not cleanly either: the steps say which values count as equal.
        """
        return ((x.double() - self.mean) / self.scale).mul_(STEPS).round_().div_(STEPS)


def columns(x: Tensor) -> int:
    """Features of `x` that are turned to float64 together."""
    return max(1, CHUNK // len(x))
