"""Batches, and how their rows are divided over document shards and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError


class Batch(NamedTuple):
    """One process's rows of a batch."""

    x: Tensor
    """Raw activations [n, d], on any device."""
    layer: Tensor | None = None
    """Their layers [n], if there are several."""
    row_index: Tensor | None = None
    """Which of the process's rows of a full batch these are [n]; None: all of them, in order."""


@dataclass(frozen=True)
class BatchPartition:
    """How the rows of every batch come from document shards, and which process serves which shards.

    What a shard contributes to a batch depends on the shard alone, so batches are the same for any number of processes.
    """

    batch: int
    """Rows of a batch, over all processes."""
    shards: int = 1
    world: World = World()

    def __post_init__(self) -> None:
        if self.batch % self.world.size:
            raise InputError(f"a batch of {self.batch} cannot be divided evenly over {self.world.size} processes")
        if not self.world.size <= self.shards <= self.batch:
            limits = f"the number of processes, {self.world.size}, and the batch size, {self.batch}"
            raise InputError(f"document_shards must lie between {limits}; got {self.shards}")

    def quota(self, shard: int) -> int:
        """Rows of a shard in every batch."""
        return self.batch // self.shards + (shard < self.batch % self.shards)

    @property
    def owned(self) -> range:
        """This process's shards; every size-th one, so that larger and smaller quotas are spread evenly."""
        return range(self.world.rank, self.shards, self.world.size)

    @property
    def rows(self) -> int:
        """Rows of this process in every batch."""
        return sum(map(self.quota, self.owned))

    @property
    def most_rows(self) -> int:
        """The largest of the processes' shares."""
        return sum(map(self.quota, range(0, self.shards, self.world.size)))

    def positions(self) -> Tensor:
        """Where this process's rows lie in a batch, [rows], shard after shard."""
        parts = torch.arange(self.batch).split([self.quota(shard) for shard in range(self.shards)])
        return torch.cat([parts[shard] for shard in self.owned])


def shards_for(batch: int, size: int, each: int = 24) -> int:
    """Document shards for `size` processes: 24 (so 1, 2, 3, 4, 6, 8, 12 or 24 get equal shares), or more of them."""
    return min(each * -(-size // each), batch)
