"""A probing run from its configuration: `latentprior probe`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from latentprior.config import ProbeConfig, settings_of, to_dict
from latentprior.data import corpus
from latentprior.data.store.manifest import MANIFEST
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.prior.glp import GLP
from latentprior.prior.loading import heldout_loss, packages_of, priors_of
from latentprior.probe.benchmark import add_draws, probe_task
from latentprior.probe.recording import OUTPUT, Recording, record_texts
from latentprior.probe.sources import Draws, Source, equal_draws, meta_neurons, sources_of
from latentprior.probe.summary import summarise, task_scores
from latentprior.probe.tasks import Task, UnsuitableTask, find_task
from latentprior.sae.saelens import sae_at
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json, replaced
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, Report, unseen
from latentprior.utils.provenance import stamp
from latentprior.utils.results import Result
from latentprior.utils.settings import check_settings

Json = dict[str, Any]
LLM = Callable[[], tuple[Any, Any]]
"""Loads a language model and its tokenizer."""


def probe(config: ProbeConfig, *, phase: Phase = unseen) -> Result:
    """Load the language model if anything has to be recorded, and run the benchmark (`benchmark`)."""
    return benchmark(config, lambda: load_llm(config.llm, config.device), phase=phase)


def benchmark(config: ProbeConfig, llm: LLM, *, phase: Phase = unseen) -> Result:
    """Record the tasks, probe every source on each, and write ``probe.json``, which is returned, with tables beside it.

    Everything that is there already is kept: the same call continues an interrupted one, and further tasks join. A
    task that does not fulfil the protocol, or that fails, is skipped and named in "skipped". `llm` is called only if
    a text is not recorded yet.
    """
    with locked(config.output) as folder:
        began = time.perf_counter()
        tasks, skipped = find_tasks(config)  # before anything is loaded: names and columns may be wrong
        first = config.priors[0]
        options = {name: getattr(config, name) for name in ("checkpoint", "layer", "device", "precision")}
        priors, hookpoint = priors_of(config.priors, **options)
        device = priors[first].device
        sae = sae_at(config.sae, hookpoint).to(device) if config.sae else None
        _keep_settings(folder, config, priors)
        recording = recorded(config, tasks, hookpoint, llm, phase("record")).to(device)
        sources = sources_of(config, recording, priors, sae)
        maps = [meta_neurons(config, recording, priors[first], first, f"t = {t:g}", t) for t in config.times]
        draws = equal_draws(config, sources)
        results = _probe_all(tasks, skipped, recording, sources, maps, draws, config, phase("probe"))
        if not results:
            task, reason = skipped[0]["task"], skipped[0]["reason"]
            raise InputError(f"no task could be probed; the first of them: {task}: {reason}")
        shown = [each for s in sources for each in ((s, draws) if draws and draws.source is s else (s,))]
        protocol = ("candidates", "folds", "seed", "max_length", "max_test", "noise")
        described = ("family", "train", "test", "left_out")
        result = {
            "kind": "probe",
            "method": config.method,
            "hookpoint": hookpoint.to_dict(),
            "protocol": {name: getattr(config, name) for name in protocol},
            "tasks": [{name: task[name] for name in described} | {"name": task["task"]} for task in results],
            "skipped": skipped,
            "sources": [source.to_dict() for source in shown],
            "summary": summarise(results, shown, maps, config.seed),
            "rows": [task_scores(task) for task in results],
            "seconds": dict(sum((Counter(task["seconds"]) for task in results), Counter())),
        }
        spent, packages = time.perf_counter() - began, packages_of(priors.values())
        result |= stamp(to_dict(config), seed=config.seed, wall_seconds=spent, packages=packages)
        write_tables(folder, results)
        replace_json(folder / "probe.json", result)
        return Result(result, table="summary.scores")


def find_tasks(config: ProbeConfig) -> tuple[list[Task], list[Json]]:
    """The tasks that fulfil the protocol, and those that do not, with the reason."""
    tasks: list[Task] = []
    skipped: list[Json] = []
    columns = {"text": config.text_column, "label": config.label_column}
    for name in dict.fromkeys(config.tasks or corpus.binary_tasks()):
        try:
            task = find_task(name, seed=config.seed, max_test=config.max_test, **columns)
            if any(task.name == other.name for other in tasks):
                raise UnsuitableTask(f"another task is called {task.name!r}, too")
            tasks.append(task)
        except UnsuitableTask as error:
            skipped.append({"task": name, "reason": str(error)})
    if not tasks:
        raise InputError(f"no task can be probed: {skipped[0]['reason']}")
    return tasks, skipped


def recorded(config: ProbeConfig, tasks: Sequence[Task], hookpoint: Hookpoint, llm: LLM, report: Report) -> Recording:
    """The recording of all tasks' texts; what is missing is recorded."""
    folder = Path(config.recording or Path(config.output, "recording"))
    texts = list(dict.fromkeys(text for task in tasks for text in task.used()))
    mlp = "mlp-neurons" in config.chosen_sources()
    if (folder / OUTPUT / MANIFEST).exists():
        recording = Recording(folder)
        if not recording.hookpoint.same_place(hookpoint):
            raise InputError(f"{folder} was recorded at {recording.hookpoint}, the prior belongs to {hookpoint}")
        if recording.has(texts).all() and (recording.mlp_hookpoints or not mlp):
            return recording
    limits = {"max_length": config.max_length, "batch_tokens": config.batch_tokens}
    with locked(folder):
        return record_texts(*llm(), texts, hookpoint, folder, mlp=mlp, report=report, **limits)


