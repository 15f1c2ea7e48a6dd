"""Every figure that needs a GPU, from one command, within a given number of minutes.

python benchmarks/gpu.py --minutes 9 [--llm FOLDER --text FILE] [--only training/3.4B sampling] [--prior live]
python benchmarks/gpu.py --dry-run             # every part at tiny sizes on the CPU

- ``training/<shape>/<how>``: throughput, MFU and memory of a training step against the plain loop (bench_training).
- ``sampling/<shape>``: samples per second, and the latency of projection (bench_sampling).
- ``ranks``: 1-D probes of every unit on one task (bench_ranks).
- ``steering``: generation plain, steered and repaired (bench_steering).
- ``recording``, ``stream``: tokens per second, and where the time of `train --from llm` goes (bench_recording,
  bench_stream).
- ``prior``, if asked for: a prior of the language model, trained and measured (bench_prior), in ``runs/gpu``.

Results go to ``results/<date>-<chip>.json`` after each part, as the machine may be taken away. A part that fails is
recorded with its error, the others still run, and the exit status is 1. Each runs in a process of its own, which the
next ones take over unless it failed. A part that runs out of time is sent SIGTERM; a prior's training then saves its
state, and the same command continues it. What there was no time to start is recorded as skipped.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import bench_commands
import bench_prior
import bench_ranks
import bench_recording
import bench_sampling
import bench_steering
import bench_stream
import bench_training
import torch

from latentprior.config import PRESETS, LLMConfig, TextConfig
from latentprior.training.parallel import check_float8
from latentprior.utils.devices import resolve_device
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_json
from latentprior.utils.provenance import stamp

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # width, width of the denoiser, blocks
    "36M": (576, 1152, 3),
    "0.5B": (2048, 4096, 3),
    "3.4B": (4096, 8192, 6),
}
TINY = (16, 32, 2)
LEAST_SECONDS = 10.0  # that a part is started with
GRACE_SECONDS = 30.0  # for a part that runs out of time to save its state
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


class Part(NamedTuple):
    """A call that measures something."""

    function: Callable[..., dict[str, Any]]
    options: dict[str, Any]


class Failed(Exception):
    """A part ended without a result; the message is one line."""


# -- what is measured ----------------------------------------------------------------------------------------------


def all_parts(options: argparse.Namespace, work: Path) -> dict[str, Part | str]:
    """Every part by its name, in the order in which they run; instead of one that cannot run here, the reason."""
    dry = options.dry_run
    device = "cpu" if dry else "auto"
    text = {"llm": options.llm, "text": options.text, "layer": options.layer, "device": device}

    def shape(name: str) -> dict[str, int]:
        return dict(zip(("d", "d_model", "blocks"), TINY if dry else SHAPES[name], strict=True))

    def training(name: str, *, batch: int = 4096, **how: Any) -> Part:
        steps = 10 if name == "3.4B" else 50
        sizes = {"batch": 64, "steps": 2, "repeats": 1} if dry else {"batch": batch, "steps": steps, "repeats": 3}
        plain = {"plain_batch": options.plain_batch, "stratified": False, "device": device}
        return Part(bench_training.measure, shape(name) | sizes | plain | how)

    def sampling(name: str) -> Part:
        sizes = {"n": 16, "steps": 4, "repeats": 1} if dry else {"n": 512 if name == "3.4B" else 2048}
        return Part(bench_sampling.measure, shape(name) | sizes | {"device": device})

    no_float8 = reason_against_float8(device)
    parts: dict[str, Part | str] = {f"training/{s}/compiled": training(s, compile=True) for s in SHAPES}
    parts |= {f"sampling/{s}": sampling(s) for s in SHAPES}
    parts["ranks"] = Part(bench_ranks.measure, {"device": device} | ranks_sizes(dry))
    parts["recording"] = Part(bench_recording.measure, text | recording_sizes(dry))
    llm = {name: text[name] for name in ("llm", "layer", "device")}
    parts["commands"] = Part(bench_commands.measure, text | ({"samples": 100, "assets": False} if dry else {}))
    parts["steering"] = Part(bench_steering.measure, llm | steering_sizes(dry))
    parts["stream"] = Part(bench_stream.measure, text | stream_sizes(dry))
    parts |= {f"training/{s}/eager": training(s, compile=False) for s in SHAPES}
    parts |= {f"training/{s}/float8": no_float8 or training(s, compile=True, float8=True) for s in SHAPES}
    parts["training/36M/compiled-32768"] = training("36M", batch=32768, compile=True)
    if dry or options.prior:
        parts["prior"] = Part(bench_prior.measure, text | prior_sizes(options, work))
    return parts


def reason_against_float8(device: str) -> str | None:
    """Why float8 cannot run here, if it cannot."""
    try:
        check_float8(resolve_device(device))
    except InputError as error:
        return str(error)


def ranks_sizes(dry: bool) -> dict[str, Any]:
    return {"units": 64, "rows": 128, "test_rows": 128, "plain_units": 8} if dry else {}


def recording_sizes(dry: bool) -> dict[str, Any]:
    if dry:
        return {"batches": 1, "batch_tokens": 128, "length": 8, "repeats": 1}
    return {"batches": 8, "batch_tokens": 8192, "length": 128}


def steering_sizes(dry: bool) -> dict[str, Any]:
    return {"rows": 2, "new_tokens": 2, "d_model": 16, "blocks": 1, "repeats": 1} if dry else {"rows": 128}


def stream_sizes(dry: bool) -> dict[str, Any]:
    if dry:
        tokens = {"batch_tokens": 512, "max_length": 32, "statistics": 512, "document_shards": 2}
        return {"activations": 512, "batch": 128, "buffer": "256", "blocks": 1} | tokens
    return {"activations": 4_000_000, "batch": 4096, "buffer": "524288", "batch_tokens": 16384}


def prior_sizes(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    named = {"work": str(work), "preset": options.preset, "recipe": options.recipe, "source": options.prior or "live"}
    if options.dry_run:
        tokens = {"batch_tokens": 512, "max_length": 32, "statistics": 512, "document_shards": 2}
        sizes = {"activations": 256, "buffer": "256", "blocks": 1, "samples": 32, "documents": 2}
        return named | tokens | sizes | {"recipe": {"batch_size": 128}}
    return named | {"activations": options.activations, "buffer": "524288", "batch_tokens": 16384}


# -- running it ----------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs parts: one that breaks the device, hangs or is killed takes only this process with it."""

    def __init__(self, dry_run: bool) -> None:
        self._ours, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs, dry_run))
        self._process.start()
        theirs.close()  # so that the pipe ends where the process does

    def run(self, part: Part, seconds: float) -> dict[str, Any]:
        """The part's result.

        Raises:
            Failed: the part raised an error, its process died, or it took longer than `seconds`. The worker is then to
                be stopped.
        """
        self._ours.send(part)
        if not self._ours.poll(seconds):
            self._process.terminate()
            self._ours.poll(GRACE_SECONDS)
            raise Failed(f"not done in the {seconds:.0f} s that were left")
        try:
            result, error = self._ours.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"its process died: exit code {self._process.exitcode}") from None
        if error is not None:
            raise Failed(error)
        return result

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, dry_run: bool) -> None:
    """Run the parts that come through `connection` and answer with result and error, until it is closed."""
    if dry_run:
        torch.compiler.set_stance("force_eager")  # tiny models would take minutes to compile
    while True:
        try:
            part: Part = connection.recv()
        except EOFError:
            return
        try:
            answer = part.function(**part.options), None
        except Exception as error:
            traceback.print_exc()
            answer = None, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        connection.send(answer)


