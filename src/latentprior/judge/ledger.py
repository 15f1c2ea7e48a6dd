"""Answers that were paid for, on disk: a list of lines that is only ever added to."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from latentprior.utils.errors import InputError

VALUE = "rating"  # what every answer was when the first ledgers were written


def content_key(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values; the same whatever the order of the keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a ledger by their key; none if there is no file.

    What follows the last line end is what a kill left of a line, and is ignored.

    Raises:
        InputError: the file cannot be read, or a whole line is no entry.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read the ledger {path}: {error.strerror}") from error
    lines = data.split(b"\n")[:-1]
    return dict(_entry(line, path, number) for number, line in enumerate(lines, start=1))


def value_of(entry: Mapping[str, Any]) -> Any:
    """The JSON value that an entry holds, never None."""
    return entry[VALUE]


def _entry(line: bytes, path: Path, number: int) -> tuple[str, dict[str, Any]]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("key"), str) and entry.get(VALUE) is not None:
            return entry["key"], entry
        reason = "it has no key and value"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    # Passing over it would pay a second time for what it held, without a word.
    raise InputError(f"line {number} of the ledger {path} is damaged ({reason}): delete the line to go on without it")


class Ledger:
    """The ledger at `path`, open for adding to by one process at a time; several threads may add.

    Every entry is on disk, flushed, when `add` returns: a kill or a power cut loses no entry, and leaves at most part
    of a line, which is cut off when the ledger is next opened.

    Attributes:
        entries: all entries by key.

    Raises:
        InputError: another process has it open, it cannot be written, or it is damaged (see `read_ledger`).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._adding = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{self.path}.lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"the ledger {self.path} is in use by another process: wait for it to end") from error
        except OSError as error:
            raise InputError(f"cannot write the ledger {self.path}: {error.strerror}") from error
        try:
            self.entries = read_ledger(self.path)
            self._file = self._opened()
        except BaseException:
            self._lock.release()
            raise

    def _opened(self) -> int:
        """A descriptor that adds after the last whole line."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(descriptor, self.path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise InputError(f"cannot write the ledger {self.path}: {error.strerror}") from error
        return descriptor

    def add(self, key: str, value: Any, **values: Any) -> None:
        """Add an entry and flush it to disk.

        Args:
            key: from `content_key`.
            value: any JSON value but null.
            values: JSON values to keep beside it.

        Raises:
            InputError: the disk is full or cannot be written; what was written of the line is taken back.
        """
        entry = {"key": key, VALUE: value, **values}
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._adding:
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(None, "the disk is full")
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, size)
                raise InputError(f"cannot write the ledger {self.path}: {error.strerror}") from error
            self.entries[key] = entry

    def close(self) -> None:
        """Let other processes have it."""
        os.close(self._file)
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
