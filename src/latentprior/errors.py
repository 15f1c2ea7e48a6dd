"""Errors that a user can mend: one line that says what was wrong and what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. The message is one line; the command line prints it without a traceback."""


class Stopped(Exception):
    """Work was asked to stop, as by SIGTERM, and is saved: the same call continues it."""


def unknown(kind: str, name: object, valid: Iterable[object], *, most: int = 12) -> InputError:
    """An `InputError` for a name that does not exist, with its nearest valid ones.

    Args:
        kind: what the name names, such as "column".
        name: what was given.
        valid: everything that would have been accepted.
        most: how many valid names the message lists at most.
    """
    options = [str(option) for option in valid]
    near = difflib.get_close_matches(str(name), options, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    listed = ", ".join(options[:most]) + (f", ... ({len(options)} in all)" if len(options) > most else "")
    return InputError(f"unknown {kind} {str(name)!r}{hint} (valid: {listed or 'none'})")
