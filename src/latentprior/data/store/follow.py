"""Training on a store while another process still records it: every row once, each waiting for the other.

The trainer reads whole shards, in order, and releases what it no longer needs, for which a recorder with a disk budget
waits. Neither waits for ever: a batch needs at most two shards, which the budget holds, and a trainer that runs dry
while the recorder waits is asked to save its state and release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprior.data.store import backpressure
from latentprior.data.store import manifest as files
from latentprior.data.store.reader import ActivationStore, Shard
from latentprior.utils.errors import InputError, Stopped

Rows = tuple[Tensor, Tensor | None]
"""Activations x [B, d] in the stored dtype, and layer [B] int64, or None for a store of one layer."""

POLL = 0.2  # seconds before the second look; then doubling


def wait_for_rows(
    folder: str | Path, rows: int, wait_seconds: float, *, poll: float = POLL, stop: Callable[[], bool] = lambda: False
) -> ActivationStore:
    """Open a store, its moments read, once enough is recorded to take statistics from.

    Args:
        folder: the store, which need not be there yet.
        rows: how many are enough, of all layers together; fewer are if no more would come.
        wait_seconds: give up if nothing new comes for this long.
        stop: asked at every look, at least once a second; if it says so, `Stopped` is raised.
    """
    folder, recorded = Path(folder), -1
    while True:
        for _ in _looks(folder, wait_seconds, poll, stop):
            if (folder / files.MANIFEST).exists():
                manifest = files.read_manifest(folder)
                before, recorded = recorded, manifest["evicted"] + manifest["rows"]
                if recorded >= rows or manifest["complete"] or backpressure.is_waiting(folder):
                    return _open_live(folder)
                if recorded > before:
                    break  # there is progress: wait anew


class Follower(Iterator[Rows]):
    """Batches of every row of a store once, also of what is recorded meanwhile.

    The rows of a shard come in a random order, a function of the seed and the shard's number alone, one shard after
    the other; only the last batch of a complete store is short. A position is a shard and the number of its used rows.

    Attributes:
        on_wait: called between two batches when the next one has to wait while the recorder waits for a release:
            save `state` with the rest of the training state, then `release` it.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        *,
        seed: int,
        state: Mapping[str, int] | None = None,
        wait_seconds: float = 600.0,
        poll: float = POLL,
        stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[], object] | None = None,
    ) -> None:
        """Begin at `state`, or at the oldest shard; until the next `release` the recorder keeps everything from there.

        Args:
            wait_seconds: give up if nothing new comes for this long.
            stop: asked at every look; if it says so, the next batch raises `Stopped`, and `state` is that before it.
        """
        self.folder, self.on_wait, self._stop = Path(folder), on_wait, stop
        self._batch_size, self._seed, self._wait_seconds, self._poll = batch_size, seed, wait_seconds, poll
        self._manifest = files.read_manifest(self.folder)
        self._opened: _Opened | None = None
        if not 0 < batch_size <= self._manifest["shard_rows"]:
            raise InputError(
                f"a store that is still recorded gives batches of 1 to {self._manifest['shard_rows']} rows, the least "
                f"of its shards, got {batch_size}"
            )
        state = state or {"shard": self._manifest["first_shard"], "row": 0}
        self._shard, self._row = state["shard"], state["row"]
        self._check_position()
        self.release(self.state())

    def state(self) -> dict[str, int]:
        """The position after the last batch, as JSON values."""
        return {"shard": self._shard, "row": self._row}

    def release(self, state: Mapping[str, int]) -> None:
        """Let the recorder remove all that a follower which begins at `state` does not need."""
        if not self._manifest["complete"]:  # else nobody waits
            backpressure.write_consumed(self.folder, state["shard"])

    def __next__(self) -> Rows:
        if not self._is_ready():
            self._wait(self.on_wait)
        shard, row = self._shard, self._row
        pieces: list[Rows] = []
        missing = self._batch_size
        while missing and (opened := self._open(shard)) is not None:
            piece = opened.rows(row, row + missing)
            pieces.append(piece)
            missing -= len(piece[0])
            row += len(piece[0])
            if row == len(opened):
                shard, row = shard + 1, 0
        if not pieces:
            raise StopIteration
        self._shard, self._row = shard, row
        x = torch.cat([x for x, _ in pieces])
        return x, None if pieces[0][1] is None else torch.cat([layer for _, layer in pieces if layer is not None])

    def _look(self) -> None:
        self._manifest = files.read_manifest(self.folder)
        self._check_position()

    def _is_ready(self) -> bool:
        """Whether the next batch is there, as far as the manifest that was last read says."""
        place = self._shard - self._manifest["first_shard"]
        ahead = self._manifest["shards"][place : place + 2]
        return self._manifest["complete"] or sum(shard["rows"] for shard in ahead) - self._row >= self._batch_size

    def _wait(self, on_wait: Callable[[], object] | None) -> None:
        for _ in _looks(self.folder, self._wait_seconds, self._poll, self._stop):
            # In this order: a recorder that waits for room has written all that it can.
            stuck = backpressure.is_waiting(self.folder)
            self._look()
            if self._is_ready():
                return
            if stuck and on_wait is not None:
                on_wait()
                return self._wait(None)  # anew: saving a large model takes its time

    def _check_position(self) -> None:
        first, shards = self._manifest["first_shard"], self._manifest["shards"]
        place = self._shard - first
        if place < 0:
            raise InputError(
                f"shard {self._shard} of {self.folder} was removed before all of it was used: record with --wait, or "
                "with a larger disk budget"
            )
        if place > len(shards) or self._row >= (shards[place]["rows"] if place < len(shards) else 1):
            raise InputError(f"{self.folder} has no row {self._row} of shard {self._shard}: is it the same store?")

    def _open(self, number: int) -> _Opened | None:
        """The shard, or None after the last one."""
        if self._opened is None or self._opened.number != number:
            place = number - self._manifest["first_shard"]
            if place >= len(self._manifest["shards"]):
                return None
            try:
                self._opened = _Opened(self.folder, self._manifest, number, self._seed)
            except InputError:
                self._look()  # names the reason if it was removed meanwhile
                raise
        return self._opened


