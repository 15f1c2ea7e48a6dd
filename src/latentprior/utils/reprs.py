"""A `repr` of one line for dataclasses that hold tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

LONG = 8  # entries from which on a sequence is counted rather than shown


class ShortRepr:
    """Base of dataclasses (with ``repr=False``): tensors appear by precision and shape, long lists by length."""

    def __repr__(self) -> str:
        shown = (f"{f.name}={_short(getattr(self, f.name))}" for f in dataclasses.fields(self) if f.repr)  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple, dict)) and len(value) >= LONG:
        return f"<{type(value).__name__} of {len(value)}>"
    return repr(value)
