from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from latentprior.data.activations import ActivationBatch
from latentprior.data.store import manifest as files
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError
from latentprior.utils.files import PARTIAL
from latentprior.utils.settings import differences

WIDTH = 8
SHARD_ROWS = 16
BATCHES = 12
SOURCE = {"llm": {"model": "tiny"}, "layers": [15], "seed": 0}


def hookpoints(*layers: int) -> list[Hookpoint]:
    return [Hookpoint(model="tiny", layer=layer, width=WIDTH) for layer in layers]


def batch(index: int, layers: tuple[int, ...] = (15,)) -> ActivationBatch:
    """What the token batch `index` gives: 0 to 9 rows."""
    generator = torch.Generator().manual_seed(index)
    n = (7 * index + 5) % 10
    return ActivationBatch(
        x=torch.randn(n, WIDTH, generator=generator) * 5 + 3,
        layer=torch.tensor(layers)[torch.randint(len(layers), (n,), generator=generator)],
        doc=torch.full((n,), 10_000_000_000 + index),
        position=torch.arange(1, n + 1),
        token=torch.randint(0, 50_000, (n,), generator=generator),
    )


def write(folder: Path, n: int = BATCHES, *, layers: tuple[int, ...] = (15,), **options) -> StoreWriter:
    options = {"shard_rows": SHARD_ROWS, "source": SOURCE} | options
    with StoreWriter(folder, hookpoints(*layers), **options) as writer:
        if not writer.complete:
            writer.sink_thresholds = {layer: 1730.25 for layer in layers}
            for index in range(writer.next_batch, n):
                writer.append(batch(index, layers), next_batch=index + 1, left_out={"sinks": index % 3, "nonfinite": 1})
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(n: int = BATCHES, layers: tuple[int, ...] = (15,)) -> ActivationBatch:
    return ActivationBatch.cat([batch(index, layers) for index in range(n)])


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / files.MANIFEST).read_text())
    change(manifest)
    (folder / files.MANIFEST).write_text(json.dumps(manifest))


