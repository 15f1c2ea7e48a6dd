"""A Gaussian as a prior: the baseline that every generative prior has to beat, and a flow whose velocity is known.

Time and path are the paper's: ``z_t = (1 - t) z_0 + t eps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from latentprior.stats.frechet import GaussianMoments, rows
from latentprior.utils.errors import unknown

Covariance = Literal["full", "diagonal"]


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """``N(mean, V diag(variances) V')``, in the space of the activations it was fitted to; all float64.

    Methods compute in the dtype of their input, at least float32. Directions without variance are allowed.
    """

    mean: Tensor
    variances: Tensor
    """[d], along the columns of `directions`."""
    directions: Tensor | None
    """[d, d], orthogonal; None for a diagonal covariance."""

    @classmethod
    def fit(cls, z: Tensor, covariance: Covariance = "full") -> GaussianPrior:
        """Fits mean and unbiased covariance of ``z: [N, d]``; stays on the device of `z`."""
        if covariance not in get_args(Covariance):
            raise unknown("covariance", covariance, get_args(Covariance))
        z = rows(z, least=2)
        if covariance == "diagonal":
            variances, mean = torch.var_mean(z.double(), dim=0)
            return cls(mean, variances, None)
        moments = GaussianMoments.of(z)
        variances, directions = np.linalg.eigh(moments.cov)
        mean, variances, directions = (torch.as_tensor(v).to(z.device) for v in (moments.mean, variances, directions))
        return cls(mean, variances.clamp(min=0), directions)

    def sample(self, n: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws ``[n, d]`` from the Gaussian, on its device."""
        noise = torch.randn(n, len(self.mean), generator=generator, device=generator.device, dtype=dtype)
        noise = noise.to(self.mean.device)
        return self.mean.to(dtype) + self._to_space(noise * self.variances.sqrt().to(dtype))

    def posterior_mean(self, z_t: Tensor, t: float | Tensor) -> Tensor:
        """``E[z_0 | z_t: [..., d]]``, the best reconstruction at `t`, a scalar or one for each leading index."""
        return self._conditional(z_t, t, of_data=1.0, of_noise=0.0)

    def velocity(self, z_t: Tensor, t: float | Tensor) -> Tensor:
        """``E[eps - z_0 | z_t]``: the velocity that a perfectly trained flow has at ``z_t: [..., d]``."""
        return self._conditional(z_t, t, of_data=-1.0, of_noise=1.0)

    def _conditional(self, z_t: Tensor, t: float | Tensor, *, of_data: float, of_noise: float) -> Tensor:
        """``E[of_data z_0 + of_noise eps | z_t]``: along a component, z_0, eps and z_t are jointly Gaussian."""
        dtype = torch.promote_types(z_t.dtype, torch.float32)
        t = torch.as_tensor(t, dtype=dtype, device=z_t.device)[..., None]
        mean, variances = self.mean.to(z_t.device, dtype), self.variances.to(z_t.device, dtype)
        covariance = of_data * (1 - t) * variances + of_noise * t
        variance = (1 - t).square() * variances + t.square()
        # Without variance z_t is certain and tells nothing: 0 / 0, only at t = 0.
        gain = torch.where(variance > 0, covariance / variance, 0.0)
        centred = z_t.to(dtype) - (1 - t) * mean
        if self.directions is not None:
            centred = centred @ self.directions.to(centred)
        return (of_data * mean + self._to_space(gain * centred)).to(z_t.dtype)

    def _to_space(self, components: Tensor) -> Tensor:
        return components if self.directions is None else components @ self.directions.to(components).T
