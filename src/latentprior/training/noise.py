"""The random numbers of a training step: noise and noise levels, a function of seed, step and lane alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.config import Recipe
from latentprior.data.partition import Deal
from latentprior.training.times import draw_times, loss_weights, most_distinct
from latentprior.utils.devices import to_device
from latentprior.utils.random import keyed_generator


@dataclass(frozen=True)
class Draws:
    """Noise [n, d] on the trainer's device, and times [n] and loss weights [n] (None: equal) on the CPU."""

    noise: Float[Tensor, "n d"]
    t: Float[Tensor, " n"]
    weight: Float[Tensor, " n"] | None = None
    most_distinct: int | None = None
    """How many distinct times there can be; the time path is padded to it on a GPU, where shapes must not change."""

    @classmethod
    def of(cls, seed: int, step: int, deal: Deal, width: int, recipe: Recipe, device: torch.device) -> Draws:
        """The draws of one process for a full batch, its lanes one after another.

        The lanes take the batch's ascending times in an order of their own in every step: no lane sees one noise
        level more often than another.
        """
        order = np.random.default_rng((seed % 2**64, step)).permutation(deal.lanes)
        quotas = np.array([deal.quota(int(lane)) for lane in order])
        starts = np.empty(deal.lanes, np.int64)
        starts[order] = quotas.cumsum() - quotas
        own = torch.cat([torch.arange(starts[lane], starts[lane] + deal.quota(lane)) for lane in deal.owned])
        t = draw_times(seed, step, deal.batch, recipe)
        weight = loss_weights(t, recipe)
        noise = torch.empty(deal.rows, width, device=device)
        begin = 0
        for lane in deal.owned:
            end = begin + deal.quota(lane)
            noise[begin:end].normal_(generator=keyed_generator(seed, step, lane, device=device))
            begin = end
        most = None if recipe.times == "uniform" else most_distinct(recipe, deal.rows)
        return cls(noise, t[own], None if weight is None else weight[own], most)

    def select(self, places: Int[Tensor, " m"] | slice) -> Draws:
        """The draws of some rows."""
        weight = None if self.weight is None else self.weight[places]
        on_device = to_device(places, self.noise.device) if isinstance(places, Tensor) else places
        return Draws(self.noise[on_device], self.t[places], weight, self.most_distinct)

    def times(self) -> tuple[Float[Tensor, " u"], Int[Tensor, " n"]]:
        """The distinct times, and which of them each row has, on the noise's device."""
        distinct, index = torch.unique(self.t, return_inverse=True)
        device = self.noise.device
        if device.type == "cpu":
            return distinct, index
        if self.most_distinct is not None and len(distinct):
            distinct = torch.cat([distinct, distinct[-1:].expand(self.most_distinct - len(distinct))])
        return to_device(distinct, device), to_device(index, device)
