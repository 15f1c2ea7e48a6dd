"""Files that are there whole or not at all: `replaced` is the one atomic write, which everything that is kept uses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentprior.utils.errors import InputError

PARTIAL = ".partial"  # ending of a file that is being written


def check_folder(folder: str | Path) -> None:
    """Raise `InputError` if `folder`, or what it is to lie in, is a file."""
    folder = Path(folder)
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if there.exists() and not there.is_dir():
        where = "" if there == folder else f", so there can be no folder {folder}"
        raise InputError(f"{there} is a file, not a folder{where}: choose another one")


def check_file(path: str | Path) -> None:
    """Raise `InputError` if `path`, a file to be written, is a folder or would lie below a file."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder: name a file to write")
    check_folder(Path(path).parent)


def sync(path: Path) -> None:
    """Flush a file, or of a folder the renames in it, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush every file below `folder` to disk, before a rename of `folder` that a power cut must not undo by half."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; see `replaced`."""
    replace_bytes(path, text.encode("utf-8"))


def replace_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON and a newline, whole or not at all; see `replaced`."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replaced`."""
    with replaced(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replaced(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A temporary name to write a file under, which is flushed to disk and renamed to `path` when the block ends well.

    The file gets the permissions of the process's new files, whoever writes it: safetensors would keep it to its owner.

    Args:
        flush: False for thousands of files that can be written again: after a power cut some may be empty.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # what a kill left may have other permissions
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        if flush:
            sync(partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if flush:
        sync(path.parent)
