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

from latentprior.utils.errors import InputError

TIMEOUT = timedelta(minutes=30)  # the longest that processes wait for one another, as for one that loads its model


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

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


ALONE = World()


def is_main() -> bool:
    """Whether this is the process that speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """This process's place among those that torchrun started; alone without torchrun.

    On GPUs each process of a machine takes its own. One that fails does not wait for the others: torchrun ends them.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= gpus:
            raise InputError(f"process {local} of this machine has no GPU: there are {gpus}; lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    world = World(dist.get_rank(), dist.get_world_size())
    world.wait()  # until all are connected: one that failed before would leave the others waiting for it
    yield world
    world.wait()
    dist.destroy_process_group()
