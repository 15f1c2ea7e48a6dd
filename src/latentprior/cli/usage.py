"""What is said of a wrong command line or configuration file: one line, with the nearest valid names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, get_type_hints

from latentprior.config.base import moved
from latentprior.utils.errors import unknown

WORDS = {
    "int": "a whole number (on the command line also 1M or 2e6)",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as 7,15",
    "dict": 'values by name, such as {"learning_rate": 1e-3}',
}


def mended(message: str, options: Sequence[str], config: type | None, configs: Mapping[str, type]) -> str:
    """jsonargparse's message in plain words, on one line; unknown names get their nearest valid ones.

    Args:
        options: what the parser that refused takes.
        config: the configuration of its command; None before a command.
        configs: that of every command.
    """
    text = " ".join(message.split())
    key = ".".join(re.findall(r'[Pp]arser key "([^"]+)"', text.partition(" - Parser key ")[0]))
    if found := re.search(r"unrecognized arguments: (\S+)", text, re.IGNORECASE):
        return _unrecognised(found[1].partition("=")[0], options, config, configs)
    if found := re.search(r"Got value: NestedArg\(key='([^']*)'", text):
        return _unrecognised(f"--{key}.{found[1]}", options, config, configs)
    if found := re.search(r"invalid choice: '([^']*)'", text):
        return str(unknown("command", found[1], configs))
    if 'expected "command"' in text:
        return f"name a command: {', '.join(configs)}"
    if found := re.search(r"Subcommand '([^']+)' does not accept option '([^']+)'", text):
        names = [name for name, _ in option_kinds(configs[found[1]])]
        return str(moved(found[2]) or unknown("key", found[2], _siblings(found[2], names)))
    if found := re.search(r"Literal\[([^\]]*)\]\. Got value: (.*)", text):
        return str(unknown(key, found[2], re.findall(r"'([^']*)'", found[1])))
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        return str(unknown("key", found[1], [option[2:] for option in _shown(options) if option != "--help"]))
    if found := re.search(r"argument (--[\w.]+).*: expected one argument", text):
        return f"{found[1]} needs a value"
    if found := re.search(r"File does not exist: '(.*)'", text):
        path = Path(found[1])
        files = sorted(file.name for file in path.parent.glob("*.y*ml"))
        return str(unknown(f"configuration file in {path.parent}", path.name, files))
    if found := re.search(r"Unable to load config '(.*?)'", text):
        names = ", ".join(f"--{key}.{name}" for name in _fields_of(config, key))
        return f"{key} is a group of options, not {found[1]!r}: {names}"
    if found := re.search(r"Problems parsing config: (.*)", text):
        return "a configuration file is no valid YAML: " + found[1].replace(' in "<unicode string>",', " at")
    if found := re.search(r"Unexpected config: (.*)", text):
        return f"a configuration file holds options by name, such as 'layers: [7]', got {shorten(found[1], 60)!r}"
    if found := re.search(r"(?:Expected a |Subtypes: \[)(.*?)(?:\. Got|\] Errors:.*Given) value: (.*)", text):
        wanted = [WORDS[name] for name in re.findall(r"<class '(\w+)'>", found[1]) if name in WORDS]
        return f"{key} must be {' or '.join(wanted) or found[1]}, got {shorten(found[2], 60)!r}"
    nested = re.fullmatch(r'Parser key "([^"]+)": (.*)', text)  # an entry of a list, whose own parser said the rest
    return f"{nested[1]}: {nested[2]}" if nested else text


def option_kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and types of all options of a configuration."""
    for f in dataclasses.fields(cls):
        yield prefix + f.name, str(f.type)
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(nested := f.default_factory()):
            yield from option_kinds(type(nested), f"{prefix}{f.name}.")


def _unrecognised(name: str, options: Sequence[str], config: type | None, configs: Mapping[str, type]) -> str:
    if not name.startswith("-"):
        return f"unexpected argument {name!r}: options begin with --, and lists have commas and no spaces, as in 7,15"
    if config is None:
        return f"{name} has no command before it: name one of {', '.join(configs)}"
    return str(unknown("option", name, _siblings(name, _shown(options))))


def _shown(options: Sequence[str]) -> list[str]:
    """Without short forms, the variants that append to a list, and the help of parts."""
    return [o for o in options if o.startswith("--") and not o.endswith(("+", ".help"))]


def _siblings(name: str, valid: Sequence[str]) -> list[str]:
    """The valid names of the innermost group that there is, or all."""
    group = name
    while group := group.rpartition(".")[0]:
        if found := [other for other in valid if other.startswith(f"{group}.")]:
            return found
    return list(valid)


def _fields_of(config: type | None, key: str) -> list[str]:
    """Names of the fields of the configuration that lies at a dotted key."""
    found: Any = config
    for part in key.split("."):
        found = get_type_hints(found).get(part) if dataclasses.is_dataclass(found) else None
    return [f.name for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
