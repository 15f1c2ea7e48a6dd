"""Checks that configurations share, and their way to plain values and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latentprior.utils.errors import InputError, unknown

Folder = str  # what --help shows as the type of an option
File = str
Prior = str  # the name of an installed one, a folder or a repository
Size = str

Solver = Literal["euler", "midpoint", "heun", "ab2"]
Grid = Literal["uniform", "official"]
Side = Literal["output", "input", "mlp"]

_NEVER = object()  # equal to no value

SOLVERS: tuple[Solver, ...] = get_args(Solver)
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
        return isinstance(value, str)  # which one is checked by `choices`
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
            values = getattr(owner, name) if several else [getattr(owner, name)]
            known(f"{type(owner).__name__}.{name}", values, get_args(choice))


def known(what: str, values: Iterable[str], valid: Collection[str]) -> None:
    for value in values:
        if value not in valid:
            raise unknown(what, value, valid)


def at_least(least: int, owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < least:
            raise InputError(f"{type(owner).__name__}.{name} must be at least {least}, got {getattr(owner, name)}")


def meaningless(owner: object, mode: str, *names: str) -> None:
    """Refuse options, dotted in a group, that differ from their default although they mean nothing in `mode`.

    A group is given if any field of it is, but for "device", which may be meant for the whole command.
    """
    for name in names:
        group, _, last = name.rpartition(".")
        holder: Any = attrgetter(group)(owner) if group else owner
        f, value = next(f for f in dataclasses.fields(holder) if f.name == last), getattr(holder, last)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        given = [name] if value != default else []
        if given and dataclasses.is_dataclass(value):
            inner = [g.name for g in dataclasses.fields(value) if g.name != "device"]
            given = [f"{name}.{key}" for key in inner if getattr(value, key) != getattr(default, key)]
        if given:
            raise InputError(f"{written(type(owner), given[0])} means nothing {mode}: leave it out")


def dashed(name: str) -> str:
    """The name of a field as an option of the command line."""
    return "--" + name.replace("_", "-")


def written(cls: type, name: str) -> str:
    """The option of `cls` as on the command line: groups in ``UNNAMED`` are left out, or stand for their path."""
    group, _, rest = name.partition(".")
    unnamed = rest and group in getattr(cls, "UNNAMED", ())
    return dashed((group if rest == "path" else rest) if unnamed else name)


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
    """A size like "65536", "64k", "2GB" or "512MiB": its number, and whether it counts bytes (its unit says so)."""
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
    """A size that must have a unit, in bytes; None for none."""
    if size is None:
        return None
    amount, in_bytes = size_of(name, size)
    if not in_bytes:
        raise InputError(f"{name} needs a unit, such as '20GB', got {size!r}")
    return amount


MOVED = {"llm.device": "device"}  # options that have become others


def moved(option: str) -> InputError | None:
    """An `InputError` that names the option that `option` has become; None if it is not one that moved."""
    option = ".".join(option.split(".")[-2:])
    new = MOVED.get(option)
    return InputError(f"{option} has become {new}: --{new} says where all of a command computes") if new else None


def changeable(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that does not decide results (see `settings_of`): a run that continues another may change it."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"changeable": True})


def added(default: Any, *, before: Any) -> Any:
    """A field that the first version had not, and that meant `before` then: with that value it is not among the
    settings, so that older runs are continued and older files read."""
    return dataclasses.field(default=default, metadata={"before": before})


def changes_of(cls: type) -> Any:
    """A field of type ``dict[str, Any]``: new values by name for some of the fields of `cls`, by default none."""
    return dataclasses.field(default_factory=dict, metadata={"changes": cls})


def settings_of(config: Any) -> dict[str, Any]:
    """The values that decide a result, JSON-ready, nested ones included: two runs that agree in them are one run."""
    fields = [f for f in dataclasses.fields(config) if not f.metadata.get("changeable")]
    values = {f.name: value for f in fields if (value := getattr(config, f.name)) != f.metadata.get("before", _NEVER)}
    return {name: _settings_within(value) for name, value in values.items()}


def _settings_within(value: Any) -> Any:
    if isinstance(value, list):
        return [_settings_within(item) for item in value]
    return settings_of(value) if dataclasses.is_dataclass(value) else value


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-ready values."""
    return dataclasses.asdict(config)


def old_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that their fields have in files, which keep those of the first version (``cls.RENAMED``)."""
    old = {new: before for before, new in getattr(cls, "RENAMED", {}).items()}
    return {old.get(name, name): value for name, value in values.items()}


def full_name(cls: type, name: str) -> str | None:
    """The dotted name in full of an option or a group of `cls`; None if there is none.

    A group may be left out where no other has the rest; names in a dataclass's ``RENAMED`` are replaced by the present.
    """
    if own := _name_within(cls, name):
        return own
    within = {group: _name_within(kind, name) for group, kind in groups(cls).items()}
    found = [f"{group}.{rest}" for group, rest in within.items() if rest]
    if len(found) > 1:
        raise InputError(f"{name} may be {' or '.join(found)}: say which")
    return found[0] if found else None


@cache  # every option of a command line asks
def groups(cls: type) -> dict[str, type]:
    """The fields of `cls` that are groups of options, and the dataclass that says what is in each."""
    hints = get_type_hints(cls)
    kinds = {f.name: f.metadata.get("changes") or hints[f.name] for f in dataclasses.fields(cls)}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _name_within(cls: type, name: str) -> str | None:
    first, _, rest = name.partition(".")
    first = getattr(cls, "RENAMED", {}).get(first, first)
    if first not in {f.name for f in dataclasses.fields(cls)}:
        return None
    if not rest:
        return first
    inner = full_name(groups(cls)[first], rest) if first in groups(cls) else None
    return inner and f"{first}.{inner}"


def grouped(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of fields of `cls`: each in the group of its option, also where that was left out.

    One value for a group that has a path is the path, as in ``store: DIR``.
    """
    kinds, found = groups(cls), {}
    for key, value in values.items():
        name = full_name(cls, key)
        if name is None:
            title = cls.__name__.removesuffix("Config")
            options = [f.name for f in dataclasses.fields(cls)]
            within = [option.name for kind in kinds.values() for option in dataclasses.fields(kind)]
            raise moved(f"{title.lower()}.{key}") or unknown(f"{cls.__name__} key", key, options + within)
        group, _, rest = name.partition(".")
        if rest:
            value = {rest: value}
        elif group in kinds:
            value = _of_group(group, kinds[group], value)
        found[group] = {**found.get(group, {}), **value} if group in kinds else value
    return found


def _of_group(name: str, kind: type, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, kind):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    if "path" not in kind.__annotations__:
        raise InputError(f"{name} is a group of options, not {value!r}")
    return {"path": value}


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` from plain values, nested dataclasses included; see `full_name` for their names."""
    types, kinds, given = get_type_hints(cls), groups(cls), grouped(cls, values)
    built, missing = {}, []
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.name not in given and not required:
            continue
        if "changes" in f.metadata:
            built[f.name] = grouped(f.metadata["changes"], given[f.name])
        elif f.name in kinds:
            built[f.name] = from_dict(kinds[f.name], given.get(f.name, {}))
        elif f.name in given:
            built[f.name] = _of_kind(types[f.name], given[f.name])
        else:
            missing.append(f.name)
    if missing:
        raise InputError(f"{dashed(missing[0])} must be given: {cls.__name__} has no default for it")
    return cls(**built)


def _of_kind(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        nested = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        return [from_dict(inner, item) if nested and isinstance(item, dict) else item for item in value]
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(value)  # JSON and YAML have lists only
    return value