def _probe_all(
    tasks: Sequence[Task],
    skipped: list[Json],
    recording: Recording,
    sources: Sequence[Source],
    maps: Sequence[Source],
    draws: Draws | None,
    config: ProbeConfig,
    report: Report,
) -> list[Json]:
    """What `_probe_one` gives for each task; adds the tasks that fail to `skipped`."""
    folder = Path(config.output, "tasks")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for done, task in enumerate(tasks, start=1):
        path = folder / f"{PurePosixPath(task.name).name}.json"
        try:
            result = _probe_one(path, task, recording, sources, maps, draws, config)
            results.append(result | {"rows": _wanted(result["rows"], draws)})
        except InputError as error:
            skipped.append({"task": task.name, "reason": str(error)})
        report(done, len(tasks), {"skipped": len(skipped)})
    return results


def _probe_one(
    path: Path,
    task: Task,
    recording: Recording,
    sources: Sequence[Source],
    maps: Sequence[Source],
    draws: Draws | None,
    config: ProbeConfig,
) -> Json:
    """What `probe_task` gives, kept in the file `path`; of an earlier run only the draws that it lacks are made."""
    missing = ~recording.has(task.texts)
    usable = task.without(missing)
    if path.exists():
        result = _read(path)
        if draws is None or not add_draws(result, usable, draws, config):
            return result
    else:
        left_out = int(missing[task.train].sum() + missing[task.test].sum())
        result = probe_task(usable, sources, maps, config, draws) | {"left_out": left_out}
    replace_json(path, result, indent=None)
    return result


def _wanted(rows: Sequence[Json], draws: Draws | None) -> list[Json]:
    """A task's rows without the draws that an earlier run had and this one has not."""
    number = draws.number if draws else 0
    return [row for row in rows if row.get("draw") is None or row["draw"] < number]


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: delete it to probe the task again") from error


def _keep_settings(folder: Path, config: ProbeConfig, priors: Mapping[str, GLP]) -> None:
    """Note what the results in `folder` depend on; refuse to mix them with others."""
    settings = settings_of(config) | {"model": config.llm.model}
    settings["heldout_loss"] = {name: heldout_loss(glp) for name, glp in priors.items()}
    path = folder / "settings.json"
    if path.exists():
        check_settings(folder, "results", _read(path), settings)
    else:
        replace_json(path, settings)


def write_tables(folder: Path, results: Sequence[Json]) -> None:
    """A row for each task, source, draw and selection (parquet and CSV), and the top units, ``winners.parquet``."""
    probes = [
        {"task": task["task"], "family": task["family"], **row, "draw": row.get("draw")}
        for task in results
        for row in task["rows"]
    ]
    top_units = [{"task": task["task"], **row} for task in results for row in task["winners"]]
    table = pa.Table.from_pylist(probes)
    for name, rows in (("probes", table), ("winners", pa.Table.from_pylist(top_units))):
        with replaced(folder / f"{name}.parquet") as partial:
            pq.write_table(rows, partial, compression="zstd")
    with replaced(folder / "probes.csv") as partial:
        pyarrow.csv.write_csv(table, partial)
