"""Checks that configurations share, and their way to plain values and back."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latentprior.utils.errors import InputError, unknown

Folder = str  # what --help shows as the type of an option
File = str
Size = str

Solver = Literal["euler", "midpoint", "heun", "ab2"]
Grid = Literal["uniform", "official"]
Side = Literal["output", "input", "mlp"]

SOLVERS: tuple[Solver, ...] = get_args(Solver)
SIDES: tuple[Side, ...] = get_args(Side)
GRIDS: tuple[Grid, ...] = get_args(Grid)


def typed(owner: object) -> None:
    """Refuse fields of another type, which values from a file or from ``--recipe`` may have."""
    for name, kind in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if not _is_of(value, kind):
            shown = kind.__name__ if isinstance(kind, type) else kind
            raise InputError(f"{type(owner).__name__}.{name} must be {shown}, got {value!r}")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which one is checked by `one_of`
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if isinstance(kind, UnionType):
        return any(_is_of(value, option) for option in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise InputError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def choices(owner: object) -> None:
    """Refuse a value of a field of type `Literal`, or of a list of it, that the type does not name."""
    for name, kind in get_type_hints(type(owner)).items():
        several = get_origin(kind) is list
        choice = get_args(kind)[0] if several else kind
        if get_origin(choice) is Literal:
            for value in getattr(owner, name) if several else [getattr(owner, name)]:
                if value not in get_args(choice):
                    raise unknown(f"{type(owner).__name__}.{name}", value, get_args(choice))


def one_of(owner: object, name: str, valid: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in valid:
        raise unknown(f"{type(owner).__name__}.{name}", value, valid)


def meaningless(owner: object, mode: str, *names: str) -> None:
    """Refuse options that were given, which is to say differ from their default, although they mean nothing.

    Args:
        mode: in which they mean nothing, in words, as in "with a store".
        names: of fields; one of a nested dataclass is given if any field of it is, but for "device", which may be
            meant for the whole command.

    Raises:
        InputError: one of them was given.
    """
    fields = {f.name: f for f in dataclasses.fields(owner)}  # pyright: ignore[reportArgumentType]
    for name in names:
        f, value = fields[name], getattr(owner, name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        given = [name] if value != default else []
        if given and dataclasses.is_dataclass(value):
            inner = [g.name for g in dataclasses.fields(value) if g.name != "device"]
            given = [f"{name}.{key}" for key in inner if getattr(value, key) != getattr(default, key)]
        if given:
            raise InputError(f"{dashed(given[0])} means nothing {mode}: leave it out")


def dashed(name: str) -> str:
    """The name of a field as an option of the command line."""
    return "--" + name.replace("_", "-")


def unit_interval(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise InputError(f"{type(owner).__name__}.{name} must lie in [0, 1], got {value}")


_PREFIXES = "KMGT"
UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, prefix in enumerate(_PREFIXES, start=1)
    for unit, base in ((prefix, 1000), (f"{prefix}B", 1000), (f"{prefix}iB", 1024))
}


def size_of(name: str, size: str) -> tuple[int, bool]:
    """A size like "65536", "64k", "2GB" or "512MiB": its number, and whether it counts bytes (its unit says so).

    Raises:
        InputError: not a positive number with an optional unit.
    """
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)(e[0-9]{1,2})?\s*([A-Za-z]*)", size.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    number, exponent, unit = found.groups() if found else ("0", None, "")
    amount = int(float(number + (exponent or "")) * units.get(unit.lower(), 0))
    if amount < 1:
        raise InputError(f"{name} must be a number of activations or a size such as '2GB', got {size!r}")
    return amount, unit.lower().endswith("b")


def count_of(text: str) -> int | None:
    """The whole number that "1M", "2.5k", "2e6", "1_000_000" or plain digits stand for; None if they stand for none."""
    found = re.fullmatch(rf"([0-9][0-9_]*(?:\.[0-9]+)?)(e[0-9]{{1,2}})?([{_PREFIXES}]?)", text, re.IGNORECASE)
    if found is None:
        return None
    number, exponent, unit = found.groups()
    amount = Fraction(number + (exponent or "")) * UNITS[unit.upper()]
    return int(amount) if amount.denominator == 1 else None


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


MOVED = {"llm.device": "device"}  # options that have become others


def moved(option: str) -> InputError | None:
    """An `InputError` that names the option that `option` has become; None if it is not one that moved."""
    new = MOVED.get(option)
    return InputError(f"{option} has become {new}: --{new} says where all of a command computes") if new else None


def beside(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that a run which continues another may change: where results go, which more there are, how fast.

    All other fields decide results: see `settings_of`.
    """
    if default_factory is dataclasses.MISSING:
        return dataclasses.field(default=default, metadata={"beside": True})
    return dataclasses.field(default_factory=default_factory, metadata={"beside": True})


def changes_of(cls: type) -> Any:
    """A field of type ``dict[str, Any]``: new values by name for some of the fields of `cls`, by default none."""
    return dataclasses.field(default_factory=dict, metadata={"changes": cls})


def settings_of(config: Any) -> dict[str, Any]:
    """The values that decide a result, JSON-ready, nested ones included: two runs that agree in them are one run."""
    decisive = [f.name for f in dataclasses.fields(config) if not f.metadata.get("beside")]
    values = {name: getattr(config, name) for name in decisive}
    return {name: settings_of(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


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
            old = f"{cls.__name__.removesuffix('Config').lower()}.{key}"
            raise moved(old) or unknown(f"{cls.__name__} key", key, fields)
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
