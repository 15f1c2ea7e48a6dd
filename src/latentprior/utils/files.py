"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentprior.utils.errors import InputError


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


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, flush it to disk, then rename it to `path`."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """`replace_text` for bytes."""
    with replaced(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under, which is flushed to disk and renamed to `path` when the block ends well.

    The file gets the permissions of the process's new files, whoever writes it: safetensors would keep it to its owner.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # what a kill left may have other permissions
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)