def run_parts(
    parts: dict[str, Part | str], seconds: float, dry_run: bool, keep: Callable[[str, dict[str, Any]], None]
) -> None:
    """Run the parts one after another for at most `seconds`; `keep` gets each one's name and what came of it."""
    deadline, worker = time.monotonic() + seconds, None
    for name, part in parts.items():
        began = time.monotonic()
        if isinstance(part, str):
            found = {"skipped": part}
        elif deadline - began < LEAST_SECONDS:
            found = {"skipped": "no time was left"}
        else:
            worker = worker or Worker(dry_run)
            try:
                found = worker.run(part, deadline - began)
            except Failed as error:
                worker.stop()
                worker, found = None, {"error": str(error)}
        keep(name, found | {"part_seconds": round(time.monotonic() - began, 1)})
    if worker:
        worker.stop()


class Results:
    """The file of the day's results, written after every part: of parts that were run again, the last counts."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._began = time.perf_counter()
        chip = platform.machine() if options.dry_run else torch.cuda.get_device_name()
        today = datetime.date.today().isoformat()
        kind = "dry-run" if options.dry_run else re.sub(r"\W+", "-", chip.lower())
        self.path = folder / f"{today}-{kind}.json"
        self._head = {"date": today, "processor": chip}
        self._config = {key: value for key, value in vars(options).items() if key not in ("output", "work")}
        self._results = json.loads(self.path.read_text())["results"] if self.path.exists() else {}
        self.failed: list[str] = []

    def keep(self, name: str, found: dict[str, Any]) -> None:
        if "skipped" in found:
            self._results.setdefault(name, found)
        else:
            self._results[name] = found
        if "error" in found:
            self.failed.append(name)
        seconds = time.perf_counter() - self._began
        record = self._head | {"results": self._results} | stamp(self._config, seed=0, wall_seconds=seconds)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self.path, record, indent=2)
        print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)


def chosen(parts: dict[str, Part | str], beginnings: Sequence[str]) -> dict[str, Part | str]:
    """The parts whose names begin with one of `beginnings`; all of them if there are none.

    Raises:
        InputError: no name begins so.
    """
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in parts):
            raise unknown("part", beginning, list(parts))
    return {name: part for name, part in parts.items() if not beginnings or name.startswith(tuple(beginnings))}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="stop after these (default: %(default)s)")
    add("--only", nargs="+", default=[], metavar="PART", help="only parts whose names begin so")
    add("--llm", default=LLMConfig().model, help="language model: name or folder (default: %(default)s)")
    add("--text", default=TextConfig().dataset, help="text, as of train (default: %(default)s)")
    add("--layer", type=int, default=15, help="block of the language model (default: %(default)s)")
    add("--plain-batch", type=int, help="activations of a step of the plain loop (default: as ours)")
    add("--prior", nargs="?", const="live", choices=("live", "store"), help="also train a prior (default: live)")
    add("--activations", type=int, default=20_000_000, help="that the prior is trained on (default: %(default)s)")
    add("--preset", default="quick", choices=PRESETS, help="the prior's recipe (default: %(default)s)")
    add("--recipe", type=json.loads, default={}, metavar="JSON", help="changes to the preset")
    add("--output", type=Path, help="folder of the results (default: benchmarks/results)")
    add("--work", type=Path, help="folder of stores and prior (default: runs/gpu)")
    add("--dry-run", action="store_true", help="every part at tiny sizes on the CPU; nothing is kept without --output")
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("there is no GPU here: --dry-run shows that everything runs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        default = Path(scratch) if options.dry_run else RESULTS
        work = options.work or (Path(scratch) if options.dry_run else Path("runs/gpu"))
        parts = chosen(all_parts(options, work), options.only)
        results = Results(options.output or default, options)
        run_parts(parts, 60 * options.minutes, options.dry_run, results.keep)
        print(f"{results.path}: {len(parts)} parts, failed: {', '.join(results.failed) or 'none'}", file=sys.stderr)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
