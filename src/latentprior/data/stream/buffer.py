"""A mixing buffer: the language model fills it, batches are drawn from it.

It holds the rows of a number of batches: of each document shard of this process as many times its quota, in the
shard's order. They are drawn in random order, each once, and when the last batch is drawn the buffer is filled again.

So the rows of batch k follow from the text, the options and the seed alone, and a position is the shards' cursors when
the buffer was filled. To continue, it is filled again from there, and the batches drawn already are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from latentprior.config.base import size_of
from latentprior.data.activations import ActivationBatch
from latentprior.data.partition import Batch, BatchPartition
from latentprior.data.store.manifest import LEFT_OUT
from latentprior.data.store.writer import StoreWriter
from latentprior.data.stream.live import LiveActivations
from latentprior.data.stream.sharding import Cursor
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.chips import device_memory
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator


class MixingBuffer:
    """Batches of live activations.

    Args:
        live: the document shards; its `statistics` has been called, or its medians set.
        buffered_batches: how many the buffer holds.
        steps: batches that will be drawn in all; the last filling is no larger than they need.
        keep: store that also gets all rows, in the order of the shards.
    """

    def __init__(
        self,
        live: LiveActivations,
        buffered_batches: int,
        device: torch.device,
        *,
        seed: int = 0,
        steps: int | None = None,
        keep: StoreWriter | None = None,
    ) -> None:
        self.live, self.buffered_batches, self.seed, self.steps, self.keep = live, buffered_batches, seed, steps, keep
        self.seconds = 0.0  # copying into the buffer, drawing from it
        self._partition = live.partition
        rows = buffered_batches * self._partition.rows
        dtype = next(live.model.parameters()).dtype
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self._x = torch.empty(rows, live.width, dtype=dtype, device=device, pin_memory=pinned)
        self._layer = torch.empty(rows, dtype=torch.int32, device=device) if len(live.layers) > 1 else None
        self._filled_at: dict[int, Cursor] = {}

    def batches(self, step: int = 0, position: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Batches from number `step` on, where `position` was saved, to the text's end, the last with fewer rows."""
        self._shards = self.live.open(position)
        filling, drawn = divmod(step, self.buffered_batches)
        while order := self._fill(filling):
            for i in range(drawn, len(order)):
                began = time.perf_counter()
                batch = self._draw(order[i])
                if i == len(order) - 1:
                    self._filled_at = self.live.cursors()  # the next batch is the first of a new filling
                self.seconds += time.perf_counter() - began
                yield batch
            filling, drawn = filling + 1, 0

    def position(self) -> dict[str, Any]:
        """What continues after the batches drawn so far, together with their number; called by every process."""
        return self.live.position(self._filled_at)

    def _fill(self, filling: int) -> list[Tensor]:
        """The rows [rows] of each batch, -1 where a shard's text has ended."""
        self._filled_at = self.live.cursors()
        batches = self.buffered_batches
        if self.steps is not None:
            batches = min(batches, self.steps - filling * batches)
        if batches <= 0:
            return []
        orders, begin = [], 0
        for i, (number, shard) in enumerate(self._shards.items()):
            count = batches * self._partition.quota(number)
            before, pieces = shard.cursor, list(shard.read(count))
            began = time.perf_counter()
            end = begin
            for piece in pieces:
                self._x[end : end + len(piece)] = piece.x
                if self._layer is not None:
                    self._layer[end : end + len(piece)] = piece.layer
                end += len(piece)
            order = torch.full((count,), -1)
            generator = keyed_generator(self.seed, filling, number)
            order[: end - begin] = torch.randperm(end - begin, generator=generator) + begin
            orders.append(order.view(batches, -1))
            begin += count
            self.seconds += time.perf_counter() - began
            if self.keep is not None and pieces:
                self._store(ActivationBatch.cat(pieces), filling * len(self._shards) + i + 1, before, shard.cursor)
        joined = torch.cat(orders, dim=1)
        return list(joined[(joined >= 0).any(dim=1)])

    def _store(self, rows: ActivationBatch, number: int, before: Cursor, after: Cursor) -> None:
        """Keep a shard's rows on disk, unless this run did so before it was interrupted."""
        assert self.keep is not None
        if number > self.keep.next_batch:
            left_out = {reason: getattr(after, reason) - getattr(before, reason) for reason in LEFT_OUT}
            self.keep.append(rows, next_batch=number, left_out=left_out)

    def _draw(self, order: Tensor) -> Batch:
        given = order >= 0
        row_index = None if given.all() else given.nonzero().squeeze(1)
        rows = (order if row_index is None else order[row_index]).to(self._x.device, non_blocking=True)
        layer = None if self._layer is None else self._layer[rows]
        return Batch(self._x[rows], layer, row_index)


def buffered_batches(size: str, partition: BatchPartition, hookpoints: Sequence[Hookpoint], itemsize: int) -> int:
    """How many batches a buffer of a size like "64k" (activations) or "2GB" holds; none is an `InputError`."""
    amount, in_bytes = size_of("buffer", size)
    rows = amount // (hookpoints[0].width * itemsize) if in_bytes else amount
    if rows < partition.batch:
        held = f"{size} ({rows} activations)" if in_bytes else f"{rows} activations"
        raise InputError(f"a buffer of {held} does not hold a batch of {partition.batch}: raise buffer")
    return rows // partition.batch


def check_memory(size: int, device: torch.device) -> None:
    """Raise `InputError` if a buffer of `size` bytes is larger than the memory of `device`."""
    memory = device_memory(device)
    if size > memory:
        raise InputError(
            f"a buffer of {size / 1e9:.3g} GB in each process is larger than the memory of {device}, "
            f"{memory / 1e9:.3g} GB: lower buffer"
        )
