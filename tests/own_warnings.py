"""Deprecations that this package causes are errors, whichever module the warning is put down to."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import FrameType

FORWARDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def raising(warn: Callable) -> Callable:
    """`warnings.warn` that raises a FutureWarning or DeprecationWarning of which this package is the cause.

    A library warns at its caller, by `stacklevel`; but what called it, and is blamed, is often a wrapper that hands
    everything on, such as `torch.nn.Module.__call__`. So the first function from there on is looked for that takes
    arguments of its own.
    """

    @functools.wraps(warn)
    def warn_or_raise(message, category=UserWarning, stacklevel=1, *arguments, **options):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning  # None is allowed
        if issubclass(kind, (FutureWarning, DeprecationWarning)) and _is_ours(inspect.currentframe(), stacklevel):
            raise message if isinstance(message, Warning) else kind(message)
        return warn(message, category, stacklevel + 1, *arguments, **options)

    return warn_or_raise


def _is_ours(frame: FrameType | None, stacklevel: int) -> bool:
    for _ in range(stacklevel):
        frame = frame.f_back if frame else None
    while frame and frame.f_code.co_flags & FORWARDS == FORWARDS:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "latentprior"


def install() -> None:
    """Make it the `warnings.warn` of this process."""
    warnings.warn = raising(warnings.warn)
