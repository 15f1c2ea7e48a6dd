"""Live activations: the language model fills a mixing buffer, the trainer draws from it.

The buffer holds the rows of `turns` batches: for each lane of this process `turns` times its quota, in the lane's
order. They are drawn in random order, each once, and when the last batch is drawn the buffer is filled again. Nothing
is done row by row: a refill is a copy for each token batch, a batch is one gather.

So the rows of batch k follow from the text, the options and the seed alone, and a position takes no activations to
save: it is the lanes' cursors when the buffer was filled. To continue, the buffer is filled again from there, which
costs at most one buffer of forward passes, and the batches drawn already are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from latentprior.config import StreamConfig, TextConfig
from latentprior.config.base import size_of
from latentprior.data import tokens
from latentprior.data.activations import ActivationBatch, activations, finite_rows, split_sinks
from latentprior.data.moments import Moments
from latentprior.data.partition import Batch, Deal
from latentprior.data.sinks import sink_threshold
from latentprior.data.store.manifest import LEFT_OUT
from latentprior.data.store.record import CALIBRATION_ROWS
from latentprior.data.store.writer import StoreWriter
from latentprior.data.stream.sharding import WINDOW, Cursor, Dealer, Lane, to_json
from latentprior.data.tokens import TokenBatch
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.chips import device_memory
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator


class Source:
    """The rows of this process's lanes, from a language model.

    Attributes:
        hookpoints: where the rows come from, one for each layer.
        batch_tokens: most tokens of a forward pass.
        medians: each layer's median norm; while it is empty, attention sinks are not left out.
        seconds: spent in the language model, reading and tokenising its text included.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: StreamConfig, deal: Deal) -> None:
        self.model, self.tokenizer, self.config, self.deal = model, tokenizer, config, deal
        self.layers = sorted(dict.fromkeys(config.layers))
        self.hookpoints = [Hookpoint.of(model, layer, config.side) for layer in self.layers]
        self.batch_tokens = config.batch_tokens
        self.medians: dict[int, float] = {}
        self.seconds = 0.0
        self._lanes: dict[int, Lane] = {}

    @property
    def width(self) -> int:
        return self.hookpoints[0].width

    def open(self, position: dict[str, Any] | None = None) -> dict[int, Lane]:
        """The lanes, from the beginning or from a position on."""
        saved = [Cursor(**cursor) for cursor in position["lanes"]] if position else [Cursor()] * self.deal.lanes
        cursors = {lane: saved[lane] for lane in self.deal.owned}
        self._dealer = Dealer(self.config.text, self.deal.lanes, cursors, position and position["text"])
        self._lanes = {lane: self._lane(lane, cursor) for lane, cursor in cursors.items()}
        return self._lanes

    def _lane(self, number: int, cursor: Cursor) -> Lane:
        def take(count: int) -> list:
            began = time.perf_counter()
            documents = self._dealer.take(number, count, tokens.WINDOW_CHARACTERS if self.config.chunks else None)
            self.seconds += time.perf_counter() - began
            return documents

        def tokenize(documents: list, first: int) -> list[TokenBatch]:
            began = time.perf_counter()
            batches = tokens.tokenize(
                documents,
                self.tokenizer,
                max_length=self.config.max_length,
                batch_tokens=self.batch_tokens,
                window=WINDOW,
                first_index=first,
                chunk=self.config.chunks,
            )
            batches = list(batches)
            self.seconds += time.perf_counter() - began
            return batches

        return Lane(take, tokenize, self._record, cursor)

    def cursors(self) -> dict[int, Cursor]:
        """Where this process's lanes are."""
        return {number: lane.cursor for number, lane in self._lanes.items()}

    def position(self, cursors: dict[int, Cursor]) -> dict[str, Any]:
        """A position as JSON values, the lanes of all processes joined; called by each of them."""
        joined: dict[int, Cursor] = {}
        for part in self.deal.world.gather(cursors):
            joined |= part
        ordered = [joined[lane] for lane in range(self.deal.lanes)]
        text = self.deal.world.first(self._dealer.snapshot(ordered) if self.deal.world.main else None)
        return {"lanes": [to_json(cursor) for cursor in ordered], "text": text}

    def _record(self, batch: TokenBatch) -> tuple[ActivationBatch, dict[str, int]]:
        began = time.perf_counter()
        device = next(self.model.parameters()).device
        recorded = activations(self.model, [batch], self.layers, side=self.config.side, device=device)
        rows, nonfinite = finite_rows(_layers_mixed(next(recorded), len(self.layers)))
        left_out = {"nonfinite": nonfinite} | batch.left_out
        if self.medians and self.config.sinks == "drop" and len(rows):
            rows, dropped = split_sinks(rows, self.medians)
            left_out["sinks"] = len(dropped)
        self.seconds += time.perf_counter() - began
        return rows, left_out

    def statistics(self) -> Moments:
        """The warm-up pass: moments of the lanes' first token batches, over all processes; sets `medians`.

        The median norm is that of the first lane's first rows, `CALIBRATION_ROWS` of each layer. What is read here is
        trained on later.

        Raises:
            InputError: a layer without a row.
        """
        self.medians = self.deal.world.first(self._calibrated() if self.deal.world.main else None)
        moments = Moments(self.layers, self.width)
        rounds, more = divmod(-(-self.config.statistics // self.batch_tokens), self.deal.lanes)
        for number, lane in self.open().items():
            for rows in lane.read_batches(rounds + (number < more)):
                moments.update(rows.x, rows.layer)
        merged = Moments(self.layers, self.width)
        for part in self.deal.world.gather(moments.state_dict()):
            merged.merge(Moments.from_state_dict(part))
        merged.median_norm = torch.tensor([self.medians[layer] for layer in self.layers], dtype=torch.float64)
        return merged

    def _calibrated(self) -> dict[int, float]:
        """The median norm of each layer."""
        pieces = list(self.open()[0].read(CALIBRATION_ROWS * len(self.layers)))
        for layer in self.layers:
            if not any((rows.layer == layer).any() for rows in pieces):
                raise InputError(
                    f"nothing to record: no document has a finite activation of layer {layer} after its first position"
                )
        rows = ActivationBatch.cat(pieces)
        return {layer: float(rows.at_layer(layer).norms().median()) for layer in self.layers}

    def rows_of(self, text: TextConfig, count: int) -> Batch | None:
        """The first `count` rows of other documents than those of the lanes, on the CPU; None if there are none."""
        aside = Source(self.model, self.tokenizer, replace(self.config, text=text), Deal(1))
        aside.medians = self.medians
        try:
            lanes = aside.open()
        except InputError:  # the lanes have text; so it is too short for a document of this part
            return None
        pieces = list(lanes[0].read(count))
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


class Stream:
    """Batches from a mixing buffer over a `Source`.

    Args:
        source: its lanes; `statistics` has been called, or its medians set.
        turns: batches that the buffer holds, see `buffer_turns`.
        device: where the buffer lies.
        seed: of the order in which rows are drawn.
        steps: batches that will be drawn in all; the last filling is no larger than they need.
        keep: store that also gets all rows, in the order of the lanes.

    Attributes:
        seconds: spent on the buffer: copying into it, drawing from it.
    """

    def __init__(
        self,
        source: Source,
        turns: int,
        device: torch.device,
        *,
        seed: int = 0,
        steps: int | None = None,
        keep: StoreWriter | None = None,
    ) -> None:
        self.source, self.turns, self.seed, self.steps, self.keep = source, turns, seed, steps, keep
        self.seconds = 0.0
        self._deal = source.deal
        rows = turns * self._deal.rows
        dtype = next(source.model.parameters()).dtype
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self._x = torch.empty(rows, source.width, dtype=dtype, device=device, pin_memory=pinned)
        self._layer = torch.empty(rows, dtype=torch.int32, device=device) if len(source.layers) > 1 else None
        self._filled_at: dict[int, Cursor] = {}

    def batches(self, step: int = 0, position: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Batches from number `step` on; `position` is what `position` gave when that many had been drawn.

        Ends where the text does: the last batches have fewer rows, then there are none.
        """
        self._lanes = self.source.open(position)
        generation, drawn = divmod(step, self.turns)
        while order := self._fill(generation):
            for i in range(drawn, len(order)):
                began = time.perf_counter()
                batch = self._draw(order[i])
                if i == len(order) - 1:
                    self._filled_at = self.source.cursors()  # the next batch is the first of a new filling
                self.seconds += time.perf_counter() - began
                yield batch
            generation, drawn = generation + 1, 0

    def position(self) -> dict[str, Any]:
        """What continues after the batches drawn so far, together with their number; called by every process."""
        return self.source.position(self._filled_at)

    def _fill(self, generation: int) -> list[Tensor]:
        """Fill the buffer; returns the rows of each batch [rows], -1 where a lane's text has ended."""
        self._filled_at = self.source.cursors()
        turns = self.turns if self.steps is None else min(self.turns, self.steps - generation * self.turns)
        if turns <= 0:
            return []
        orders, begin = [], 0
        for turn, (number, lane) in enumerate(self._lanes.items()):
            before, pieces = lane.cursor, list(lane.read(turns * self._deal.quota(number)))
            began = time.perf_counter()
            end = begin
            for piece in pieces:
                self._x[end : end + len(piece)] = piece.x
                if self._layer is not None:
                    self._layer[end : end + len(piece)] = piece.layer
                end += len(piece)
            order = torch.full((turns * self._deal.quota(number),), -1)
            generator = keyed_generator(self.seed, generation, number)
            order[: end - begin] = torch.randperm(end - begin, generator=generator) + begin
            orders.append(order.view(turns, -1))
            begin += len(order)
            self.seconds += time.perf_counter() - began
            if self.keep is not None and pieces:
                self._store(ActivationBatch.cat(pieces), generation * len(self._lanes) + turn + 1, before, lane.cursor)
        joined = torch.cat(orders, dim=1)
        return list(joined[(joined >= 0).any(dim=1)])

    def _store(self, rows: ActivationBatch, number: int, before: Cursor, after: Cursor) -> None:
        """Keep a lane's rows on disk, unless this run did so before it was interrupted."""
        assert self.keep is not None
        if number > self.keep.next_batch:
            left_out = {reason: getattr(after, reason) - getattr(before, reason) for reason in LEFT_OUT}
            self.keep.append(rows, next_batch=number, left_out=left_out)

    def _draw(self, order: Tensor) -> Batch:
        given = order >= 0
        places = None if given.all() else given.nonzero().squeeze(1)
        rows = (order if places is None else order[places]).to(self._x.device, non_blocking=True)
        layer = None if self._layer is None else self._layer[rows]
        return Batch(self._x[rows], layer, places)


def buffer_turns(config: StreamConfig, deal: Deal, hookpoints: Sequence[Hookpoint], itemsize: int) -> int:
    """How many batches the mixing buffer holds.

    Raises:
        InputError: a buffer smaller than a batch.
    """
    size, in_bytes = size_of("buffer", config.buffer)
    row = hookpoints[0].width * itemsize
    rows = size // row if in_bytes else size
    if rows < deal.batch:
        held = f"{config.buffer} ({rows} activations)" if in_bytes else f"{rows} activations"
        raise InputError(f"a buffer of {held} does not hold a batch of {deal.batch}: raise buffer")
    return rows // deal.batch


def check_memory(size: int, device: torch.device) -> None:
    """Raise `InputError` if a buffer of `size` bytes is larger than the memory of `device`."""
    memory = device_memory(device)
    if size > memory:
        raise InputError(
            f"a buffer of {size / 1e9:.3g} GB in each process is larger than the memory of {device}, "
            f"{memory / 1e9:.3g} GB: lower buffer"
        )
