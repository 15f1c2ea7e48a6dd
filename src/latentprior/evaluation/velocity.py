"""The velocity at single noise levels, both ends of the path among them, beside a Gaussian's closed form."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.prior import flow
from latentprior.prior.glp import GLP
from latentprior.stats.bootstrap import bootstrap_interval
from latentprior.stats.gaussian import GaussianPrior
from latentprior.utils.random import normal

# Likelihoods integrate the velocity over the whole path, and near its ends a linear map is nearly all that there is.
TIMES = (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)
ROWS = 1024  # of one pass


def velocity_errors(
    glp: GLP, gaussian: GaussianPrior, x: Float[Tensor, "n d"], layer: int | None, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean squared error of the velocity, ``mean_d (u - (eps - z_0))^2``, at each of `TIMES`, a row for each.

    A row has the error of the prior, of the full-covariance Gaussian that is fitted to standardised training rows, and
    their difference with a 95% bootstrap interval over activations. Every time has the same noise.
    """
    z_0 = glp.normalizer.normalize(x, layer)
    noise = normal(*z_0.shape, seed=seed, device=z_0.device)
    rows = []
    for t in TIMES:
        errors = [
            _errors(glp, gaussian, *part, t, layer) for part in zip(z_0.split(ROWS), noise.split(ROWS), strict=True)
        ]
        ours, linear = torch.cat(errors, dim=1).double().cpu()
        difference = (ours - linear).numpy()
        interval = bootstrap_interval(difference, seed=seed)
        rows.append(
            {"t": t, "prior": float(ours.mean()), "gaussian": float(linear.mean())}
            | {"difference": float(difference.mean()), "interval": interval}
        )
    return rows


@torch.no_grad()
def _errors(
    glp: GLP, gaussian: GaussianPrior, z_0: Tensor, noise: Tensor, t: float, layer: int | None
) -> Float[Tensor, "2 n"]:
    z_t, target = flow.interpolate(z_0, noise, t), flow.target(z_0, noise)
    predicted = (glp.velocity(z_t, t, layer), gaussian.velocity(z_t, t))
    return torch.stack([(u - target).square().mean(dim=-1) for u in predicted])
