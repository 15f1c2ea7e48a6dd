"""Standardising features by their moments on training rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.errors import InputError

CHUNK = 1 << 18  # numbers in float64 at a time: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale``; features that do not vary become zero."""

    mean: Float[Tensor, " f"]
    scale: Float[Tensor, " f"]
    """Standard deviation of the training rows, infinite for features that do not vary."""

    @classmethod
    def of(cls, x: Float[Tensor, "n f"]) -> Scaler:
        """Moments of training rows, float64.

        Raises:
            InputError: features that are not finite.
        """
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
        """The scaler of some features."""
        return Scaler(self.mean[units], self.scale[units])

    def exact(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Standardised features, float64."""
        return (x.double() - self.mean) / self.scale

    def __call__(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Standardised features, float32 to 23 significant bits (the last one is free for `aucs` to sort with).

        Values become equal that are once the mean is subtracted, as a probe sees them: gates leave activations such as
        1e-30 beside others of 10, and to a probe their order means nothing.
        """
        width = columns(x)
        parts = zip(x.split(width, dim=1), self.mean.split(width), self.scale.split(width), strict=True)
        z = [Scaler(mean, scale).exact(part).float() for part, mean, scale in parts]
        return (torch.cat(z, dim=1).view(torch.int32) & -2).view(torch.float32)


def columns(x: Tensor) -> int:
    """Features of `x` that are turned to float64 together."""
    return max(1, CHUNK // len(x))
