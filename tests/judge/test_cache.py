"""The cache of answers keeps every whole entry, whatever was cut off after it, and belongs to one process at a time."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from latentprior.judge.cache import VALUE, AnswerCache, content_key, read_cache
from latentprior.utils.errors import InputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "cache.jsonl"


def filled(path, count: int = 3) -> bytes:
    with AnswerCache(path) as cache:
        for i in range(count):
            cache.add(f"k{i}", i, answer=f"é\n\ud800 {i}")
    return path.read_bytes()


def test_what_is_added_is_read(path):
    filled(path)
    assert {key: entry["rating"] for key, entry in read_cache(path).items()} == {"k0": 0, "k1": 1, "k2": 2}
    assert read_cache(path)["k1"]["answer"] == "é\n\ud800 1"
    assert read_cache(path.with_name("none")) == {}


def test_any_value_but_null_is_kept(path):
    values = [0, False, "", [], {"description": "é", "list": [0.25, True]}]
    with AnswerCache(path) as cache:
        for i, value in enumerate(values):
            cache.add(f"k{i}", value)
    assert [entry[VALUE] for entry in read_cache(path).values()] == values
    path.write_bytes(path.read_bytes() + b'{"key": "k", "rating": null}\n')
    with pytest.raises(InputError, match="line 6 .*damaged"):
        read_cache(path)


def test_a_cache_of_the_first_version_is_read(path):
    path.parent.mkdir()
    path.write_text('{"key": "k", "rating": 2, "model": "m", "kind": "concept", "answer": "2", "usage": null}\n')
    assert read_cache(path)["k"][VALUE] == 2


def test_cut_off_anywhere_it_keeps_the_whole_lines_and_goes_on(path):
    whole = filled(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = [f"k{i}" for i in range(whole[:length].count(b"\n"))]
        assert list(read_cache(path)) == kept and path.read_bytes() == whole[:length]
        with AnswerCache(path) as cache:
            assert list(cache.entries) == kept
            cache.add("new", 1)
        assert list(read_cache(path)) == [*kept, "new"]


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b'{"key": "k"}', b'{"key": 1, "rating": 1}', b'{"rating": 1}'])
def test_a_damaged_line_within_is_named(path, line):
    path.parent.mkdir()
    path.write_bytes(b'{"key": "a", "rating": 1}\n' + line + b'\n{"key": "b", "rating": 1}\n')
    for reader in (read_cache, AnswerCache):
        with pytest.raises(InputError, match="line 2 .*damaged"):
            reader(path)
    path.write_bytes(path.read_bytes().replace(b"\n" + line + b"\n", b"\n"))
    with AnswerCache(path):  # the failed opening let go of it
        pass


def test_a_second_process_waits_its_turn(path):
    with AnswerCache(path):
        with pytest.raises(InputError, match="in use"):
            AnswerCache(path)
    with AnswerCache(path), pytest.raises(Exception, match="could not be acquired"):
        FileLock(f"{path}.lock").acquire(timeout=0)


def test_threads_add_one_after_the_other(path, monkeypatch):
    """What one thread takes back after a fault must not be what another has just added."""
    writing = threading.Semaphore(1)

    def slowly(descriptor: int) -> None:
        assert writing.acquire(blocking=False)
        time.sleep(0.001)
        writing.release()

    monkeypatch.setattr(os, "fsync", slowly)
    with AnswerCache(path) as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.add(f"k{i}", 1), range(50)))
    assert set(read_cache(path)) == {f"k{i}" for i in range(50)}


def test_a_full_disk_loses_only_what_did_not_fit(path, monkeypatch):
    before = filled(path)

    def half(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:10])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = os.write
    for name, fault in (("write", half), ("fsync", full)):
        with AnswerCache(path) as cache, monkeypatch.context() as patch:
            patch.setattr(os, name, fault)
            with pytest.raises(InputError, match="cannot write"):
                cache.add("new", 1)
            assert "new" not in cache.entries
        assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        AnswerCache(tmp_path / "file" / "cache.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        read_cache(tmp_path)


def test_the_key_depends_on_the_content_alone():
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1}) != content_key({"a": 1, "b": [3]})
    assert len(content_key({"a": "\ud800"})) == 64
