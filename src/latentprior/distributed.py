"""Which of several processes this is, and what they tell one another; the only reader of torchrun's environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentprior.errors import InputError

TIMEOUT = timedelta(minutes=30)  # the longest that processes wait for one another, as for one that loads its model


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """How many there are."""

    @property
    def main(self) -> bool:
        """Whether it is the one that writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor of any shape, the same on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, on each of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def first(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        return self.gather(value)[0]


def is_main() -> bool:
    """Whether this is the process that speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """This process's place among those that torchrun started; alone without torchrun.

    On GPUs each process of a machine takes its own. When the block ends well the processes part; when one fails, it
    does not wait for the others, and torchrun ends them.

    Raises:
        InputError: more processes on a machine than it has GPUs.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
        return
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= gpus:
            raise InputError(f"process {local} of this machine has no GPU: there are {gpus}; lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    world = World(dist.get_rank(), dist.get_world_size())
    world.wait()  # all are there: one that fails at once does not break the others' meeting
    yield world
    world.wait()
    dist.destroy_process_group()


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