class _Opened:
    """A shard with the order in which its rows are used."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], number: int, seed: int) -> None:
        entry = manifest["shards"][number - manifest["first_shard"]]
        self.number = number
        self._shard = Shard(folder, entry, manifest["width"], files.DTYPES[manifest["dtype"]])
        several = len(manifest["hookpoints"]) > 1
        self._layer = torch.from_numpy(self._shard.column("layer").astype(np.int64)) if several else None
        rng = np.random.default_rng([seed % 2**64, number])
        self._order = torch.from_numpy(rng.permutation(len(self._shard)))

    def __len__(self) -> int:
        return len(self._shard)

    def rows(self, begin: int, end: int) -> Rows:
        chosen = self._order[begin:end]
        return self._shard.rows(chosen), None if self._layer is None else self._layer[chosen]


def _open_live(folder: Path) -> ActivationStore:
    """A store with its moments read, although its recorder may remove files between two looks."""
    while True:
        before = files.read_manifest(folder)
        try:
            store = ActivationStore(folder)
            store.moments()
            return store
        except InputError:
            if files.read_manifest(folder) == before:
                raise


def _looks(folder: Path, seconds: float, poll: float, stop: Callable[[], bool]) -> Iterator[None]:
    """Times to look for more in `folder`; an error once `stop` says so, or after `seconds`."""
    for _ in backpressure.polling(seconds, poll):
        if stop():
            raise Stopped(f"stopped while waiting for more of {folder}")
        yield
    raise InputError(f"nothing new was recorded in {folder} for {seconds:g} seconds: is its recorder running?")