class Disk:
    """Calls `before(step)` at every change of the disk: halfway through each write, before each fsync and rename."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Callable[[int], None] = lambda step: None
        self.events: list[str] = []
        monkeypatch.setattr(files, "open", self._open, raising=False)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))

    def start(self, before: Callable[[int], None]) -> None:
        self.before, self.events = before, []

    def _tick(self, event: str) -> None:
        self.events.append(event)
        self.before(len(self.events))

    def _counting(self, name: str, function: Callable) -> Callable:
        def counted(*args):
            self._tick(name)
            return function(*args)

        return counted

    def _open(self, path, mode):
        file = open(path, mode)
        if "w" in mode:
            original = file.write

            def write(chunk):
                data = bytes(chunk)
                original(data[: len(data) // 2])
                file.flush()
                self._tick("write")
                original(data[len(data) // 2 :])

            return _Proxy(file, write)
        return file


class _Proxy:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """No power cut is tested here, and waiting for the disk is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def disk(monkeypatch, no_sync):
    return Disk(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


# ---------------------------------------------------------------------------------------------------- what is stored


def test_rows_and_metadata_come_back_in_the_order_asked_for(folder):
    store, expected = ActivationStore(folder, verify="full"), everything()
    assert len(store) == len(expected) and len(store.manifest["shards"]) > 2
    indices = torch.randint(len(store), (300,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(store.rows(indices), expected.x.bfloat16()[indices])
    got = store.batch(indices)
    for name in ("layer", "doc", "position", "token"):
        value = getattr(got, name)
        assert value.dtype == torch.int64 and torch.equal(value, getattr(expected, name)[indices])
    assert torch.equal(store.rows(torch.tensor([3])), expected.x.bfloat16()[3:4])
    assert store.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, WIDTH)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_row_outside_the_store_is_an_index_error(folder, index):
    store = ActivationStore(folder)
    for read in (store.rows, store.metadata):
        with pytest.raises(IndexError, match="is not in a store of"):
            read(torch.tensor([0, index]))


def test_shards_are_plain_safetensors_and_parquet_of_whole_token_batches(folder):
    manifest, stored, expected = ActivationStore(folder).manifest, 0, everything()
    ends = np.cumsum([len(batch(index)) for index in range(BATCHES)])
    for shard in manifest["shards"]:
        activations = load_file(folder / shard["activations"]["file"])["activations"]
        table = pq.read_table(folder / shard["metadata"]["file"])
        assert activations.dtype == torch.bfloat16 and len(activations) == table.num_rows == shard["rows"]
        assert torch.equal(activations, expected.x.bfloat16()[stored : stored + shard["rows"]])
        assert table["token"].to_pylist() == expected.token[stored : stored + shard["rows"]].tolist()
        stored += shard["rows"]
        assert stored in ends
        assert shard["rows"] >= SHARD_ROWS or shard is manifest["shards"][-1]
    assert stored == manifest["rows"]


def test_manifest_says_what_was_left_out_and_where_it_came_from(folder):
    manifest = ActivationStore(folder).manifest
    counts = {"sinks": sum(i % 3 for i in range(BATCHES)), "nonfinite": BATCHES, "cut_documents": 0, "cut_tokens": 0}
    assert manifest["left_out"] == counts
    assert manifest["sink_thresholds"] == {"15": 1730.25}
    assert manifest["source"] == SOURCE and manifest["next_batch"] == BATCHES and manifest["complete"]
    assert set(contents(folder)) == {
        "manifest.json",
        "statistics.safetensors",
        *(f"shard-{i:05d}.{kind}" for i in range(len(manifest["shards"])) for kind in ("parquet", "safetensors")),
    }


def test_float32_is_stored_exactly(tmp_path):
    write(tmp_path, dtype="float32")
    store = ActivationStore(tmp_path)
    assert torch.equal(store.rows(torch.arange(len(store))), everything().x)


def test_statistics_are_of_the_stored_rows(folder):
    moments, stored = ActivationStore(folder).moments(), everything().x.bfloat16().double()
    assert moments.count.tolist() == [len(stored)]
    torch.testing.assert_close(moments.mean[0], stored.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.variance()[0], stored.var(0, correction=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.mean_norm()[0], stored.norm(dim=1).mean(), rtol=1e-12, atol=0)


def test_several_layers(tmp_path):
    layers = (3, 7, 15)
    write(tmp_path, layers=layers)
    store, expected = ActivationStore(tmp_path), everything(layers=layers)
    assert store.layers == layers
    assert store.moments().count.tolist() == [(expected.layer == layer).sum().item() for layer in layers]
    rows = {tuple(x.tolist()): layer for x, layer in zip(expected.x.bfloat16().float(), expected.layer, strict=True)}
    x, layer = next(store.batches(20, seed=1))
    assert layer is not None and layer.dtype == torch.int64 and len(layer.unique()) == 3
    assert [rows[tuple(row.tolist())] for row in x.float()] == layer.tolist()


def test_a_store_without_rows(tmp_path):
    write(tmp_path, n=0)
    store = ActivationStore(tmp_path, verify="full")
    assert len(store) == 0 and store.manifest["complete"] and store.moments().count.tolist() == [0]
    with pytest.raises(InputError, match="less than one batch"):
        store.batches(4)


def test_a_folder_named_like_a_partition_is_only_a_folder(tmp_path):
    write(tmp_path / "token=3" / "layer=4")
    store = ActivationStore(tmp_path / "token=3" / "layer=4")
    assert torch.equal(store.metadata(torch.arange(len(store)))[3], everything().token)


def test_what_the_caller_does_to_its_tensors_later_is_not_stored(tmp_path):
    given = ActivationBatch(torch.ones(3, WIDTH).bfloat16(), *(torch.full((3,), value) for value in (15, 0, 1, 2)))
    with StoreWriter(tmp_path, hookpoints(15), source={}) as writer:
        writer.append(given, next_batch=1, left_out={})
        given.x.zero_()
    assert ActivationStore(tmp_path).rows(torch.arange(3)).eq(1).all()


# ------------------------------------------------------------------------------------------------- shuffled batches


def take(store: ActivationStore, n: int, **options) -> list[torch.Tensor]:
    return [x for x, _ in itertools.islice(store.batches(10, **options), n)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_start_continues_exactly_where_another_iterator_stopped(folder, drop_last):
    store = ActivationStore(folder)
    whole = take(store, 20, seed=5, drop_last=drop_last)
    for start in range(20):
        rest = take(ActivationStore(folder), 20 - start, seed=5, start=start, drop_last=drop_last)
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("drop_last", [True, False])
def test_every_epoch_is_another_order_of_all_rows(folder, drop_last):
    store = ActivationStore(folder)
    assert len(store) % 10
    per_epoch = len(store) // 10 + (not drop_last)
    stream = take(store, 2 * per_epoch, drop_last=drop_last)
    expected = sorted(map(tuple, everything().x.bfloat16().tolist()))
    epochs = [torch.cat(stream[:per_epoch]), torch.cat(stream[per_epoch:])]
    for epoch in epochs:
        rows = sorted(map(tuple, epoch.tolist()))
        assert len(set(rows)) == len(rows) == (len(expected) // 10 * 10 if drop_last else len(expected))
        assert set(rows) <= set(expected)
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_a_function_of_the_seed_alone(folder):
    store = ActivationStore(folder)
    before = torch.get_rng_state()
    first = take(store, 3, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, take(store, 3, seed=0), strict=True))
    assert not torch.equal(first[0], take(store, 1, seed=1)[0])
    assert next(store.batches(10))[1] is None


def test_skipping_reads_nothing(folder):
    far = 10**15
    assert torch.equal(
        take(ActivationStore(folder), 3, start=far)[2], take(ActivationStore(folder), 1, start=far + 2)[0]
    )


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "start": -1}, {"batch_size": 10**6}])
def test_impossible_batches_are_refused_before_iterating(folder, options):
    with pytest.raises(InputError):
        ActivationStore(folder).batches(**options)


# ------------------------------------------------------------------------------------------- interrupted and resumed


def test_a_kill_at_any_moment_loses_and_repeats_nothing(tmp_path, disk):
    """The folder as it is before every change of the disk is what a kill at that moment leaves."""
    disk.start(lambda step: shutil.copytree(tmp_path / "store", tmp_path / str(step)))
    write(tmp_path / "store")
    steps = len(disk.events)
    assert steps > 50
    expected = contents(tmp_path / "store")
    disk.start(lambda step: None)
    seen = set()
    for step in range(1, steps + 1):
        killed = tmp_path / str(step)
        if (killed / files.MANIFEST).exists():
            store = ActivationStore(killed, verify="full")
            assert store.moments().count.sum() == len(store)
            seen.add(len(store.manifest["shards"]))
        write(killed, resume=True)
        assert contents(killed) == expected
    assert seen == set(range(1, len(ActivationStore(tmp_path / "store").manifest["shards"]) + 1))


def test_a_full_disk_at_any_moment_is_one_clean_error(tmp_path, disk):
    write(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for step in itertools.count(1):
        folder = tmp_path / str(step)

        def fill(now: int, step: int = step) -> None:
            if now == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk.start(fill)
        try:
            write(folder)
            break
        except InputError as error:
            assert "the disk is full" in str(error) and "\n" not in str(error)
        disk.start(lambda now: None)
        assert not list(folder.glob(f"*{PARTIAL}"))
        if (folder / files.MANIFEST).exists():
            store = ActivationStore(folder, verify="full")
            rows = store.rows(torch.arange(len(store)))
            assert torch.equal(rows, everything().x.bfloat16()[: len(store)])
            assert store.moments().count.sum() == len(store)
        write(folder, resume=True)
        assert contents(folder) == expected
    assert step > 50


def test_every_file_is_synced_before_its_rename_and_the_folder_after(tmp_path, disk):
    write(tmp_path)
    events = "".join(event[0] for event in disk.events)  # w, f and r
    shards = len(ActivationStore(tmp_path).manifest["shards"])
    assert re.fullmatch("(w+frf)+", events) and events.count("r") == 4 * shards


def test_a_writer_that_failed_takes_no_more(tmp_path, disk):
    writer = StoreWriter(tmp_path, hookpoints(15), shard_rows=1, source={})

    def fill(step: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    disk.start(fill)
    with pytest.raises(InputError, match="the disk is full"):
        writer.append(batch(0), next_batch=1, left_out={})
    disk.start(lambda step: None)
    with pytest.raises(InputError, match="is closed"):
        writer.append(batch(0), next_batch=2, left_out={})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_sigkill_of_a_writing_process(tmp_path):
    n = 200
    script = "import sys, pathlib, test_store; test_store.write(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", script, str(killed), str(n)], env=environment)
    while process.poll() is None and not (killed / "shard-00003.safetensors").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    store = ActivationStore(killed, verify="full")
    assert not store.manifest["complete"] and 0 < store.manifest["next_batch"] < n
    write(killed, n, resume=True)
    write(tmp_path / "whole", n)
    assert contents(killed) == contents(tmp_path / "whole")


def test_an_exception_leaves_the_store_to_be_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with StoreWriter(tmp_path, hookpoints(15), shard_rows=SHARD_ROWS, source=SOURCE) as writer:
            for index in range(6):
                writer.append(batch(index), next_batch=index + 1, left_out={})
            raise KeyboardInterrupt
    store = ActivationStore(tmp_path)
    assert not store.manifest["complete"] and 0 < len(store) < len(everything(6))


def test_resume_gives_back_what_the_first_run_knew(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with StoreWriter(tmp_path, hookpoints(15), shard_rows=1, source=SOURCE) as writer:
            writer.sink_thresholds = {15: 0.1 + 0.2}
            writer.moments.median_norm[0] = 17.3
            writer.append(batch(0), next_batch=1, left_out={"sinks": 4})
            raise ZeroDivisionError
    resumed = StoreWriter(tmp_path, hookpoints(15), shard_rows=1, source=SOURCE, resume=True)
    assert resumed.sink_thresholds == {15: 0.1 + 0.2} and resumed.moments.median_norm.tolist() == [17.3]
    assert resumed.next_batch == 1 and resumed.rows == len(batch(0)) and not resumed.complete


def test_resuming_a_complete_store_does_nothing(folder):
    before = contents(folder)
    writer = write(folder, resume=True)
    assert writer.complete and contents(folder) == before
    with pytest.raises(InputError, match="closed"):
        writer.append(batch(0), next_batch=100, left_out={})


def test_resuming_removes_what_a_kill_left_behind(folder):
    before = contents(folder)
    for name in ("shard-00009.safetensors", "shard-00009.parquet", "statistics-00009.safetensors", files.MANIFEST):
        for ending in (PARTIAL, ".tmp"):  # of today and of older versions
            (folder / f"{name}{ending}").write_bytes(b"left over")
    (folder / "statistics-00001.safetensors").write_bytes(b"left over")
    own = {"notes.tmp": b"mine", f"notes{PARTIAL}": b"mine"}
    for name, content in own.items():
        (folder / name).write_bytes(content)
    write(folder, resume=True)
    assert contents(folder) == before | own


def test_resume_starts_a_store_that_is_not_there_yet(tmp_path, folder):
    write(tmp_path / "new" / "store", resume=True)
    assert contents(tmp_path / "new" / "store") == contents(folder)


def test_a_store_is_not_written_over(folder):
    before = contents(folder)
    with pytest.raises(InputError, match="--resume, or choose another folder"):
        write(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((7,), {}, "hookpoints.0.layer is 15 there and 7 now"),
        ((15, 16), {}, "hookpoints.1 is None there and {.*'layer': 16"),
        ((15,), {"dtype": "float32"}, "dtype is 'bfloat16' there and 'float32' now"),
        ((15,), {"shard_rows": 17}, "shard_rows is 16 there and 17 now"),
        ((15,), {"source": {**SOURCE, "llm": {"model": "b"}}}, "source.llm.model is 'tiny' there and 'b' now"),
        ((15,), {"source": {**SOURCE, "new": 1}}, "source.new is None there and 1 now"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_touches_nothing(folder, layers, options, message):
    edit_manifest(folder, lambda manifest: manifest.update(complete=False))
    (folder / f"shard-00009.safetensors{PARTIAL}").write_bytes(b"left over")
    before = contents(folder)
    with pytest.raises(InputError, match=message):
        write(folder, layers=layers, resume=True, **options)
    assert contents(folder) == before


def test_resuming_a_damaged_store_is_refused(folder):
    edit_manifest(folder, lambda manifest: manifest.update(complete=False))
    os.truncate(folder / "shard-00001.safetensors", 10)
    with pytest.raises(InputError, match="shard-00001.safetensors is damaged"):
        write(folder, resume=True)


# ---------------------------------------------------------------------------------------------------- refused to write


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (hookpoints(15), {"shard_rows": 0}, "shard_rows must be positive"),
        (hookpoints(15), {"source": {"path": Path("x")}}, "must be JSON values"),
        (hookpoints(15, 15), {}, "distinct layers"),
        ([], {}, "hookpoints of one width"),
        ([*hookpoints(15), Hookpoint(model="tiny", layer=16, width=9)], {}, "hookpoints of one width"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, given, options, message):
    with pytest.raises(InputError, match=message):
        StoreWriter(tmp_path / "store", given, **({"source": {}} | options))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("dtype", "message"), [("float16", "65504"), ("float64", "unknown dtype 'float64'")])
def test_float16_is_refused(dtype, message):
    with pytest.raises(InputError, match=message):
        files.settings(hookpoints(15), dtype, 1, {})


def test_rows_that_cannot_be_right_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, hookpoints(15), source={})
    writer.append(batch(0), next_batch=3, left_out={})
    with pytest.raises(InputError, match="before 3"):
        writer.append(batch(0), next_batch=3, left_out={})
    with pytest.raises(InputError, match="unknown layer '4'"):
        writer.append(batch(0, layers=(4,)), next_batch=4, left_out={})
    with pytest.raises(InputError, match="unknown reason"):
        writer.append(batch(0), next_batch=4, left_out={"padding": 1})
    broken = batch(0)
    broken.x[1, 2] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        writer.append(broken, next_batch=4, left_out={})
    writer.close()
    assert len(ActivationStore(tmp_path)) == writer.rows == len(batch(0))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, not a folder"):
        write(tmp_path / "file")


# --------------------------------------------------------------------------------------------------- refused to read


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.parquet", "statistics.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes instead of"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of"),
    ],
)
def test_missing_and_cut_files_are_named(folder, name, damage, message):
    damage(folder / name)
    with pytest.raises(InputError, match=f"{name} .*{message}"):
        ActivationStore(folder)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.parquet", "statistics.safetensors"])
