"""The random numbers of a training step: noise and noise levels, a function of seed, step and document shard alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.config import Recipe
from latentprior.data.partition import Batch, BatchPartition
from latentprior.training.times import draw_times, loss_weights, most_distinct
from latentprior.utils.devices import to_device
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator


@dataclass(frozen=True)
class NoiseSamples:
    """Noise [n, d] on the trainer's device, and times [n] and loss weights [n] (None: equal) on the CPU."""

    noise: Float[Tensor, "n d"]
    t: Float[Tensor, " n"]
    weight: Float[Tensor, " n"] | None = None
    most_distinct: int | None = None  # times there can be; the time path is padded to it on a GPU, where shapes stay

    @classmethod
    def draw(
        cls, seed: int, number: int, partition: BatchPartition, width: int, recipe: Recipe, device: torch.device
    ) -> NoiseSamples:
        """The samples of one process for a full batch, its document shards one after another.

        The shards take the batch's ascending times in an order of their own in every step: no shard sees one noise
        level more often than another. `number` is the step; with several samples for each activation, the step times
        their count plus which of them it is.
        """
        shards, quota = partition.shards, partition.quota
        order = np.random.default_rng((seed % 2**64, number)).permutation(shards)
        quotas = np.array([quota(int(shard)) for shard in order])
        starts = np.empty(shards, np.int64)
        starts[order] = quotas.cumsum() - quotas
        own = torch.cat([torch.arange(starts[shard], starts[shard] + quota(shard)) for shard in partition.owned])
        t = draw_times(seed, number, partition.batch, recipe)
        weight = loss_weights(t, recipe)
        noise = torch.empty(partition.rows, width, device=device)
        for part, shard in zip(noise.split([quota(s) for s in partition.owned]), partition.owned, strict=True):
            part.normal_(generator=keyed_generator(seed, number, shard, device=device))
        most = None if recipe.times == "uniform" else most_distinct(recipe, partition.rows)
        return cls(noise, t[own], None if weight is None else weight[own], most)

    def for_rows(self, batch: Batch) -> NoiseSamples:
        """The samples of the rows that `batch` has of a full one."""
        if batch.row_index is not None:
            return self.select(batch.row_index)
        if len(batch.x) == len(self.t):
            return self
        if len(batch.x):
            raise InputError(f"a batch has {len(batch.x)} rows, not {len(self.t)}")
        return self.select(slice(0))

    def select(self, rows: Int[Tensor, " m"] | slice) -> NoiseSamples:
        """The samples of some rows."""
        weight = None if self.weight is None else self.weight[rows]
        on_device = to_device(rows, self.noise.device) if isinstance(rows, Tensor) else rows
        return NoiseSamples(self.noise[on_device], self.t[rows], weight, self.most_distinct)

    def times(self) -> tuple[Float[Tensor, " u"], Int[Tensor, " n"]]:
        """The distinct times, and which of them each row has, on the noise's device."""
        distinct, index = torch.unique(self.t, return_inverse=True)
        device = self.noise.device
        if device.type == "cpu":
            return distinct, index
        if self.most_distinct is not None and len(distinct):
            distinct = torch.cat([distinct, distinct[-1:].expand(self.most_distinct - len(distinct))])
        return to_device(distinct, device), to_device(index, device)
