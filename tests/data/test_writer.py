"""The disk budget of a store: the oldest shards go first, whenever the process dies, or once a trainer released them.

What a store without a budget holds, and what a kill leaves of it, is tested with reading, in test_store.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from latentprior.data.activations import ActivationBatch
from latentprior.data.store import backpressure, writer
from latentprior.data.store import manifest as files
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError

WIDTH, ROWS, SHARD_ROWS = 256, 4, 16
SHARD_BYTES = 19_000  # a little more than a shard of 16 rows in float32 takes
POINTS = [Hookpoint(model="tiny", layer=15, width=WIDTH)]
BATCHES = 50


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(writer, "POLL", 0.001)
    monkeypatch.setattr(backpressure, "LONGEST_PAUSE", 0.01)


def batch(index: int) -> ActivationBatch:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(index))
    x[:, 0] = torch.arange(index * ROWS, (index + 1) * ROWS)
    number = torch.arange(ROWS)
    return ActivationBatch(x, torch.full((ROWS,), 15), torch.full((ROWS,), index), number + 1, number)


def write(folder: Path, n: int = BATCHES, *, budget: int | None, **options) -> StoreWriter:
    options = {"shard_rows": SHARD_ROWS, "dtype": "float32", "source": {}, "budget": budget, "resume": True} | options
    with StoreWriter(folder, POINTS, **options) as written:
        for index in range(written.next_batch, n):
            written.append(batch(index), next_batch=index + 1, left_out={"sinks": 1})
    return written


def numbers(store: ActivationStore) -> list[int]:
    return store.rows(torch.arange(len(store)))[:, 0].int().tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*"))


@pytest.mark.parametrize("shards", [4, 7])
def test_the_oldest_shards_go_first(tmp_path, shards):
    most = 0

    def watch(path, chunks, original=files.write_file):
        nonlocal most
        written = original(path, chunks)
        most = max(most, shard_bytes(tmp_path))
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_file", watch)
        written = write(tmp_path, budget=shards * SHARD_BYTES)
    assert most <= shards * SHARD_BYTES  # at any time, the shard that is being written included
    store = ActivationStore(tmp_path, verify="full")
    total = BATCHES * ROWS
    last = total % SHARD_ROWS
    assert written.rows == total and len(store) == (shards - 1) * SHARD_ROWS + last
    assert store.manifest["evicted"] == total - len(store) and store.manifest["left_out"]["sinks"] == BATCHES
    assert numbers(store) == list(range(total - len(store), total))
    first = total // SHARD_ROWS + 1 - shards
    assert store.manifest["first_shard"] == first
    assert {path.stem for path in tmp_path.glob("shard-*")} == {f"shard-{first + i:05d}" for i in range(shards)}
    assert store.metadata(torch.tensor([0]))[1].tolist() == [(total - len(store)) // ROWS]
    assert len({x for batch, _ in itertools.islice(store.batches(8), 5) for x in batch[:, 0].tolist()}) == 40


def test_statistics_stay_those_of_all_rows(tmp_path):
    write(tmp_path / "all", budget=None)
    write(tmp_path / "some", budget=4 * SHARD_BYTES)
    every, some = ActivationStore(tmp_path / "all"), ActivationStore(tmp_path / "some")
    assert len(some) < len(every) and every.manifest["evicted"] == 0
    for name, value in every.moments().state_dict().items():
        torch.testing.assert_close(some.moments().state_dict()[name], value, equal_nan=True, rtol=0, atol=0)


def test_a_kill_at_any_change_of_the_disk(tmp_path, monkeypatch):
    """The folder as it is before every write, rename and removal is what a kill at that moment leaves."""
    folder, steps = tmp_path / "store", itertools.count()

    def copying(function):
        def copied(*args, **options):
            if folder.exists():
                shutil.copytree(folder, tmp_path / str(next(steps)))
            return function(*args, **options)

        return copied

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", copying(files.write_file))
        patch.setattr(os, "replace", copying(os.replace))
        patch.setattr(Path, "unlink", copying(Path.unlink))
        write(folder, 24, budget=4 * SHARD_BYTES)
    expected, seen = contents(folder), set()
    for step in range(next(steps)):
        killed = tmp_path / str(step)
        if (killed / files.MANIFEST).exists():
            store = ActivationStore(killed, verify="full")
            assert store.moments().count.sum() == store.manifest["evicted"] + len(store)
            assert numbers(store) == list(range(store.manifest["evicted"], store.manifest["evicted"] + len(store)))
            StoreWriter(
                killed, POINTS, shard_rows=SHARD_ROWS, dtype="float32", source={}, resume=True
            )  # removes what a kill left
            listed = files.listed_files(store.manifest)
            assert {path.name for path in killed.iterdir()} == listed | {files.MANIFEST}
            seen.add(store.manifest["first_shard"])
        write(killed, 24, budget=4 * SHARD_BYTES)
        assert contents(killed) == expected
    assert seen == {0, 1, 2}


def test_shards_of_a_store_that_is_not_ours_stay(tmp_path):
    (tmp_path / "shard-00009.safetensors").write_bytes(b"somebody's")
    StoreWriter(tmp_path, POINTS, source={})
    assert (tmp_path / "shard-00009.safetensors").exists()


def test_a_budget_below_two_shards_is_refused_before_anything_is_written(tmp_path):
    for budget, options in [(SHARD_BYTES, {}), (2 * SHARD_BYTES, {}), (4 * SHARD_BYTES, {"batch_rows": 64})]:
        with pytest.raises(InputError, match="disk budget") as error:
            write(tmp_path / "store", budget=budget, **options)
        assert "\n" not in str(error.value) and not (tmp_path / "store").exists()


def test_a_shard_that_turns_out_larger_than_the_budget_is_one_line(tmp_path):
    written = StoreWriter(tmp_path, POINTS, shard_rows=1, dtype="float32", source={}, budget=4 * 8192)
    with pytest.raises(InputError, match="disk budget of 32,768"):
        written.append(
            ActivationBatch.cat([batch(index) for index in range(20)]), next_batch=20, left_out={"nonfinite": 0}
        )
    assert not list(tmp_path.glob("shard-*"))


def test_an_older_store_without_these_counts_is_read_and_continued(tmp_path):
    write(tmp_path / "whole", budget=None)
    expected = ActivationStore(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        with StoreWriter(tmp_path / "old", POINTS, shard_rows=SHARD_ROWS, dtype="float32", source={}) as written:
            for index in range(10):
                written.append(batch(index), next_batch=index + 1, left_out={"sinks": 1})
            raise KeyboardInterrupt
    path = tmp_path / "old" / files.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: manifest[key] for key in manifest if key not in ("evicted", "first_shard")}))
    assert len(ActivationStore(tmp_path / "old")) == 32
    write(tmp_path / "old", budget=None)
    assert ActivationStore(tmp_path / "old").manifest == expected.manifest


# --- Waiting for a trainer


def test_without_a_trainer_a_waiting_recorder_gives_up_and_continues_later(tmp_path):
    options = {"budget": 4 * SHARD_BYTES, "wait_seconds": 0.05}
    with pytest.raises(InputError, match="0.05 seconds.*--resume"):
        write(tmp_path / "a", **options)
    store = ActivationStore(tmp_path / "a")
    assert numbers(store) == list(range(4 * SHARD_ROWS)) and not backpressure.is_waiting(tmp_path / "a")
    backpressure.write_consumed(tmp_path / "a", 3)
    with pytest.raises(InputError, match="no trainer"):
        write(tmp_path / "a", **options)
    assert numbers(ActivationStore(tmp_path / "a")) == list(range(3 * SHARD_ROWS, 7 * SHARD_ROWS))
    backpressure.write_consumed(tmp_path / "a", 100)
    write(tmp_path / "a", **options)
    (tmp_path / "a" / backpressure.CONSUMED).unlink()
    write(tmp_path / "b", budget=4 * SHARD_BYTES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_sign_of_waiting_is_there_exactly_while_it_waits(tmp_path, monkeypatch):
    seen = []

    def polling(seconds, poll):
        seen.append(backpressure.is_waiting(tmp_path))
        backpressure.write_consumed(tmp_path, backpressure.read_consumed(tmp_path) + 1)
        yield

    monkeypatch.setattr(backpressure, "polling", polling)
    write(tmp_path, budget=4 * SHARD_BYTES, wait_seconds=1.0)
    assert seen == [True] * 9 and not backpressure.is_waiting(tmp_path)


def test_a_sign_that_a_kill_left_is_removed(tmp_path):
    write(tmp_path, 10, budget=None)
    (tmp_path / backpressure.WAITING).touch()
    write(tmp_path, 10, budget=None)
    assert not backpressure.is_waiting(tmp_path)


def test_a_waiting_recorder_keeps_the_last_shard_for_the_trainer(tmp_path):
    """Two nominal shards fit, but not two as large as they come: better an error than to wait for ever."""
    settings = files.settings(POINTS, "float32", 1, {})
    budget = 2 * files.most_bytes(settings, 1)
    assert 15_000 < budget < 19_000
    with pytest.raises(InputError, match="disk budget.*--resume"):
        with StoreWriter(
            tmp_path, POINTS, shard_rows=1, dtype="float32", source={}, budget=budget, wait_seconds=600.0
        ) as written:
            for index in range(3):
                rows = ActivationBatch.cat([batch(2 * index), batch(2 * index + 1)])
                written.append(rows, next_batch=index + 1, left_out={})
