"""The options of a command: every field of its configuration by its dotted name; what a name means, and a value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from latentprior.config.base import count_of, dashed, from_dict, full_name, moved
from latentprior.utils.errors import InputError, unknown

SHOWN = {"int": "INT", "float": "NUMBER", "bool": "yes|no", "str": "TEXT"}
"""Types as --help shows them; others by their name in capitals."""
WANTED = {
    int: "a whole number, such as 7, 64k or 2e6",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, such as 7,15",
}
UNSET = object()  # the default of what only changes something else
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Option:
    """A field of a configuration, or of a group (a nested dataclass) in it."""

    name: str
    """With its groups, as in "llm.model"."""
    kind: Any
    """Its type."""
    shown: str
    """Its type as --help shows it."""
    default: Any
    """`dataclasses.MISSING` if it must be given; `UNSET` if it has none of its own."""
    doc: str


def options_of(cls: type, group: Any = MISSING, prefix: str = "") -> dict[str, Option]:
    """Every option of a configuration by name, in the order of its fields.

    Args:
        group: an instance whose values are the defaults; by default those of `cls`.
        prefix: of the names.
    """
    kinds, docs = get_type_hints(cls), docs_of(cls)
    found = {}
    for f in dataclasses.fields(cls):
        name, kind = prefix + f.name, kinds[f.name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = default if group is MISSING else getattr(group, f.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found |= options_of(kind, default, f"{name}.")
        elif changed := f.metadata.get("changes"):
            options = options_of(changed, prefix=f"{name}.")
            found |= {key: dataclasses.replace(option, default=UNSET) for key, option in options.items()}
        else:
            found[name] = Option(name, kind, _shown(kind, str(f.type)), default, docs[f.name])
    return found


def groups_of(cls: type, prefix: str = "") -> dict[str, type]:
    """A configuration and the groups in it by dotted name; its own is empty."""
    found = {prefix: cls}
    for f in dataclasses.fields(cls):
        kind = f.metadata.get("changes") or get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found |= groups_of(kind, f"{prefix}.{f.name}".lstrip("."))
    return found


@cache
def docs_of(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, and of those that it extends, on one line."""
    docs = {}
    for owner in reversed(cls.__mro__[:-1]):
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        for node, below in pairwise([*definition.body, ast.Pass()]):
            if isinstance(node, ast.AnnAssign):
                text = str(ast.literal_eval(below.value)) if isinstance(below, ast.Expr) else ""
                docs[ast.unparse(node.target)] = " ".join(text.split())
    return docs


def _shown(kind: Any, annotation: str) -> str:
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return "{...},..." if dataclasses.is_dataclass(inner) else f"{_shown(inner, annotation[5:-1])},..."
    if get_origin(kind) is tuple:
        return ",".join(_shown(inner, inner.__name__) for inner in get_args(kind))
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    name = annotation.removesuffix(" | None").partition("[")[0]
    return SHOWN.get(name, name.upper())


def resolved(cls: type, name: str, *, written: Callable[[str], str] = str) -> str:
    """The dotted name in full of an option or group, as far as there is one: see `full_name`."""
    group, dot, last = name.rpartition(".")
    return full_name(cls, name, written=written) or (f"{resolved(cls, group)}.{last}" if dot else name)


def option_named(name: str, options: Mapping[str, Option], *, written: Callable[[str], str] = str) -> Option:
    """The option of a full name.

    Args:
        written: how a name stands in messages: as in a file, or `dashed`.

    Raises:
        InputError: there is none.
    """
    if name in options:
        return options[name]
    kind = "option" if written is dashed else "key"
    raise moved(name) or unknown(kind, written(name), map(written, _siblings(name, options)))


def _siblings(name: str, options: Mapping[str, Option]) -> list[str]:
    """The names in the innermost group of `name` that there is, or all."""
    while name := name.rpartition(".")[0]:
        if found := [other for other in options if other.startswith(f"{name}.")]:
            return found
    return list(options)


def flat(cls: type, values: Any, options: Mapping[str, Option], group: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name that a mapping, such as a YAML file holds, gives: read, and groups taken apart."""
    if not isinstance(values, dict):
        names = ", ".join(dashed(name) for name in options if name.startswith(group))
        got = textwrap.shorten(str(values), 60)
        raise InputError(f"{group[:-1]} is a group of options, not {got!r}: {names}" if group else
                         f"a configuration file holds options by name, such as 'layers: [7]', got {got!r}")  # fmt: skip
    for key, value in values.items():
        name = resolved(cls, f"{group}{key}")
        if f"{name}.path" in options and not isinstance(value, dict):
            name += ".path"
        if any(other.startswith(f"{name}.") for other in options):
            yield from flat(cls, value, options, f"{name}.")
        else:
            option = option_named(name, options)
            yield option.name, read(option.name, option.kind, value)


def build(cls: type, given: Mapping[str, Any]) -> Any:
    """The configuration with these values by dotted name, and the defaults of all other options.

    Raises:
        InputError: an option that must be given is not, or a value is not valid.
    """
    values: dict[str, Any] = {}
    for name, option in options_of(cls).items():
        value = given.get(name, option.default)
        if value is MISSING:
            raise InputError(f"{dashed(name)} must be given: {option.doc}")
        if value is UNSET:
            continue
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return from_dict(cls, values)


def read(name: str, kind: Any, given: Any) -> Any:
    """A value of the type `kind`, from text of the command line or from a value of a YAML file.

    Raises:
        InputError: it is none; the message begins with `name`.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in kinds and given in (None, "null"):
        return None
    kind = kinds[0]
    try:
        return _read(name, kind, given)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, yaml.YAMLError):
        got = textwrap.shorten(str(given), 60)
        raise InputError(f"{name} must be {_wanted(kind)}, got {got!r}") from None


def _wanted(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    return WANTED.get(get_origin(kind) or kind, "values by name")


def _read(name: str, kind: Any, given: Any) -> Any:
    if get_origin(kind) is Literal:
        if given not in get_args(kind):
            raise unknown(name, given, get_args(kind))
        return given
    if get_origin(kind) in (list, tuple):
        return _read_list(name, kind, given)
    if kind is bool:
        return given if isinstance(given, bool) else BOOLEANS[given.lower()]
    if isinstance(given, bool):
        raise ValueError
    if kind is str:
        if not isinstance(given, str | int | float):
            raise ValueError
        return str(given)
    if kind is int:
        count = given if isinstance(given, int) else count_of(str(given))
        return int(given) if count is None else count  # int(): of a negative number
    if kind is float:
        return float(given)
    return _read_group(name, kind, yaml.safe_load(given) if isinstance(given, str) else given)


def _read_list(name: str, kind: Any, given: Any) -> list[Any] | tuple[Any, ...]:
    inner = get_args(kind)[0]
    if isinstance(given, str):
        listed = given.startswith("[") or dataclasses.is_dataclass(inner)
        given = yaml.safe_load(given) if listed else [item.strip() for item in given.split(",")]
    if not isinstance(given, list | tuple) or (get_origin(kind) is tuple and len(given) != len(get_args(kind))):
        raise ValueError
    return get_origin(kind)(read(name, inner, item) for item in given)


def _read_group(name: str, cls: type, values: Any) -> Any:
    try:
        return build(cls, dict(flat(cls, values, options_of(cls))))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
