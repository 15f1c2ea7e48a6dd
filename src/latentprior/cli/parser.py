"""A command line taken apart: which command, which values of its options, and what else is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from latentprior.config.base import dashed
from latentprior.config.options import Option, flat, option_named, options_of, read, resolved
from latentprior.utils.errors import InputError, unknown

FLAGS = ("help", "help_all", "debug", "print_config")
ALIASES = {"from": "source"}  # `from` cannot be the name of a dataclass's field


@dataclass(frozen=True)
class Command:
    """A command: its options, what it does with them, and an example of its arguments."""

    config: type
    run: Callable[[Any], int | None]
    """Gives the exit status; None is success."""
    example: str

    @property
    def about(self) -> str:
        return " ".join((self.config.__doc__ or "").split())


@dataclass
class Call:
    """What is asked of a command."""

    given: dict[str, Any] = field(default_factory=dict)
    """Values by the dotted names of options."""
    flags: set[str] = field(default_factory=set)


def command_of(arguments: Sequence[str], commands: Mapping[str, Command]) -> str:
    """The name of the command that a command line begins with."""
    if not arguments:
        raise InputError(f"name a command: {', '.join(commands)}")
    if arguments[0].startswith("-"):
        raise InputError(f"{arguments[0]} has no command before it: name one of {', '.join(commands)}")
    if arguments[0] not in commands:
        raise unknown("command", arguments[0], commands)
    return arguments[0]


def parse(words: Sequence[str], config: type) -> Call:
    """What the words behind a command ask of it. Of several values of one option the last counts.

    Names may have hyphens or underscores, a value follows its name or "=", and a bare yes/no option means yes.

    Raises:
        InputError: an option that there is not, or a value of another type.
    """
    options, call, remaining = options_of(config), Call(), deque(words)
    while remaining:
        word = remaining.popleft()
        if not word.startswith("-"):
            hint = "options begin with --, and lists have commas and no spaces, as in 7,15"
            raise InputError(f"unexpected argument {word!r}: {hint}")
        written, equals, value = word.partition("=")
        name = written.lstrip("-").replace("-", "_")
        if name in FLAGS or word == "-h":
            call.flags.add("help" if word == "-h" else name)
            continue
        name = resolved(config, ALIASES.get(name, name), written=dashed)
        option = _option(name, options)
        if not equals:
            if remaining and not remaining[0].startswith("--"):
                value = remaining.popleft()
            elif option is None or option.kind is not bool:
                raise InputError(f"{written} needs a value")
            else:
                value = "true"
        if f"{name}.path" in options and not value.startswith("{"):
            option = options[f"{name}.path"]
        if option is not None:
            call.given[option.name] = read(option.name, option.kind, value)
        elif name == "config":
            call.given |= flat(config, _loaded(value), options)
        else:
            call.given |= flat(config, {name: yaml.safe_load(value)}, options)
    return call


def _option(name: str, options: Mapping[str, Option]) -> Option | None:
    """The option that a name means; None if it means a file or a group of options."""
    if name == "config" or any(other.startswith(f"{name}.") for other in options):
        return None
    return option_named(name, options, written=dashed)


def _loaded(file: str) -> Any:
    """What a YAML file holds."""
    path = Path(file)
    if not path.is_file():
        files = sorted(other.name for other in path.parent.glob("*.y*ml"))
        raise unknown(f"configuration file in {path.parent}", path.name, files)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {error}") from None
