"""The command line: parse, one call, print. Every option is a field of a dataclass in `config`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
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
    print_losses,
    print_tables,
    table,
)
from latentprior.cli.help import help_of, overview
from latentprior.cli.parser import Command, command_of, parse
from latentprior.config.options import build
from latentprior.utils.errors import InputError, Stopped
from latentprior.utils.formatting import number

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


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
    shown = {"folder": options.output, "rows": len(store), "width": store.width}
    shown |= {"layers": ", ".join(map(str, store.layers)), "left out": left_out(store.manifest["left_out"])}
    table("Activation store", shown)


def train(options: config.TrainConfig) -> None:
    from latentprior.training.fit import fit
    from latentprior.utils.distributed import is_main

    with bars() as phase:
        glp = fit(options, report=phase("train"))
    if not is_main():
        return
    training = glp.provenance["training"]
    result = json.loads(Path(options.run.output, "train.json").read_text(encoding="utf-8"))
    total = sum(result["seconds"].values())
    times = (f"{part} {seconds:.3g} s ({seconds / total:.1%})" for part, seconds in result["seconds"].items())
    rows = {
        "folder": options.run.output,
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
    import torch
    from safetensors.torch import save_file

    from latentprior.prior.glp import GLP
    from latentprior.prior.loading import packages_of
    from latentprior.utils.devices import resolve_device
    from latentprior.utils.files import check_file, replaced

    check_file(options.output)
    device, dtype = resolve_device(options.device), getattr(torch, options.precision)
    glp = GLP.from_pretrained(options.prior, options.checkpoint, device=device, dtype=dtype)
    how: dict[str, Any] = {"steps": options.steps, "solver": options.solver, "grid": options.grid}
    x, nfe = glp.sample(options.n, layer=options.layer, generator=options.seed, **how), glp.nfe(**how)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        metadata = {"prior": options.prior, "nfe": str(nfe), **packages_of([glp])}
        save_file({"activations": x.float().cpu()}, partial, metadata=metadata)
    rows = {"file": path, "activations": len(x), "width": x.shape[1], "NFE": nfe}
    table("Samples", rows | {"mean norm": number(float(x.norm(dim=1).mean()))})


def report(job: Callable[..., dict[str, Any]], options: Any, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a job, draw the page of its result, print its tables and where the page lies."""
    from latentprior.report import write_report

    with bars() as phase:
        result = job(options, phase=phase)
    page = write_report(result, Path(options.output) / "report.html")
    show(result)
    out.print(f"report: {page}")
    return result


def evaluate(options: config.EvaluateConfig) -> None:
    from latentprior.evaluation.evaluate import evaluate

    report(evaluate, options, print_evaluation)


def steer(options: config.SteerConfig) -> None:
    from latentprior.steer.experiment import steer

    report(steer, options, print_frontiers)


def convert(options: config.ConvertConfig) -> None:
    from latentprior.prior.official.convert import convert

    table("Converted", convert(options))


def plan(options: config.PlanConfig) -> None:
    from latentprior.scaling.plan import plan, tables
    from latentprior.utils.files import check_file, replace_json

    if options.output:
        check_file(options.output)
    result = plan(options)
    for title, rows in tables(result).items():
        table(title, rows)
    out.print(result["memory"]["verdict"], soft_wrap=True)
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(path, result, indent=2)


def sweep(options: config.SweepConfig) -> None:
    from latentprior.scaling.sweep import sweep
    from latentprior.scaling.tables import tables

    report(sweep, options, lambda result: print_tables(tables(result)))


def probe(options: config.ProbeConfig) -> int:
    from latentprior.probe.experiment import probe
    from latentprior.probe.tables import tables

    result = report(probe, options, lambda result: print_tables(tables(result)))
    if names := [str(task["task"]) for task in result["skipped"]]:
        whole = len(names) + len(result["tasks"])
        err.print(f"skipped {len(names)} of {whole} tasks: {', '.join(names)}", soft_wrap=True, markup=False)
    return FAILED if names else 0


def neurons(options: config.NeuronsConfig) -> None:
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
    print_losses(result["evaluate"], result["shipped"])
    out.print(f"report: {options.output}/report.html ({time.monotonic() - began:.0f} s)")


_RUN = (doctor, record, train, sample, evaluate, steer, convert, plan, sweep, probe, neurons, demo)
COMMANDS = {run.__name__: Command(get_type_hints(run)["options"], run) for run in _RUN}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on standard error, unless --debug is given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _call(arguments)
    except KeyboardInterrupt:
        err.print("interrupted; the same command continues where it can")
        return INTERRUPTED
    except Stopped as stopped:
        err.print(f"terminated: {stopped}; the same command continues")
        return TERMINATED
    except (InputError, OSError) as error:
        if "--debug" in arguments:
            raise
        message = " ".join(str(error).split())
        err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        return USAGE if isinstance(error, InputError) else FAILED


def _call(arguments: Sequence[str]) -> int:
    if arguments[:1] in (["--help"], ["-h"]):
        return _say(overview(COMMANDS))
    if arguments[:1] == ["--version"]:
        from latentprior.utils.provenance import versions

        return _say(versions().get("latentprior", "unknown"))
    name = command_of(arguments, COMMANDS)
    command = COMMANDS[name]
    call = parse(arguments[1:], command.config)
    if call.flags & {"help", "help_all"}:
        return _say(help_of(name, command, whole="help_all" in call.flags))
    options = build(command.config, call.given)
    if "print_config" in call.flags:
        return _say(yaml.safe_dump(json.loads(json.dumps(config.to_dict(options))), sort_keys=False).rstrip())
    return command.run(options) or 0


def _say(text: str) -> int:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
