"""One process at a time in a folder: a second start of the same command is refused while the first one lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError
from latentprior.utils.files import check_folder

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """Hold `folder`, made if it is not there, against other processes and other holders in this one; gives its path.

    The lock is the operating system's: it ends with its process, however that ends. Folders made here that are still
    empty at the end are removed again. A file system without locks is only warned of.
    """
    folder = Path(folder)
    check_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = None
    try:
        descriptor = _lock(folder)
        yield folder
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is unlocked: later it could be another holder's
            os.close(descriptor)
        with suppress(OSError):
            for path in made:
                path.rmdir()


@contextmanager
def locked_by_first(folder: str | Path, world: World) -> Iterator[None]:
    """`locked` by the first process of `world` for all of them; where it is refused, all of them raise."""
    with ExitStack() as stack:
        refused = None
        if world.main:
            try:
                stack.enter_context(locked(folder))
            except InputError as error:
                refused = str(error)
        if refused := world.first(refused):
            raise InputError(refused)
        yield


def _lock(folder: Path) -> int:
    """The open descriptor of the folder's lock file, which is this process's from here on."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its last holder removed the folder between the two
            continue
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
        try:
            _take(descriptor, folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed by the holder before: what is locked is no longer in the folder


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        raise InputError(f"{folder} is in use{holder}: wait until that ends, or choose another folder") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
        warnings.warn(f"{folder} lies on a file system without locks: start nothing else in it", stacklevel=4)


def _holder(descriptor: int) -> str:
    """Who wrote itself into the lock file, in words; nothing if that cannot be read yet."""
    number, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    if not number:
        return ""
    return f" by process {number}" + ("" if host == socket.gethostname() else f" on {host}")
