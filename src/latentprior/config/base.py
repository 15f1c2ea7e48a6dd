"""Checks that configurations share, and their way to plain values and back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latentprior.errors import InputError, unknown

Solver = Literal["euler", "midpoint", "heun", "ab2"]
Grid = Literal["uniform", "official"]
Side = Literal["output", "input", "mlp"]

SOLVERS: tuple[Solver, ...] = ("euler", "midpoint", "heun", "ab2")
SIDES: tuple[Side, ...] = ("output", "input", "mlp")
GRIDS: tuple[Grid, ...] = ("uniform", "official")


def positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise InputError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def one_of(owner: object, name: str, valid: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in valid:
        raise unknown(f"{type(owner).__name__}.{name}", value, valid)


def unit_interval(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise InputError(f"{type(owner).__name__}.{name} must lie in [0, 1], got {value}")


UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in ((f"{prefix}B", 1000), (f"{prefix}iB", 1024))
}


def size_of(name: str, size: str) -> tuple[int, bool]:
    """A size like "65536", "2GB" or "512MiB": its number, and whether it counts bytes (it has a unit).

    Raises:
        InputError: not a positive number with an optional unit.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(e[0-9]+)?\s*([A-Za-z]*)", size.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    number, exponent, unit = found.groups() if found else ("0", None, "")
    amount = int(float(number + (exponent or "")) * units.get(unit.lower(), 0))
    if amount < 1:
        raise InputError(f"{name} must be a number of activations or a size such as '2GB', got {size!r}")
    return amount, bool(unit)


def bytes_of(name: str, size: str | None) -> int | None:
    """A size that must have a unit, in bytes; None for none.

    Raises:
        InputError: no unit, or no size.
    """
    if size is None:
        return None
    amount, in_bytes = size_of(name, size)
    if not in_bytes:
        raise InputError(f"{name} needs a unit, such as '20GB', got {size!r}")
    return amount


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from plain values, nested dataclasses included.

    Raises:
        InputError: a key that `cls` does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown(f"{cls.__name__} key", key, fields)
    types = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        kind = types[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = from_dict(kind, value)
        elif (
            get_origin(kind) is list
            and isinstance(inner := get_args(kind)[0], type)
            and dataclasses.is_dataclass(inner)
        ):
            value = [from_dict(inner, item) if isinstance(item, dict) else item for item in value]
        elif get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)  # JSON and YAML have lists only
        built[key] = value
    return cls(**built)
