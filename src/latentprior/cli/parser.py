"""A command line taken apart: which command, which values of its options, and what else is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from latentprior.config.options import flat, named, read
from latentprior.utils.errors import InputError, unknown

FLAGS = ("help", "help_all", "debug", "print_config")
ALIASES = {"from": "source"}  # `from` cannot be the name of a dataclass's field


@dataclass(frozen=True)
class Command:
    """A command: its options, and what it does with them."""

    config: type
    run: Callable[[Any], int | None]  # gives the exit status; None is success

    @property
    def about(self) -> str:
        return " ".join((self.config.__doc__ or "").split())


@dataclass
class Call:
    """What is asked of a command."""

    given: dict[str, Any] = field(default_factory=dict)  # values by the dotted names of options
    flags: set[str] = field(default_factory=set)


def command_of(arguments: Sequence[str], commands: Mapping[str, Command]) -> str:
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
    """
    call, remaining = Call(), deque(words)
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
        meant = name if name == "config" else named(config, ALIASES.get(name, name), on_command_line=True)
        if not equals:
            if remaining and not remaining[0].startswith("--"):
                value = remaining.popleft()
            elif isinstance(meant, str) or meant.kind is not bool:
                raise InputError(f"{written} needs a value")
            else:
                value = "true"
        if not isinstance(meant, str):
            call.given[meant.name] = read(meant.name, meant.kind, value)
        elif name == "config":
            call.given |= flat(config, _loaded(value))
        else:
            call.given |= flat(config, {meant: yaml.safe_load(value)})
    return call


def _loaded(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        files = sorted(other.name for other in path.parent.glob("*.y*ml"))
        raise unknown(f"configuration file in {path.parent}", path.name, files)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no valid YAML: {error}") from None