def test_a_flipped_bit_is_found_by_full_verification(folder, name):
    size = (folder / name).stat().st_size
    for position in (0, size // 2, size - 1):
        flip(folder / name, position)
        with pytest.raises(InputError, match=f"{name} is damaged"):
            ActivationStore(folder, verify="full")
        flip(folder / name, position)
    ActivationStore(folder, verify="full")


def test_a_flipped_bit_in_the_statistics_is_found_when_they_are_read(folder):
    flip(folder / "statistics.safetensors", -1)
    with pytest.raises(InputError, match="SHA-256"):
        ActivationStore(folder).moments()


def test_every_flipped_bit_of_a_shard_header_is_found(folder):
    path = folder / "shard-00001.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert header % 64 == 0
    for position in range(header):
        flip(path, position, bit=position % 8)
        with pytest.raises(InputError, match="shard-00001.safetensors is damaged"):
            ActivationStore(folder)
        path.write_bytes(data)


def test_a_damaged_parquet_file_fails_with_one_line_or_not_at_all(folder):
    path = folder / "shard-00001.parquet"
    data, refused = path.read_bytes(), 0
    for position in range(0, len(data), 7):
        flip(path, position, bit=position % 8)
        try:
            store = ActivationStore(folder)
            store.metadata(torch.arange(len(store)))
        except InputError as error:
            refused += 1
            assert "shard-00001.parquet is damaged" in str(error) and "\n" not in str(error)
        path.write_bytes(data)
    assert refused > 20


def test_statistics_of_another_store_are_refused(tmp_path, folder):
    write(tmp_path / "other", n=3)
    entry = json.loads((tmp_path / "other" / files.MANIFEST).read_text())["statistics"]
    shutil.copy(tmp_path / "other" / files.STATISTICS, folder)
    edit_manifest(folder, lambda manifest: manifest.update(statistics=entry))
    with pytest.raises(InputError, match="does not belong to these shards"):
        ActivationStore(folder).moments()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        "sub/shard-00000.safetensors",
        "..\\shard-00000.safetensors",
        "shard-00000.safetensors/../x",
        "shard-00000.safetensors\n",
        "$(touch x).safetensors",
        "",
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(folder, name):
    for change in (
        lambda manifest: manifest["shards"][0]["activations"].update(file=name),
        lambda manifest: manifest["shards"][0]["metadata"].update(file=name),
        lambda manifest: manifest["statistics"].update(file=name),
    ):
        original = (folder / files.MANIFEST).read_bytes()
        edit_manifest(folder, change)
        with pytest.raises(InputError, match="is no name of a store's file"):
            ActivationStore(folder)
        (folder / files.MANIFEST).write_bytes(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("width"), "lacks 'width'"),
        (lambda m: m.pop("format_version"), "lacks 'format_version'"),
        (lambda m: m.update(format_version=2), "format 2, this version reads up to 1: update"),
        (lambda m: m.update(rows="many"), "a 'rows' that is no int"),
        (lambda m: m.update(rows=m["rows"] + 1), "do not add up"),
        (lambda m: m.update(shards=[3]), "a shard is not an object"),
        (lambda m: m["shards"][0].pop("metadata"), "a shard lacks 'metadata'"),
        (lambda m: m["shards"][0].update(rows=0), "do not add up"),
        (lambda m: m["shards"][0]["activations"].pop("sha256"), "a file lacks 'sha256'"),
        (lambda m: m.update(dtype="float16"), "unknown dtype"),
        (lambda m: m.update(left_out={}), "left_out lacks 'sinks'"),
        (lambda m: m.update(sink_thresholds={"a": 1}), "sink_thresholds"),
        (lambda m: m.update(hookpoints=[]), "contradict"),
        (lambda m: m.update(hookpoints=[5]), "a hookpoint is not an object"),
        (lambda m: m["hookpoints"][0].pop("layer"), "a hookpoint lacks 'layer'"),
        (lambda m: m["hookpoints"][0].update(extra=1), "unknown Hookpoint key 'extra'"),
        (lambda m: m["hookpoints"][0].update(width=9), "contradict"),
        (lambda m: m.update(width=4, hookpoints=[h | {"width": 4} for h in m["hookpoints"]]), "not torch.bfloat16 "),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_line(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(InputError, match=message) as error:
        ActivationStore(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0\xff", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_one_line(folder, text):
    (folder / files.MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="manifest.json is damaged") as error:
        ActivationStore(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_store_is_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no activation store"):
        ActivationStore(tmp_path)
    with pytest.raises(InputError, match="holds no activation store"):
        ActivationStore(tmp_path / "nowhere")


def test_a_store_of_before_hookpoints_knew_their_weights_is_continued():
    here = Hookpoint("org/m", 2, 8, weights="ab").to_dict()
    older = here | {"weights": None}
    assert not [*differences({"hookpoints": [older]}, {"hookpoints": [here]})]
    assert [*differences({"hookpoints": [here]}, {"hookpoints": [here | {"weights": "cd"}]})]
