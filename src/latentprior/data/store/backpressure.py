"""How a recorder and the trainer that follows it wait for each other, through two small files beside the shards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json

CONSUMED = "consumed.json"
"""Written by the trainer: shards before a number are no longer needed."""
WAITING = "waiting"
"""There while the recorder has no room for its next shard."""
LONGEST_PAUSE = 1.0  # seconds


def read_consumed(folder: Path) -> int:
    """The number of the first shard that is still needed; 0 if no trainer has said so."""
    path = folder / CONSUMED
    try:
        return int(json.loads(path.read_bytes())["shard"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: remove it once no trainer needs the store") from error


def write_consumed(folder: Path, shard: int) -> None:
    """Say that the shards before number `shard` are no longer needed."""
    with _writing(folder / CONSUMED) as path:
        replace_json(path, {"shard": shard}, indent=None)


@contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Show in `folder` that the recorder waits for room; a kill can leave the sign behind."""
    with _writing(folder / WAITING) as path:
        path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def is_waiting(folder: Path) -> bool:
    return (folder / WAITING).exists()


def polling(seconds: float, poll: float) -> Iterator[None]:
    """Times to look again: now, after pauses that double from `poll` to a second, and last when `seconds` are over."""
    deadline = time.monotonic() + seconds
    yield
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(poll, left))
        poll = min(2 * poll, LONGEST_PAUSE)
        yield


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
