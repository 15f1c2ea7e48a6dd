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
    places: Tensor | None = None
    """Which of the process's rows of a full batch these are [n]; None: all of them, in order."""


@dataclass(frozen=True)
class Deal:
    """How the rows of every batch are dealt over lanes, and lanes over processes.

    A lane is an independent share of the data with random numbers of its own. What a lane contributes to a batch
    depends on the lane alone, so batches are the same whatever the number of processes.
    """

    batch: int
    """Rows of a batch, over all processes."""
    lanes: int = 1
    """Shares of every batch."""
    world: World = World()

    def __post_init__(self) -> None:
        if self.batch % self.world.size:
            raise InputError(f"a batch of {self.batch} cannot be dealt evenly over {self.world.size} processes")
        if not self.world.size <= self.lanes <= self.batch:
            raise InputError(
                f"lanes must lie between the number of processes, {self.world.size}, and the batch size, {self.batch}; "
                f"got {self.lanes}"
            )

    def quota(self, lane: int) -> int:
        """Rows of a lane in every batch."""
        return self.batch // self.lanes + (lane < self.batch % self.lanes)

    def start(self, lane: int) -> int:
        """The lane's first row in a batch."""
        return lane * (self.batch // self.lanes) + min(lane, self.batch % self.lanes)

    @property
    def owned(self) -> range:
        """This process's lanes; every size-th one, so that larger and smaller quotas are dealt evenly."""
        return range(self.world.rank, self.lanes, self.world.size)

    @property
    def rows(self) -> int:
        """Rows of this process in every batch."""
        return sum(map(self.quota, self.owned))

    @property
    def most_rows(self) -> int:
        """The largest of the processes' shares."""
        return sum(map(self.quota, range(0, self.lanes, self.world.size)))

    def positions(self) -> Tensor:
        """The places [rows] in a batch of this process's rows, lane after lane."""
        return torch.cat([torch.arange(self.start(lane), self.start(lane) + self.quota(lane)) for lane in self.owned])


def lanes_for(batch: int, size: int, each: int = 24) -> int:
    """Lanes that `size` processes can share: 24 (so 1, 2, 3, 4, 6, 8, 12 or 24 get equal shares), or more of them."""
    return min(each * -(-size // each), batch)
