"""Document shards: independent streams of documents whose activations come in a fixed order, from any position on.

Of every `shards` documents in a row each shard gets one, in a random order: text with a period, such as questions with
their answers, would else give some shards the short documents and others the long ones. A shard's rows depend on
nothing but the text and the options.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from latentprior.config import TextConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.text import Document, Reader
from latentprior.data.tokens import TokenBatch, next_window

WINDOW = 1024  # documents of a shard that are tokenised and sorted by length together: less would leave more padding
SNAPSHOT = 4096  # documents between two remembered positions of the reader


@dataclass(frozen=True)
class Cursor:
    """A shard's position: the next row is number `row` of token batch number `skip` of the window.

    `documents` and `batches` of the shard lie before the window; the other counts are what was left out so far.
    """

    documents: int = 0
    batches: int = 0
    skip: int = 0
    row: int = 0
    sinks: int = 0
    nonfinite: int = 0
    cut_documents: int = 0
    cut_tokens: int = 0


class DocumentSharder:
    """Reads the text once and spreads it over shards, keeping what the shards of this process have not yet taken."""

    def __init__(
        self, text: TextConfig, shards: int, cursors: dict[int, Cursor], snapshot: dict[str, Any] | None = None
    ) -> None:
        """Start where the shards are: `cursors` of this process's ones, out of `shards` of all processes.

        `snapshot` is a position of the reader at or before all of them, as the method gave it.
        """
        self._shards = shards
        self._waiting: dict[int, deque[Document]] = {shard: deque() for shard in cursors}
        self._first = {shard: cursor.documents for shard, cursor in cursors.items()}
        self._reader = Reader(text, state=snapshot["reader"] if snapshot else None)
        self._next = snapshot["document"] if snapshot else 0
        self._round: tuple[int, list[int]] = (-1, [])
        self._snapshots: list[tuple[int, dict[str, Any]]] = [(self._next, self._reader.state())]

    def take(self, shard: int, count: int, characters: int | None = None) -> list[Document]:
        """The shard's next `count` documents, fewer once they hold `characters` characters or where the text ends."""
        return next_window(iter(lambda: self._next_of(shard), None), count, characters)

    def _next_of(self, shard: int) -> Document | None:
        waiting = self._waiting[shard]
        while not waiting and (document := next(self._reader, None)) is not None:
            round_, at = divmod(self._next, self._shards)
            owner = self._order(round_)[at]
            if owner in self._waiting and round_ >= self._first[owner]:
                self._waiting[owner].append(document)
            self._next += 1
            if self._next % SNAPSHOT == 0:
                self._snapshots.append((self._next, self._reader.state()))
        return waiting.popleft() if waiting else None

    def _order(self, round_: int) -> list[int]:
        if round_ != self._round[0]:
            self._round = round_, np.random.default_rng(round_).permutation(self._shards).tolist()
        return self._round[1]

    def snapshot(self, cursors: Sequence[Cursor]) -> dict[str, Any]:
        """The last remembered position of the reader that is not after any shard's; those before it are forgotten."""
        needed = min(cursor.documents for cursor in cursors) * self._shards
        at = bisect_right([document for document, _ in self._snapshots], needed) - 1
        del self._snapshots[:at]
        document, reader = self._snapshots[0]
        return {"document": document, "reader": reader}


class DocumentShard:
    """One shard's rows in their order, from `cursor` on.

    Args:
        take: gives the next documents, from those of the cursor's window on.
        tokenize: documents and the number of their first token batch -> their token batches.
        record: token batch -> its rows, and how many were left out.
    """

    def __init__(
        self,
        take: Callable[[int], list[Document]],
        tokenize: Callable[[list[Document], int], list[TokenBatch]],
        record: Callable[[TokenBatch], tuple[ActivationBatch, dict[str, int]]],
        cursor: Cursor,
    ) -> None:
        self._take, self._tokenize, self._record = take, tokenize, record
        self.cursor = cursor
        self._batches = self._recorded()
        self._held: tuple[ActivationBatch, dict[str, int]] | None = None

    def read(self, count: int) -> Iterator[ActivationBatch]:
        """The next `count` rows, in pieces; fewer only where the text ends."""
        while count > 0 and (held := self._held or next(self._batches, None)) is not None:
            self._held = held
            rows, left_out = held
            piece = rows.select(slice(self.cursor.row, self.cursor.row + count))
            count -= len(piece)
            if self.cursor.row + len(piece) == len(rows):
                self._finish(left_out)
            else:
                self.cursor = replace(self.cursor, row=self.cursor.row + len(piece))
            yield piece

    def read_batches(self, count: int) -> Iterator[ActivationBatch]:
        """The rows of the next `count` token batches, from the beginning of one."""
        for rows, left_out in islice(self._batches, count):
            self._finish(left_out)
            yield rows

    def _finish(self, left_out: dict[str, int]) -> None:
        self._held = None
        counts = {reason: getattr(self.cursor, reason) + count for reason, count in left_out.items()}
        self.cursor = replace(self.cursor, skip=self.cursor.skip + 1, row=0, **counts)

    def _recorded(self) -> Iterator[tuple[ActivationBatch, dict[str, int]]]:
        while window := self._take(WINDOW):
            batches = self._tokenize(window, self.cursor.batches)
            for batch in batches[self.cursor.skip :]:
                yield self._record(batch)
            documents, count = self.cursor.documents + len(window), self.cursor.batches + len(batches)
            self.cursor = replace(self.cursor, documents=documents, batches=count, skip=0)
