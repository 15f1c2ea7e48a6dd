"""Recording a language model's activations into a store: text -> tokens -> activations -> shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import nn

from latentprior import text, tokens
from latentprior.activations import ActivationBatch, activations, finite_rows, sink_threshold, split_sinks
from latentprior.config import RecordConfig, to_dict
from latentprior.errors import InputError
from latentprior.hooks import Hookpoint, find_blocks
from latentprior.llm import load_llm
from latentprior.progress import Report, silent
from latentprior.store import ActivationStore
from latentprior.writer import StoreWriter

CALIBRATION_ROWS = 4096  # rows of each layer from which the median norm is taken before the first row is stored

Numbered = tuple[int, ActivationBatch, int]  # next batch, its finite rows, how many were not finite


def record(config: RecordConfig, *, report: Report = silent) -> ActivationStore:
    """Record activations as `config` says and open the finished store.

    A killed recording continues with ``resume=True`` and ends in the same bytes as an uninterrupted one. Left out and
    counted: rows that are not finite and, unless kept, attention sinks, whose norm is over 10 times the median of the
    first `CALIBRATION_ROWS` rows. Of a store with a disk budget, the oldest shards go first, or, with ``wait=True``,
    once the trainer that follows it has released them.

    Args:
        config: what to record from what.
        report: gets the number of rows recorded so far.

    Raises:
        InputError: unusable model, text, layer, folder or budget; raised before anything is written. Later: the disk is
            full, or no trainer released a shard for `config.wait_seconds`.
    """
    model, tokenizer = load_llm(config.llm)
    return record_from(model, tokenizer, config, report=report)


def record_from(model: nn.Module, tokenizer: Any, config: RecordConfig, *, report: Report = silent) -> ActivationStore:
    """`record` with a model that is loaded already."""
    layers = sorted(dict.fromkeys(config.layers))
    hookpoints = [Hookpoint.of(model, layer, config.side) for layer in layers]
    token_batches = tokens.tokenize(
        text.documents(config.text),
        tokenizer,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        chat=config.chat,
    )
    writer = StoreWriter(
        config.output,
        hookpoints,
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        source=source(config) | {"blocks": len(find_blocks(model))},
        resume=config.resume,
        budget=config.budget_bytes,
        wait_seconds=config.wait_seconds if config.wait else None,
        batch_rows=max(config.batch_tokens, config.max_length) * len(layers),
    )
    if writer.complete:
        return ActivationStore(config.output)
    first = writer.next_batch
    recorded = activations(
        model,
        (batch for batch in token_batches if batch.index >= first),
        layers,
        side=config.side,
        positions=config.positions,
        positions_per_document=config.positions_per_document,
        seed=config.seed,
    )
    numbered = ((first + i + 1, *finite_rows(batch)) for i, batch in enumerate(recorded))
    with writer:
        for next_batch, rows, nonfinite in _calibrated(writer, numbered):
            if config.max_activations is not None and writer.rows >= config.max_activations:
                break
            sinks = 0
            if config.sinks == "drop" and len(rows):
                rows, dropped = split_sinks(rows, dict(zip(layers, writer.moments.median_norm.tolist(), strict=True)))
                sinks = len(dropped)
            writer.append(rows, next_batch=next_batch, left_out={"sinks": sinks, "nonfinite": nonfinite})
            report(writer.rows, config.max_activations, {})
    return ActivationStore(config.output)


def source(config: RecordConfig) -> dict[str, Any]:
    """What decides the rows of a store: the configuration without its folder, budget, device and how it resumes."""
    values = to_dict(config)
    for key in ("output", "resume", "disk_budget", "wait", "wait_seconds"):
        del values[key]
    if not config.text.mix:  # as before there were mixtures, so that older recordings can be resumed
        del values["text"]["mix"]
    del values["llm"]["device"], values["llm"]["device_map"]
    return values


def _calibrated(writer: StoreWriter, recorded: Iterator[Numbered]) -> Iterator[Numbered]:
    """`recorded`, unchanged, once the first rows have set each layer's median norm (unless a resumed store knows it).

    Raises:
        InputError: a layer without a row to calibrate on.
    """
    medians = writer.moments.median_norm
    if writer.sink_thresholds:
        yield from recorded
        return
    held: deque[Numbered] = deque()
    wanted = CALIBRATION_ROWS * len(medians)
    while sum(len(rows) for _, rows, _ in held) < wanted and (item := next(recorded, None)) is not None:
        held.append(item)
    for layer in writer.moments.layers:
        if not any((rows.layer == layer).any() for _, rows, _ in held):
            where = f"of layer {layer} after its first position"
            raise InputError(f"nothing to record: no document has a finite activation {where}")
    rows = ActivationBatch.cat([rows for _, rows, _ in held])
    for i, layer in enumerate(writer.moments.layers):
        norms = rows.at_layer(layer).norms()
        medians[i] = norms.median()
        writer.sink_thresholds[layer] = sink_threshold(norms)
    while held:
        yield held.popleft()
    yield from recorded
