"""The meta-neurons of a prior at raw activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.prior import flow
from latentprior.prior.denoiser import Block
from latentprior.prior.glp import GLP
from latentprior.utils.random import keyed_generator, normal

_NOISE = 1  # stream of random numbers


class UnitReader:
    """The meta-neurons of a prior at one noise level, block by block, so that one block's are held at a time.

    The noises are the same for every token: a unit's value depends on the activation alone (paper, 1-D probing).

    Args:
        noises: how many to average over.
    """

    def __init__(self, glp: GLP, *, t: float, noises: int = 1, layer: int | None = None, seed: int = 0) -> None:
        self._normalizer, self._denoiser, self._layer, self._t = glp.normalizer, glp.denoiser, layer, t
        self.blocks = [block for block in glp.denoiser.layers if isinstance(block, Block)]
        self.d_mlp = self.blocks[0].up_proj.out_features
        self.noises = normal(noises, 1, glp.width, seed=keyed_generator(seed, _NOISE), device=glp.device)
        layers: Any = None  # as the denoiser wants them: none for a prior of one layer
        if glp.denoiser.layer_embed is not None:
            layers = glp.normalizer.layers[glp.normalizer.rows(layer)]
        with torch.no_grad():
            self._factors = glp.denoiser.row_factors(torch.tensor(t, device=glp.device), layers)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "n d_mlp"]]:
        """Each block's units at raw activations [N, d], the mean over the noises, in the denoiser's precision."""
        z_0 = self._normalizer.normalize(x, self._layer)
        noisy = (flow.interpolate(z_0, noise.expand_as(z_0), self._t) for noise in self.noises)
        for units in zip(*(self._denoiser.units(z_t, self._factors) for z_t in noisy), strict=True):
            total = reduce(torch.add, units)
            yield total if len(units) == 1 else total / len(units)
