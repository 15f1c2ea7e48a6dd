"""The options of a command: every field of its configuration by its dotted name, what a name means, and a value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from latentprior.config.base import count_of, dashed, from_dict, full_name, groups, moved, written
from latentprior.utils.errors import InputError, unknown

SHOWN = {"int": "INT", "float": "NUMBER", "bool": "yes|no", "str": "TEXT"}  # others by their name in capitals
WANTED = {
    int: "a whole number, such as 7, 64k or 2e6",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, such as 7,15",
}
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
UNSET = object()  # the default of what only changes something else


@dataclass(frozen=True)
class Option:
    """A field of a configuration, or of a group (a nested dataclass) in it."""

    name: str  # with its groups, as in "llm.model"
    written: str  # as on the command line, as in "--llm.model": see `base.written`
    kind: Any
    shown: str  # its type as --help shows it
    default: Any  # `dataclasses.MISSING` if it must be given; `UNSET` if it has none of its own
    doc: str


def options_of(cls: type) -> dict[str, Option]:
    """Every option of a configuration by name, in the order of its fields."""
    options = _options(cls, MISSING, "")
    return {option.name: dataclasses.replace(option, written=written(cls, option.name)) for option in options}


def _options(cls: type, values: Any, prefix: str) -> Iterator[Option]:
    """The options of a dataclass; `values` is an instance with the defaults, if they are not the dataclass's own."""
    kinds, docs, inner = get_type_hints(cls), docs_of(cls), groups(cls)
    for f in dataclasses.fields(cls):
        name, kind = prefix + f.name, kinds[f.name]
        default = f.default if f.default_factory is MISSING else f.default_factory()
        default = default if values is MISSING else UNSET if values is UNSET else getattr(values, f.name)
        if f.name in inner:
            yield from _options(inner[f.name], UNSET if "changes" in f.metadata else default, f"{name}.")
        else:
            yield Option(name, name, kind, _shown(kind, str(f.type)), default, docs[f.name])


@cache
def docs_of(cls: type) -> dict[str, str]:
    """What is said of each field of a dataclass, and of those that it extends, on one line."""
    docs = {}
    for owner in reversed(cls.__mro__[:-1]):
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        for node, below in pairwise([*definition.body, ast.Pass()]):
            if isinstance(node, ast.AnnAssign):
                name = ast.unparse(node.target)
                text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
                docs[name] = " ".join(text.split())
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


def named(cls: type, name: str, *, on_command_line: bool = False) -> Option | str:
    """The option that a name means, or the name in full of the group that it means; see `full_name`."""
    full, options = full_name(cls, name), options_of(cls)
    if full in options:
        return options[full]
    if full is not None:
        return full
    within = name
    while within := within.rpartition(".")[0]:  # the innermost group that there is, else all
        if group := full_name(cls, within):
            options = {key: option for key, option in options.items() if key.startswith(f"{group}.")} or options
            break
    if on_command_line:
        raise moved(name) or unknown("option", dashed(name), [option.written for option in options.values()])
    raise moved(name) or unknown("key", name, options)


def flat(cls: type, values: Any, group: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name that a mapping, such as a YAML file holds, gives: read, and groups taken apart."""
    if isinstance(values, str) and f"{group}path" in options_of(cls):
        values = {"path": values}
    if not isinstance(values, dict):
        names = ", ".join(option.written for name, option in options_of(cls).items() if name.startswith(group))
        got = textwrap.shorten(str(values), 60)
        raise InputError(f"{group[:-1]} is a group of options, not {got!r}: {names}" if group else
                         f"a configuration file holds options by name, such as 'layers: [7]', got {got!r}")  # fmt: skip
    for key, value in values.items():
        meant = named(cls, f"{group}{key}")
        if isinstance(meant, str):
            yield from flat(cls, value, f"{meant}.")
        else:
            yield meant.name, read(meant.name, meant.kind, value)


def build(cls: type, given: Mapping[str, Any]) -> Any:
    """The configuration with these values by dotted name, and the defaults of all other options."""
    values = {name: option.default for name, option in options_of(cls).items() if option.default is not UNSET}
    values |= given
    if missing := next((name for name, value in values.items() if value is MISSING), None):
        option = options_of(cls)[missing]
        raise InputError(f"{option.written} must be given: {option.doc}")
    return from_dict(cls, values)


def read(name: str, kind: Any, given: Any) -> Any:
    """A value of the type `kind`, from text of the command line or a YAML file; errors begin with `name`."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in kinds and given in (None, "null"):
        return None
    try:
        return _read(name, kinds[0], given)
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, yaml.YAMLError):
        several = f"{len(get_args(kind))} numbers" if get_origin(kind) is tuple else "values by name"
        wanted = WANTED.get(get_origin(kinds[0]) or kinds[0], several)
        raise InputError(f"{name} must be {wanted}, got {textwrap.shorten(str(given), 60)!r}") from None


def _read(name: str, kind: Any, given: Any) -> Any:
    if get_origin(kind) is Literal:
        if given not in get_args(kind):
            raise unknown(name, given, get_args(kind))
        return given
    if get_origin(kind) in (list, tuple):
        return _read_list(name, kind, given)
    if kind is bool:
        return given if isinstance(given, bool) else BOOLEANS[given.lower()]
    if isinstance(given, bool) or (kind is str and not isinstance(given, str | int | float)):
        raise ValueError
    if kind is str:
        return str(given)
    if kind is int:
        count = given if isinstance(given, int) else count_of(str(given))
        return int(given) if count is None else count  # int(): of a negative number
    if kind is float:
        return float(given)
    try:  # an entry of a list of groups
        values = yaml.safe_load(given) if isinstance(given, str) else given
        return build(kind, dict(flat(kind, values)))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _read_list(name: str, kind: Any, given: Any) -> list[Any] | tuple[Any, ...]:
    inner = get_args(kind)[0]
    if isinstance(given, str):
        listed = given.startswith("[") or dataclasses.is_dataclass(inner)
        given = yaml.safe_load(given) if listed else [item.strip() for item in given.split(",")]
    if not isinstance(given, list | tuple) or (get_origin(kind) is tuple and len(given) != len(get_args(kind))):
        raise ValueError
    return get_origin(kind)(read(name, inner, item) for item in given)
