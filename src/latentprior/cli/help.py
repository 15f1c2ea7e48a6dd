"""The text of --help: what a command is for, its options, most used first, and an example, on two screens at most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from textwrap import shorten, wrap
from typing import Any

from latentprior.cli.parser import Command
from latentprior.config.base import groups
from latentprior.config.options import UNSET, Option, options_of

WIDTH, SCREENS = 100, 2 * 48  # columns, and lines of two screens
COLUMN = 32  # at which descriptions begin
GENERAL = {
    "--config FILE": "YAML file with any of these options; --print-config prints one.",
    "--debug": "Show the traceback of an error.",
    "--help, --help-all": "This text; every option, explained in full.",
}
EXAMPLES = {
    "doctor": "--llm.model Qwen/Qwen3-0.6B --prior runs/qwen/prior",
    "record": "--llm.model Qwen/Qwen3-0.6B --layers 13 --text.dataset my_texts/ --output runs/activations",
    "train": "--store runs/activations --heldout runs/heldout --activations 8M --output runs/prior",
    "sample": "--prior runs/prior --n 1000 --output samples.safetensors",
    "evaluate": "--prior runs/prior --heldout runs/heldout --train runs/activations --output runs/evaluation",
    "steer": "--config examples/steer_sentiment.yaml --priors runs/demo/prior --prompts 20",
    "convert": "--source runs/prior --to official --output runs/official",
    "plan": "--llm.model 8B --blocks 6 --preset official --chip H100 --chips 8",
    "sweep": "--store runs/activations --heldout runs/heldout --widths 288,576 --output runs/sweep",
    "probe": "--priors runs/demo/prior --tasks 92_glue_sst2,my_task.csv --output runs/probe",
    "neurons": "--prior runs/demo/prior --tokens 200k --output runs/neurons --html runs/neurons/site",
    "demo": "--tiny",
}


def overview(commands: Mapping[str, Command]) -> str:
    """The help of the program: its commands."""
    lines = [
        "usage: latentprior COMMAND [options]",
        "",
        "Generative models of a language model's internal activations.",
    ]
    lines += ["", "commands:"]
    lines += [line for name, command in commands.items() for line in _row(name, _first(command.about), 12)]
    lines += ["", "latentprior COMMAND --help says what its options are. --version prints the version."]
    return "\n".join(lines)


def help_of(name: str, command: Command, *, whole: bool) -> str:
    """The help of a command: every option in full if `whole`, else as much of each group as two screens hold."""
    if whole:
        return "\n".join(_lines(name, command, None))
    texts = ([*_lines(name, command, most)] for most in range(12, -1, -1))
    return "\n".join(next((text for text in texts if len(text) <= SCREENS), []) or _lines(name, command, 0))


def _lines(name: str, command: Command, most: int | None) -> Iterator[str]:
    """Lines of the help with the first `most` options of each group; all of them in full if it is None."""
    options = options_of(command.config)
    required = [option for option in options.values() if option.default is MISSING]
    needed = "".join(f" {option.written} {option.shown}" for option in required)
    yield from wrap(f"usage: latentprior {name}{needed} [options]", WIDTH, subsequent_indent=" " * 8)
    yield ""
    yield from wrap(command.about, WIDTH)
    for group, kind in _sections(command.config).items():
        own = [option for option in options.values() if option.name.rpartition(".")[0] == group]
        if not own:
            continue
        about = _first(kind.__doc__ or "")
        yield from ("", *wrap(f"{group}: {about[0].lower()}{about[1:]}", WIDTH)) if group else ("", "options:")
        shown = own if most is None or not group else own[:most]
        for option in shown:
            yield from _explained(option, whole=most is None)
        if rest := [option.written.rpartition(".") for option in own[len(shown) :]]:
            prefix = f"{rest[0][0]}." if rest[0][1] else "--"
            names = ", ".join(name.removeprefix("--") for *_, name in rest)
            yield from wrap(f"  also {prefix}NAME: {names}", WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False)
    yield ""
    for option, text in GENERAL.items():
        yield from _row(option, text, COLUMN)
    example = wrap(f"latentprior {name} {EXAMPLES[name]}", WIDTH - 8, break_on_hyphens=False)
    yield from ("", "example:", "  " + " \\\n      ".join(example))


def _sections(cls: type, name: str = "") -> dict[str, type]:
    """A configuration and the groups in it by dotted name; its own is empty."""
    found = {name: cls}
    for group, kind in groups(cls).items():
        found |= _sections(kind, f"{name}.{group}".lstrip("."))
    return found


def _explained(option: Option, *, whole: bool) -> list[str]:
    """The rows of an option; if not `whole`, its first sentence on two lines at most."""
    flag = option.kind is bool and option.default is False
    name = option.written + ("" if flag else f" {option.shown}")
    before = "Required. " if option.default is MISSING else ""
    after = "" if flag or option.default in (MISSING, UNSET, None, "", []) else f" [{_written(option.default)}]"
    room = 2 * (WIDTH - COLUMN) - len(before + after) - 6
    text = option.doc if whole else shorten(_first(option.doc), room, placeholder=" ...")
    return _row(name, before + text + after, COLUMN)


def _row(name: str, text: str, column: int) -> list[str]:
    """A name and, from `column` on, its text; on a line of its own if the name is too long."""
    described = [" " * column + line for line in wrap(text, WIDTH - column, break_on_hyphens=False)]
    name = f"  {name}"
    if len(name) >= column:
        return [name, *described]
    return [name.ljust(column) + described[0].lstrip(), *described[1:]] if described else [name]


def _first(text: str) -> str:
    """The first sentence, without its full stop."""
    return re.split(r"\.(?:\s+(?=[A-Z\"`])|$)", " ".join(text.split()))[0]


def _written(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value:
        unit, factor = next(((unit, f) for unit, f in (("M", 10**6), ("k", 10**3)) if value % f == 0), ("", 1))
        return f"{value // factor}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)
