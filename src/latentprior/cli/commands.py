"""The command line: parse, one call, print. Every option is a field of a dataclass in `config`."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.markup import escape

from latentprior import config
from latentprior.cli.console import (
    bars,
    err,
    left_out,
    out,
    print_checks,
    print_evaluation,
    print_frontiers,
    print_tables,
    table,
)
from latentprior.cli.usage import mended, option_kinds
from latentprior.config.base import moved
from latentprior.utils.errors import InputError, Stopped
from latentprior.utils.formatting import number

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
ALIASES = {"--from": "--source"}  # `from` cannot be the name of a dataclass's field


@dataclass(frozen=True)
class Command:
    """A subcommand: its configuration and what it does with it."""

    config: type
    run: Callable[[Any], int | None]
    """Gives the exit status; None is success."""

    @property
    def help(self) -> str:
        return (self.config.__doc__ or "").strip()


# -- commands. Their imports are inside: torch takes seconds, --help should not ------------------------------------


def doctor(options: config.DoctorConfig) -> int:
    from latentprior.doctor import doctor

    with bars() as phase:
        checks = doctor(options, report=phase("doctor"))
    print_checks((check.name, check.status, check.detail) for check in checks)
    failed = [check for check in checks if check.status == "failed"]
    for check in failed:
        err.print(f"[bold red]failed:[/] {escape(f'{check.name}: {check.detail}')}", soft_wrap=True)
    return FAILED if failed else 0


def record(options: config.RecordConfig) -> None:
    from latentprior.data.store.record import record

    with bars() as phase:
        store = record(options, report=phase("record"))
    table(
        "Activation store",
        {
            "folder": options.output,
            "rows": len(store),
            "width": store.width,
            "layers": ", ".join(map(str, store.layers)),
            "left out": left_out(store.manifest["left_out"]),
        },
    )


def train(options: config.TrainConfig) -> None:
    import json
    from pathlib import Path

    from latentprior.training.fit import fit
    from latentprior.utils.distributed import is_main

    with bars() as phase:
        glp = fit(options, report=phase("train"))
    if not is_main():
        return
    training = glp.provenance["training"]
    result = json.loads(Path(options.output, "train.json").read_text(encoding="utf-8"))
    total = sum(result["seconds"].values())
    times = (f"{part} {seconds:.3g} s ({seconds / total:.1%})" for part, seconds in result["seconds"].items())
    rows = {
        "folder": options.output,
        "parameters": f"{sum(p.numel() for p in glp.denoiser.parameters()):,}",
        "activations": f"{training['activations']:,} ({training['distinct']:,} distinct)",
        "held-out loss": number(training.get("heldout_loss")),
        "time": ", ".join(times),
    }
    if "left_out" in training:
        rows["left out"] = left_out(training["left_out"])
    if "ended" in training:
        rows["ended early"] = training["ended"]
    table("Prior", rows)


def sample(options: config.SampleConfig) -> None:
    from pathlib import Path

    import torch
    from safetensors.torch import save_file

    from latentprior.prior.glp import GLP
    from latentprior.utils.devices import resolve_device
    from latentprior.utils.files import check_file, replaced

    check_file(options.output)
    glp = GLP.from_pretrained(
        options.prior,
        options.checkpoint,
        device=resolve_device(options.device),
        dtype=getattr(torch, options.precision),
    )
    x = glp.sample(
        options.n,
        steps=options.steps,
        solver=options.solver,
        grid=options.grid,
        layer=options.layer,
        generator=options.seed,
    )
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    nfe = glp.nfe(options.steps, solver=options.solver, grid=options.grid)
    with replaced(path) as partial:
        save_file({"activations": x.float().cpu()}, partial, metadata={"prior": options.prior, "nfe": str(nfe)})
    table(
        "Samples",
        {
            "file": path,
            "activations": len(x),
            "width": x.shape[1],
            "NFE": nfe,
            "mean norm": number(float(x.norm(dim=1).mean())),
        },
    )


def report(result: dict[str, Any], folder: str, show: Callable[[dict[str, Any]], None]) -> None:
    """Draw the page of a result, print its tables and where the page lies."""
    from pathlib import Path

    from latentprior.report import write_report

    page = write_report(result, Path(folder) / "report.html")
    show(result)
    out.print(f"report: {page}")


def evaluate(options: config.EvaluateConfig) -> None:
    from latentprior.evaluation.evaluate import evaluate

    with bars() as phase:
        result = evaluate(options, phase=phase)
    report(result, options.output, print_evaluation)


def steer(options: config.SteerConfig) -> None:
    from latentprior.steer.experiment import steer

    with bars() as phase:
        result = steer(options, phase=phase)
    report(result, options.output, print_frontiers)


def convert(options: config.ConvertConfig) -> None:
    from latentprior.prior.official.convert import convert

    table("Converted", convert(options))


def plan(options: config.PlanConfig) -> None:
    import json
    from pathlib import Path

    from latentprior.scaling.plan import plan, tables
    from latentprior.utils.files import check_file, replace_text

    if options.output:
        check_file(options.output)
    result = plan(options)
    for title, rows in tables(result).items():
        table(title, rows)
    out.print(result["memory"]["verdict"], soft_wrap=True)
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(result, indent=2) + "\n")


def sweep(options: config.SweepConfig) -> None:
    from latentprior.scaling.sweep import sweep
    from latentprior.scaling.tables import tables

    with bars() as phase:
        result = sweep(options, phase=phase)
    report(result, options.output, lambda result: print_tables(tables(result)))


def probe(options: config.ProbeConfig) -> int:
    from latentprior.probe.experiment import probe
    from latentprior.probe.tables import tables

    with bars() as phase:
        result = probe(options, phase=phase)
    report(result, options.output, lambda result: print_tables(tables(result)))
    if names := [str(task["task"]) for task in result["skipped"]]:
        whole = len(names) + len(result["tasks"])
        err.print(f"skipped {len(names)} of {whole} tasks: {', '.join(names)}", soft_wrap=True, markup=False)
    return FAILED if names else 0


def neurons(options: config.NeuronsConfig) -> None:
    from pathlib import Path

    from latentprior.judge.endpoint import endpoint_of
    from latentprior.neurons.collect import neurons
    from latentprior.neurons.describe import describe_store
    from latentprior.neurons.store import INFO, NeuronStore
    from latentprior.report.site import write_site
    from latentprior.utils.files import check_folder

    for folder in filter(None, (options.output, options.html)):
        check_folder(folder)
    judge = endpoint_of(options.judge, Path(options.output, "answers.jsonl"))  # a missing key is found before all else
    kept = Path(options.output, INFO).exists()
    with bars() as phase:
        info = neurons(options, phase=phase)
        described = describe_store(
            options.output,
            judge,
            options.describe,
            seed=options.seed,
            report=phase("describe"),
            prompt_price=options.judge.input_price,
            answer_price=options.judge.output_price,
        )
        page = write_site(NeuronStore(options.output), options.html, report=phase("site")) if options.html else None
    rows = {
        "folder": options.output,
        "units": info["blocks"] * info["d_mlp"],
        "documents": info["documents"],
        "tokens": f"{info['tokens']:,}{' (read by an earlier run)' if kept else ''}",
        "described offline": described["offline"],
    }
    if judge is not None:
        rows |= {
            "described by the endpoint": described["endpoint"],
            "detection score": number(described["detection"]),
            "with another unit's description": number(described["baseline"]),
            "failed": ", ".join(f"{count} {name}" for name, count in described["failed"].items() if count) or "none",
        }
    table("Meta-neurons", rows)
    if page is not None:
        out.print(f"site: {page}")


def demo(options: config.DemoConfig) -> None:
    from latentprior.demo import demo

    began = time.monotonic()
    with bars() as phase:
        result = demo(options, phase=phase)
    print_evaluation(result["evaluate"])
    print_frontiers(result["steer"])
    out.print(f"report: {options.output}/report.html ({time.monotonic() - began:.0f} s)")


COMMANDS = {
    "doctor": Command(config.DoctorConfig, doctor),
    "record": Command(config.RecordConfig, record),
    "train": Command(config.TrainConfig, train),
    "sample": Command(config.SampleConfig, sample),
    "evaluate": Command(config.EvaluateConfig, evaluate),
    "steer": Command(config.SteerConfig, steer),
    "convert": Command(config.ConvertConfig, convert),
    "plan": Command(config.PlanConfig, plan),
    "sweep": Command(config.SweepConfig, sweep),
    "probe": Command(config.ProbeConfig, probe),
    "neurons": Command(config.NeuronsConfig, neurons),
    "demo": Command(config.DemoConfig, demo),
}


# -- parsing -------------------------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """Reports a wrong command line in one line, with the nearest valid names."""

    config: type | None = None
    """Of the command that it parses; None before a command."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        options = [option for action in self._actions for option in action.option_strings]
        configs = {name: command.config for name, command in COMMANDS.items()}
        raise InputError(mended(message, options, self.config, configs))


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments as jsonargparse takes them.

    Hyphens in option names are underscores, a bare flag means true, a list needs no brackets (``--layers 7,15``), and
    whole numbers may be written as ``1M``, ``2e6`` or ``1_000_000``.
    """
    # Of this command alone: `blocks` is a number for one and a list for another.
    commands = [COMMANDS[word] for word in arguments if word in COMMANDS][:1]
    kinds = {f"--{name}": kind for command in commands for name, kind in option_kinds(command.config)}
    spelled = []
    remaining = deque(arguments)
    while remaining:
        name, equals, value = remaining.popleft().partition("=")
        if name.startswith("--"):
            name = ALIASES.get(name, name)
            name = "--" + name[2:].replace("-", "_")
            if error := moved(name[2:]):  # else taken for an abbreviation
                raise error
            following = bool(remaining) and not remaining[0].startswith("--")
            if kinds.get(name) == "bool" and not equals and not following:
                equals, value = "=", "true"
            elif kinds.get(name, "").startswith("list") and (equals or following):
                equals, value = "=", value if equals else remaining.popleft()
                value = value if value.startswith("[") else f"[{value}]"
                if kinds[name].startswith("list[int]"):
                    value = f"[{','.join(_whole(item) for item in value[1:-1].split(','))}]"
            elif kinds.get(name, "").startswith("int") and (equals or following):
                equals, value = "=", _whole(value if equals else remaining.popleft())
        spelled.append(name + equals + value)
    return spelled


def _whole(text: str) -> str:
    """A whole number in digits; anything else as it is."""
    count = config.count_of(text.strip())
    return text if count is None else str(count)


def build_parser() -> Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="latentprior",
        description="Generative models of a language model's internal activations.",
        allow_abbrev=False,
        version=package_version(),
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        sub = Parser(description=command.help, allow_abbrev=False)
        sub.config = command.config
        sub.add_argument("--config", action="config", help="YAML file with any of these options.")
        sub.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        sub.add_class_arguments(command.config)
        commands.add_subcommand(name, sub, help=command.help)
    return parser


def package_version() -> str:
    from latentprior.utils.provenance import versions

    return versions().get("latentprior", "unknown")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on standard error, unless --debug is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        values = build_parser().parse_args(spelled_out(arguments))
        command = COMMANDS[values.command]
        options = values[values.command].as_dict()
        for key in ("config", "debug"):
            options.pop(key, None)
        return command.run(config.from_dict(command.config, options)) or 0
    except KeyboardInterrupt:
        err.print("interrupted; the same command continues where it can")
        return INTERRUPTED
    except Stopped as stopped:
        err.print(f"terminated: {stopped}; the same command continues")
        return TERMINATED
    except (InputError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        return USAGE if isinstance(error, InputError) else FAILED
