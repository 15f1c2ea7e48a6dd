"""Answers that were paid for, on disk: a file of JSON lines that is only ever added to."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from latentprior.utils.errors import InputError

VALUE = "rating"  # what every answer was when the first of these files were written


def content_key(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values; the same whatever the order of the keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_cache(path: str | Path) -> dict[str, dict[str, Any]]:
    """The entries of a cache by their key; what a kill left of a last line is ignored."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read the answers in {path}: {error.strerror}") from error
    return dict(_entry(line, path, number) for number, line in enumerate(data.split(b"\n")[:-1], start=1))


def _entry(line: bytes, path: str | Path, number: int) -> tuple[str, dict[str, Any]]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("key"), str) and entry.get(VALUE) is not None:
            return entry["key"], entry
        reason = "it has no key and value"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    # If it were skipped, what it held would be paid for again without anyone knowing.
    raise InputError(f"line {number} of the answers in {path} is damaged ({reason}): delete it to go on without it")


class AnswerCache:
    """The answers in the file `path`, open for adding by one process at a time; several threads may add.

    An answer is on disk, flushed, when `add` returns: a kill or a power cut loses none, and leaves at most part of a
    line, which is cut off when the file is next opened. `entries` holds all of them by key.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._adding = Path(path), threading.Lock()
        with self._writing(), ExitStack() as opened:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened.enter_context(FileLock(f"{self.path}.lock", timeout=0))
            self.entries = read_cache(self.path)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            opened.callback(os.close, self._file)
            os.ftruncate(self._file, self.path.read_bytes().rfind(b"\n") + 1)
            self._opened = opened.pop_all()

    def add(self, key: str, value: Any, **values: Any) -> None:
        """Add a JSON value that is not null under its `content_key`, with `values` beside it; all of it or nothing."""
        entry = {"key": key, VALUE: value, **values}
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._adding, self._writing():
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(None, "the disk is full")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
            self.entries[key] = entry

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Timeout as error:
            raise InputError(f"{self.path} is in use by another process: wait for it to end") from error
        except OSError as error:
            raise InputError(f"cannot write the answers to {self.path}: {error.strerror}") from error

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()
