"""Errors that a user can mend: one line that says what was wrong and what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Input that cannot be used. The message is one line; the command line prints it without a traceback."""


class Stopped(Exception):
    """Work was asked to stop, as by SIGTERM, and is saved: the same call continues it."""


def unknown(kind: str, name: object, valid: Iterable[object], *, most: int = 12) -> InputError:
    """An `InputError` for a `name` of some `kind`, such as "column", that is not `valid`, of which it lists `most`."""
    options = [str(option) for option in valid]
    near = nearest(str(name), options)
    hint = f"; {near}" if near else ""
    listed = ", ".join(options[:most]) + (f", ... ({len(options)} in all)" if len(options) > most else "")
    return InputError(f"unknown {kind} {str(name)!r}{hint} (valid: {listed or 'none'})")


def nearest(name: str, valid: Iterable[str]) -> str:
    """ "did you mean 'a' or 'b'?" of the nearest valid names; empty if none is near."""
    near = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest_path(path: str) -> str:
    """`nearest` among what lies beside a file or folder that is not there, in brackets with a space before it."""
    parent = Path(path).parent
    try:
        near = nearest(str(Path(path)), [str(parent / other.name) for other in parent.iterdir()])
    except OSError:  # no such folder, or one that may not be read
        near = ""
    return f" ({near})" if near else ""
