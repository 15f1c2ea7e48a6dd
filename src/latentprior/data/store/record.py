"""Recording a language model's activations into a store: text -> tokens -> activations -> shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from latentprior.config import RecordConfig, settings_of
from latentprior.data import text, tokens
from latentprior.data.activations import ActivationBatch, activations, finite_rows, median_norms, split_sinks
from latentprior.data.sinks import sink_threshold
from latentprior.data.store.manifest import MANIFEST
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter, holds_a_store, remove_leftovers
from latentprior.data.text_files import text_settings
from latentprior.data.tokens import TokenBatch
from latentprior.lm.hooks import Hookpoint, find_blocks
from latentprior.lm.loading import load_llm
from latentprior.utils.locks import locked
from latentprior.utils.progress import Report, silent
from latentprior.utils.settings import check_settings

CALIBRATION_ROWS = 4096  # rows of each layer from which the median norm is taken before the first row is stored

Numbered = tuple[int, ActivationBatch, dict[str, int]]  # next batch, its finite rows, what is left out


def record(config: RecordConfig, *, report: Report = silent) -> ActivationStore:
    """Record activations as `config` says and open the finished store.

    A killed recording continues with ``resume=True``, to the same bytes as an uninterrupted one. Left out and
    counted: rows that are not finite; unless kept, attention sinks, whose norm is over 10 times the median of the first
    `CALIBRATION_ROWS` rows; where long documents are cut, what lies beyond `config.max_length`. Of a store with a disk
    budget, the oldest shards go first, or, with ``wait=True``, once the trainer that follows it has released them. The
    model is not loaded if nothing is left to be done.

    Bad input is an `InputError` before anything is written; later ones are a full disk, or that no trainer released a
    shard for `config.wait_seconds`. `report` gets the number of rows so far, and of all if ``max_activations`` is set.
    """

    def llm() -> tuple[Any, Any]:
        text.documents(config.text)  # an unknown file, data set or column shows before the model is loaded
        return load_llm(config.llm, config.device)

    return record_documents(config, llm, report=report)


def record_from(model: nn.Module, tokenizer: Any, config: RecordConfig, *, report: Report = silent) -> ActivationStore:
    """`record` with a model that is loaded already."""
    return record_documents(config, lambda: (model, tokenizer), report=report)


def record_documents(
    config: RecordConfig,
    llm: Callable[[], tuple[Any, Any]],
    documents: Callable[[], Iterable[text.Document]] | None = None,
    described: dict[str, Any] | None = None,
    report: Report = silent,
) -> ActivationStore:
    """`record` with a model and documents that are asked for when they are needed, `described` for the manifest."""
    made_of = source(config) | ({} if described is None else {"text": described})
    with locked(config.output) as folder:
        if (folder / MANIFEST).exists() and (store := _kept(config, made_of)).manifest["complete"]:
            remove_leftovers(folder, store.manifest)
            return store
        model, tokenizer = llm()
        _fill(model, tokenizer, documents() if documents else text.documents(config.text), config, made_of, report)
        return ActivationStore(folder)


def _kept(config: RecordConfig, made_of: dict[str, Any]) -> ActivationStore:
    """The store that is to be continued, refused as far as that takes no model."""
    if not config.resume:
        raise holds_a_store(config.output)
    store = ActivationStore(config.output)
    known = {
        "layers": list(store.layers),
        "side": store.hookpoints[0].side,
        **{name: store.manifest[name] for name in ("dtype", "shard_rows")},
        "source": {name: value for name, value in store.manifest["source"].items() if name != "blocks"},
    }
    wanted = {"layers": _layers(config), "side": config.side, "dtype": config.dtype, "shard_rows": config.shard_rows}
    check_settings(config.output, "an activation store", known, wanted | {"source": made_of})
    return store


def _layers(config: RecordConfig) -> list[int]:
    return sorted(dict.fromkeys(config.layers))


def _fill(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[text.Document],
    config: RecordConfig,
    made_of: dict[str, Any],
    report: Report,
) -> None:
    layers = _layers(config)
    hookpoints = [Hookpoint.of(model, layer, config.side) for layer in layers]
    token_batches = tokens.tokenize(
        documents,
        tokenizer,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        chat=config.chat,
        chunk=config.chunks,
    )
    writer = StoreWriter(
        config.output,
        hookpoints,
        dtype=config.dtype,
        shard_rows=config.shard_rows,
        source=made_of | {"blocks": len(find_blocks(model))},
        resume=config.resume,
        budget=config.budget_bytes,
        wait_seconds=config.wait_seconds if config.wait else None,
        batch_rows=max(config.batch_tokens, config.max_length) * len(layers),
    )
    first = writer.next_batch
    numbered = _recorded(model, (batch for batch in token_batches if batch.index >= first), layers, config)
    most, counted = config.max_activations, writer.moments.count
    calibrated = _calibrated(writer, numbered)
    with writer:
        while (most is None or (counted < most).any()) and (item := next(calibrated, None)):
            next_batch, rows, left_out = item
            if config.sinks == "drop" and len(rows):
                rows, dropped = split_sinks(rows, dict(zip(layers, writer.moments.median_norm.tolist(), strict=True)))
                left_out |= {"sinks": len(dropped)}
            if most is not None:
                rows = _first_of_each_layer(rows, dict(zip(layers, (most - counted).tolist(), strict=True)))
            writer.append(rows, next_batch=next_batch, left_out=left_out)
            report(writer.rows, None if most is None else most * len(layers), {})


def _first_of_each_layer(rows: ActivationBatch, room: dict[int, float]) -> ActivationBatch:
    """The first rows of each layer, in their order: as many as there is room for."""
    kept = torch.zeros(len(rows), dtype=torch.bool)
    for layer, count in room.items():
        kept[(rows.layer == layer).nonzero().squeeze(1)[: max(int(count), 0)]] = True
    return rows if kept.all() else rows.select(kept)


def source(config: RecordConfig) -> dict[str, Any]:
    """What decides the rows of a store."""
    values = settings_of(config)
    values["text"] = text_settings(config.text)
    # As before there were mixtures and chunks, so that older recordings can be resumed.
    if not config.text.mix:
        del values["text"]["mix"]
    del values["long_documents"]
    if config.chunks:
        values["long_documents"] = "chunk"
    return values


def _recorded(
    model: nn.Module, batches: Iterable[TokenBatch], layers: list[int], config: RecordConfig
) -> Iterator[Numbered]:
    for batch in batches:
        recorded = activations(
            model,
            [batch],
            layers,
            side=config.side,
            positions=config.positions,
            positions_per_document=config.positions_per_document,
            seed=config.seed,
        )
        rows, nonfinite = finite_rows(next(recorded))
        yield batch.index + 1, rows, {"nonfinite": nonfinite} | batch.left_out


def _calibrated(writer: StoreWriter, recorded: Iterator[Numbered]) -> Iterator[Numbered]:
    """`recorded`, once its first rows have set each layer's median norm, unless a resumed store knows it."""
    medians = writer.moments.median_norm
    if writer.sink_thresholds:
        yield from recorded
        return
    held: deque[Numbered] = deque()
    wanted = CALIBRATION_ROWS * len(medians)
    while sum(len(rows) for _, rows, _ in held) < wanted and (item := next(recorded, None)) is not None:
        held.append(item)
    found = median_norms([rows for _, rows, _ in held], writer.moments.layers)
    medians[:] = torch.tensor(list(found.values()), dtype=medians.dtype)
    writer.sink_thresholds.update({layer: sink_threshold(norm) for layer, norm in found.items()})
    while held:
        yield held.popleft()
    yield from recorded
