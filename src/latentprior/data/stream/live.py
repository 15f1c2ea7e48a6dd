"""The rows of this process's document shards, computed by a language model when they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from latentprior.config import StreamConfig, TextConfig
from latentprior.data import tokens
from latentprior.data.activations import ActivationBatch, activations, finite_rows, median_norms, split_sinks
from latentprior.data.moments import Moments
from latentprior.data.partition import Batch, BatchPartition
from latentprior.data.sinks import sink_threshold
from latentprior.data.store.record import CALIBRATION_ROWS
from latentprior.data.stream.sharding import WINDOW, Cursor, DocumentShard, DocumentSharder
from latentprior.data.tokens import TokenBatch
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError


class LiveActivations:
    """The rows of this process's document shards, from a language model.

    Attributes:
        medians: each layer's median norm; while it is empty, attention sinks are not left out.
        seconds: spent in the language model, reading and tokenising its text included.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: StreamConfig, layers: Sequence[int], partition: BatchPartition
    ) -> None:
        self.model, self.tokenizer, self.config, self.partition = model, tokenizer, config, partition
        self.layers = sorted(dict.fromkeys(layers))
        self.hookpoints = [Hookpoint.of(model, layer, config.side) for layer in self.layers]
        self.batch_tokens = config.batch_tokens
        self.medians: dict[int, float] = {}
        self.seconds = 0.0
        self._shards: dict[int, DocumentShard] = {}

    @property
    def width(self) -> int:
        return self.hookpoints[0].width

    def open(self, position: dict[str, Any] | None = None) -> dict[int, DocumentShard]:
        """The document shards by number, from the beginning or from a position on."""
        count = self.partition.shards
        saved = [Cursor(**cursor) for cursor in position["lanes"]] if position else [Cursor()] * count
        cursors = {shard: saved[shard] for shard in self.partition.owned}
        self._sharder = DocumentSharder(self.config.text, count, cursors, position and position["text"])
        self._shards = {shard: self._shard(shard, cursor) for shard, cursor in cursors.items()}
        return self._shards

    def _shard(self, number: int, cursor: Cursor) -> DocumentShard:
        def take(count: int) -> list:
            with self._timed():
                return self._sharder.take(number, count, tokens.WINDOW_CHARACTERS if self.config.chunks else None)

        def tokenize(documents: list, first: int) -> list[TokenBatch]:
            with self._timed():
                batches = tokens.tokenize(
                    documents,
                    self.tokenizer,
                    max_length=self.config.max_length,
                    batch_tokens=self.batch_tokens,
                    window=WINDOW,
                    first_index=first,
                    chunk=self.config.chunks,
                )
                return list(batches)

        return DocumentShard(take, tokenize, self._record, cursor)

    def cursors(self) -> dict[int, Cursor]:
        return {number: shard.cursor for number, shard in self._shards.items()}

    def position(self, cursors: dict[int, Cursor]) -> dict[str, Any]:
        """A position as JSON values, the shards of all processes joined; called by each of them."""
        joined: dict[int, Cursor] = {}
        for part in self.partition.world.gather(cursors):
            joined |= part
        ordered = [joined[shard] for shard in range(self.partition.shards)]
        text = self.partition.world.first(self._sharder.snapshot(ordered) if self.partition.world.main else None)
        return {"lanes": [asdict(cursor) for cursor in ordered], "text": text}

    def _record(self, batch: TokenBatch) -> tuple[ActivationBatch, dict[str, int]]:
        with self._timed():
            device = next(self.model.parameters()).device
            recorded = activations(self.model, [batch], self.layers, side=self.config.side, device=device)
            rows, nonfinite = finite_rows(_layers_mixed(next(recorded), len(self.layers)))
            left_out = {"nonfinite": nonfinite} | batch.left_out
            if self.medians and self.config.sinks == "drop" and len(rows):
                rows, dropped = split_sinks(rows, self.medians)
                left_out["sinks"] = len(dropped)
        return rows, left_out

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def statistics(self) -> Moments:
        """The warm-up pass: moments of the shards' first token batches, over all processes; sets `medians`.

        The median norm is that of the first shard's first rows, `CALIBRATION_ROWS` of each layer. What is read here is
        trained on later. A layer without a row is an `InputError`.
        """
        medians = None
        if self.partition.world.main:
            pieces = list(self.open()[0].read(CALIBRATION_ROWS * len(self.layers)))
            medians = median_norms(pieces, self.layers)
        self.medians = self.partition.world.first(medians)
        moments = Moments(self.layers, self.width)
        rounds, more = divmod(-(-self.config.statistics // self.batch_tokens), self.partition.shards)
        for number, shard in self.open().items():
            for rows in shard.read_batches(rounds + (number < more)):
                moments.update(rows.x, rows.layer)
        merged = Moments(self.layers, self.width)
        for part in self.partition.world.gather(moments.state_dict()):
            merged.merge(Moments.from_state_dict(part))
        merged.median_norm = torch.tensor([self.medians[layer] for layer in self.layers], dtype=torch.float64)
        return merged

    def rows_of(self, text: TextConfig, count: int) -> Batch | None:
        """The first `count` rows of other documents than those of the shards, on the CPU; None if there are none."""
        other = replace(self.config, text=text)
        aside = LiveActivations(self.model, self.tokenizer, other, self.layers, BatchPartition(1))
        aside.medians = self.medians
        try:
            shards = aside.open()
        except InputError:  # the shards have text; so it is too short for a document of this split
            return None
        pieces = list(shards[0].read(count))
        if not pieces:
            return None
        rows = ActivationBatch.cat(pieces)
        return Batch(rows.x.cpu(), rows.layer if len(self.layers) > 1 else None)

    def sink_thresholds(self) -> dict[int, float]:
        """The norm over which a row of each layer is left out."""
        return {layer: sink_threshold(median) for layer, median in self.medians.items()}


def _layers_mixed(rows: ActivationBatch, layers: int) -> ActivationBatch:
    """Rows by layer as rows by position, so that any stretch of them has all layers."""
    return rows if layers == 1 else rows.select(torch.arange(len(rows)).view(layers, -1).T.flatten())
