"""Live activations: every row once, the same batches on any number of processes and from any step on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentprior.config import LLMConfig, StreamConfig, TextConfig
from latentprior.data.activations import ActivationBatch, record_activations
from latentprior.data.partition import BatchPartition
from latentprior.data.stream.buffer import MixingBuffer, buffered_batches, check_memory
from latentprior.data.stream.live import LiveActivations
from latentprior.data.text import documents
from latentprior.lm.loading import load_llm
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError

CPU = torch.device("cpu")
BATCH, SHARDS, BUFFERED = 24, 5, 3


@dataclass(frozen=True)
class Streamed(StreamConfig):
    """A stream of some layers."""

    layers: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def config(tmp_path_factory, llm_folder, write_texts) -> Streamed:
    return Streamed(
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=TextConfig(dataset=write_texts(tmp_path_factory.mktemp("text") / "texts.jsonl", 200), part="all"),
        layers=[1],
        statistics=300,
        batch_tokens=256,
        sinks="keep",
    )


@pytest.fixture(scope="module")
def llm(config) -> tuple[Any, Any]:
    return load_llm(config.llm)


def stream(llm, config: Streamed, rank: int = 0, size: int = 1, **options) -> MixingBuffer:
    live = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, SHARDS, World(rank, size)))
    return MixingBuffer(live, BUFFERED, CPU, seed=4, **options)


def rows(batches) -> Tensor:
    return torch.cat([batch.x for batch in batches])


def in_some_order(x: Tensor) -> Tensor:
    """Rows in an order that depends on their values alone, to the last bit."""
    as_bytes = np.ascontiguousarray(x.numpy()).view(f"V{x.element_size() * x.shape[1]}").squeeze(1)
    return x[torch.from_numpy(np.argsort(as_bytes.view(f"S{as_bytes.itemsize}"), kind="stable"))]


def everything(llm, config: Streamed, shards: int = SHARDS) -> ActivationBatch:
    """All rows of all shards, shard after shard."""
    opened = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, shards)).open()
    return ActivationBatch.cat([piece for shard in opened.values() for piece in shard.read(10**9)])


# --- Which rows


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_shards_have_the_rows_that_are_recorded(llm, config, layers):
    texts = {document.index: document.text for document in documents(config.text)}
    expected = record_activations(*llm, list(texts.values()), layers)
    got = everything(llm, replace(config, layers=layers))
    assert len(got) == len(expected)

    def by_place(batch: ActivationBatch) -> dict[tuple, Tensor]:
        keys = zip(batch.layer.tolist(), batch.doc.tolist(), batch.position.tolist(), strict=True)
        return dict(zip(keys, batch.x, strict=True))

    ours, theirs = by_place(got), by_place(expected)
    assert ours.keys() == theirs.keys() and len(ours) == len(got)
    torch.testing.assert_close(torch.stack([ours[k] for k in theirs]), expected.x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_every_row_comes_once(llm, config, layers):
    config = replace(config, layers=layers)
    batches = list(stream(llm, config).batches())
    expected = everything(llm, config)
    assert torch.equal(in_some_order(rows(batches)), in_some_order(expected.x))
    full = [batch for batch in batches if batch.row_index is None]
    assert len(full) > 0.7 * len(batches) and all(len(batch.x) == BATCH for batch in full)
    if len(layers) > 1:
        of_layer = {layer: {row.numpy().tobytes() for row in expected.at_layer(layer).x} for layer in layers}
        for batch in batches[:5]:
            assert batch.layer is not None and set(batch.layer.tolist()) == set(layers)  # mixed in every batch
            for row, layer in zip(batch.x, batch.layer.tolist(), strict=True):
                assert row.numpy().tobytes() in of_layer[layer]
    else:
        assert batches[0].layer is None


def test_the_last_filling_is_no_larger_than_needed(llm, config):
    one = stream(llm, config, steps=7)
    batches = list(one.batches())
    assert len(batches) == 7 and all(len(batch.x) == BATCH for batch in batches)
    assert torch.equal(rows(batches[:6]), rows(islice(stream(llm, config).batches(), 6)))
    rest = [piece.x for shard in one.live.open(one.position()).values() for piece in shard.read(10**9)]
    expected = everything(llm, config).x
    assert torch.equal(in_some_order(torch.cat([rows(batches), *rest])), in_some_order(expected))  # nothing is lost


def test_rows_of_one_buffer_are_mixed(llm, config):
    """A batch takes rows from all over the buffer: its neighbours are not neighbours in the text."""
    live = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, 1))
    drawn = rows(islice(MixingBuffer(live, 20, CPU, seed=4).batches(), 20))
    ordered = torch.cat([piece.x for piece in live.open()[0].read(20 * BATCH)])
    assert torch.equal(in_some_order(drawn), in_some_order(ordered))
    place = {row.numpy().tobytes(): i for i, row in enumerate(ordered)}
    order = torch.tensor([place[row.numpy().tobytes()] for row in drawn])
    correlation = torch.corrcoef(torch.stack([order.float(), torch.arange(len(order)).float()]))[0, 1]
    assert abs(float(correlation)) < 0.15
    assert int((order.diff().abs() == 1).sum()) < 0.05 * len(order)


# --- Positions


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_continues_from_any_step(llm, config, layers):
    config = replace(config, layers=layers)
    whole = list(stream(llm, config).batches())
    first = stream(llm, config)
    drawing = first.batches()
    for step in range(len(whole)):
        if step in (1, 8, 9, 10, len(whole) - 3, len(whole) - 1):  # a buffer holds three batches
            position = json.loads(json.dumps(first.position()))
            again = list(stream(llm, config).batches(step, position))
            assert len(again) == len(whole) - step
            for ours, theirs in zip(again, whole[step:], strict=True):
                assert torch.equal(ours.x, theirs.x)
                assert (ours.row_index is None) == (theirs.row_index is None)
        next(drawing)


def gathered(monkeypatch, parts: list[dict]) -> None:
    """Make `World.gather` give what all processes would have given, one call after the other."""
    monkeypatch.setattr(World, "gather", lambda self, value: parts)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_draw_what_one_draws(llm, config, size):
    whole = list(stream(llm, config).batches())
    partition = BatchPartition(BATCH, SHARDS)
    parts = [list(stream(llm, config, rank, size).batches()) for rank in range(size)]
    full = [step for step, batch in enumerate(whole) if batch.row_index is None]
    assert len(full) > 10
    for step in full:
        together = torch.empty(BATCH, whole[step].x.shape[1])
        for rank, part in enumerate(parts):
            together[BatchPartition(BATCH, SHARDS, World(rank, size)).positions()] = part[step].x
        assert torch.equal(together[partition.positions()], whole[step].x)
    assert torch.equal(in_some_order(torch.cat([rows(part) for part in parts])), in_some_order(rows(whole)))


def test_another_number_of_processes_goes_on_without_a_gap(llm, config, monkeypatch):
    """Three processes take over from two in the middle of a buffer: every row once, as by one process."""
    whole, step = list(stream(llm, config).batches()), 10
    before = [stream(llm, config, rank, 2) for rank in range(2)]
    drawn = [list(islice(one.batches(), step)) for one in before]
    gathered(monkeypatch, [one._filled_at for one in before])
    monkeypatch.setattr(World, "first", lambda self, value: value)
    position = json.loads(json.dumps(before[0].position()))
    monkeypatch.undo()
    after = [rows(stream(llm, config, rank, 3).batches(step, position)) for rank in range(3)]
    together = torch.cat([rows(part) for part in drawn] + after)
    assert torch.equal(in_some_order(together), in_some_order(rows(whole)))


# --- Statistics and what is left out


def test_warm_up_takes_statistics_of_the_first_rows_of_all_shards(llm, config):
    live = LiveActivations(*llm, replace(config, statistics=10**6), config.layers, BatchPartition(BATCH, SHARDS))
    moments, expected = live.statistics(), everything(llm, config).x.double()
    assert moments.count.tolist() == [len(expected)]
    torch.testing.assert_close(moments.mean[0], expected.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.variance()[0], expected.var(0, correction=0), atol=1e-5, rtol=1e-4)
    assert float(moments.median_norm[0]) == pytest.approx(live.medians[1])
    short = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, SHARDS)).statistics()
    assert 100 < float(short.count) <= 512 and float(short.count) < len(expected) / 2  # two token batches


def test_attention_sinks_are_left_out_and_counted(llm, config):
    one = stream(llm, replace(config, sinks="drop"))
    largest = everything(llm, config).norms().sort().values[-100:]
    gap = int(largest.diff().argmax())
    limit = float(largest[gap : gap + 2].mean())
    one.live.medians = {1: limit / 10}
    kept = rows(one.batches())
    assert len(kept) == len(everything(llm, config)) - (99 - gap) and float(kept.norm(dim=1).max()) < limit
    assert sum(cursor.sinks for cursor in one.live.cursors().values()) == 99 - gap


def test_long_documents_are_streamed_in_chunks_or_counted(llm, config, monkeypatch):
    def places(batch: ActivationBatch) -> set[tuple[int, int]]:
        return set(zip(batch.doc.tolist(), batch.position.tolist(), strict=True))

    whole, short = everything(llm, config), replace(config, max_length=6)
    monkeypatch.setattr("latentprior.data.tokens.WINDOW_CHARACTERS", 300)  # several windows for each shard
    chunked = everything(llm, short)
    assert len(chunked) == len(whole) and places(chunked) == places(whole)
    one = stream(llm, short)
    batches = list(islice(one.batches(), 10))
    position = json.loads(json.dumps(one.position()))
    rest = list(one.batches(10, position))
    assert torch.equal(in_some_order(rows([*batches, *rest])), in_some_order(chunked.x))
    cut = stream(llm, replace(short, long_documents="cut"))
    kept = rows(cut.batches())
    shards = cut.position()["lanes"]
    assert sum(shard["cut_tokens"] for shard in shards) == len(whole) - len(kept) > 0
    beyond = {doc for doc, place in places(whole) if place >= 6}
    assert sum(shard["cut_documents"] for shard in shards) == len(beyond)


def test_stream_and_store_have_the_same_distribution(llm, config):
    drawn = rows(stream(llm, config).batches())
    texts = [document.text for document in documents(config.text)]
    expected = record_activations(*llm, texts, [1]).x
    torch.testing.assert_close(drawn.mean(0), expected.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn.T @ drawn, expected.T @ expected, atol=1e-2, rtol=1e-4)


# --- Sizes


def test_the_buffer_is_given_in_activations_or_bytes(llm, config):
    live = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, SHARDS))

    def count(size: str) -> int:
        return buffered_batches(size, BatchPartition(BATCH, SHARDS), live.hookpoints, 4)

    row = 4 * live.width
    assert count("240") == count("263") == 10
    assert count(f"{10 * BATCH * row}B") == count("30.8KB") == 10
    with pytest.raises(InputError, match="^a buffer of 23 activations does not hold a batch of 24: raise buffer$"):
        count("23")
    with pytest.raises(InputError, match=r"^a buffer of 1KB \(7 activations\) does not hold a batch of 24"):
        count("1KB")


def test_a_buffer_larger_than_memory_is_refused():
    check_memory(10**6, CPU)
    with pytest.raises(InputError, match=r"^a buffer of 1e\+06 GB in each process is larger than the memory of cpu, "):
        check_memory(10**15, CPU)


@pytest.mark.parametrize("size", ["", "many", "-3", "0", "1 parsec", "GB"])
def test_a_size_that_is_none_is_refused(config, size):
    with pytest.raises(InputError, match="^buffer must be a number of activations or a size"):
        replace(config, buffer=size)


def test_bad_text_is_refused_before_the_model_runs(llm, config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for text, message in [
        (TextConfig(dataset=str(tmp_path / "none.txt")), "no such file"),
        (TextConfig(dataset=str(tmp_path / "empty.txt")), "no documents"),
        (replace(config.text, column="missing"), "unknown column"),
    ]:
        with pytest.raises(InputError, match=message):
            LiveActivations(*llm, replace(config, text=text), [1], BatchPartition(BATCH, SHARDS)).open()
    with pytest.raises(InputError, match="layer"):
        LiveActivations(*llm, config, [99], BatchPartition(BATCH, SHARDS))


def test_kept_rows_are_those_that_were_drawn(llm, config, tmp_path: Path):
    from latentprior.data.store.reader import ActivationStore
    from latentprior.data.store.writer import StoreWriter

    def keep() -> StoreWriter:
        hookpoints = LiveActivations(*llm, config, config.layers, BatchPartition(BATCH, SHARDS)).hookpoints
        return StoreWriter(tmp_path / "kept", hookpoints, dtype="float32", shard_rows=100, source={}, resume=True)

    first = stream(llm, config, keep=keep())
    drawing = first.batches()
    list(islice(drawing, 14))
    position = json.loads(json.dumps(first.position()))
    whole = rows(stream(llm, config).batches())
    list(islice(drawing, 9))  # goes on for some buffers after its last saved position, and is killed
    writer = keep()
    list(stream(llm, config, keep=writer).batches(14, position))
    writer.close()
    store = ActivationStore(tmp_path / "kept", verify="full")
    assert torch.equal(in_some_order(store.rows(torch.arange(len(store)))), in_some_order(whole))
    _, doc, place, _ = store.metadata(torch.arange(len(store)))
    assert len(torch.stack([doc, place]).unique(dim=1).T) == len(store)
