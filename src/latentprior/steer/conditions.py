"""The conditions of a steering experiment, and the folder that keeps the rows of each.

A condition is one task (a direction with its prompts), one method and, if that repairs, one prior; all prompts and
strengths belong to it. Its rows are a Parquet file below ``cells``. A run makes only the files that are not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentprior.config import SteerConfig, settings_of, to_dict
from latentprior.lm.edits import EditCounts
from latentprior.prior.glp import GLP
from latentprior.prior.loading import heldout_loss
from latentprior.steer.direction import Direction
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json, replaced
from latentprior.utils.provenance import versions
from latentprior.utils.settings import check_settings

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Condition:
    task: SteeringTask
    method: str
    prior: str  # empty if the method has none

    @property
    def direction(self) -> str:
        return self.task.direction.name

    @property
    def file(self) -> str:
        return file_of(self.direction, self.method, self.prior)


def file_of(direction: str, method: str, prior: str) -> str:
    return f"{method}-{_digest(json.dumps([direction, method, prior]).encode())}.parquet"


def conditions(config: SteerConfig, tasks: Sequence[SteeringTask]) -> list[Condition]:
    """Every condition of an experiment; of each task the unsteered one first."""
    return [Condition(task, method, prior) for task in tasks for method, prior in methods_with_priors(config)]


def methods_with_priors(config: SteerConfig) -> list[tuple[str, str]]:
    """The methods, each with every prior; those without repair once for all priors, without a name."""
    methods = list(dict.fromkeys(["none", "plain", *config.methods]))
    return [(method, prior) for method in methods for prior in (config.priors if config.repair_of(method) else [""])]


def losses_of(priors: Mapping[str, GLP]) -> dict[str, dict[str, Any]]:
    """The held-out loss of every prior, as the result has it."""
    return {name: {"heldout_loss": heldout_loss(glp)} for name, glp in priors.items()}


def write_rows(table: pa.Table, path: Path) -> None:
    with replaced(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def finished(
    config: SteerConfig, priors: Mapping[str, GLP], directions: Sequence[Direction], folder: Path
) -> dict[str, Any] | None:
    """The result of an experiment that has nothing left to do; None if there is none.

    That is what the very same configuration left, with priors of the same held-out losses and, of the experiment
    "files", the same `directions`, if its rows are still there and no rating of a text failed.
    """
    path = folder / "steer.json"
    if not path.is_file() or not (folder / "results.parquet").is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"config": to_dict(config), "priors": losses_of(priors)}
    if any(result.get(key) != value for key, value in json.loads(json.dumps(wanted)).items()):
        return None
    files = {
        (found["name"], method, prior): folder / "cells" / file_of(found["name"], method, prior)
        for found in result["directions"]
        for method, prior in methods_with_priors(config)
    }
    if not all(file.is_file() for file in files.values()) or (result["ratings"] and result["ratings"]["failed"]):
        return None
    stored = json.loads((folder / "cells" / SETTINGS).read_text(encoding="utf-8"))
    if config.experiment == "files" and stored["directions"] != _digests(directions):
        return None
    for (name, method, _), file in files.items():
        if method != "none":
            refuse_unchanged(method, name, pq.read_table(file), pq.read_table(files[name, "none", ""]))
    return result


def keep_settings(config: SteerConfig, tasks: Sequence[SteeringTask], folder: Path) -> None:
    """Refuse a folder of other settings than those of `config`; write them if it is new."""
    settings = settings_of(config)
    if config.store is None:
        del settings["store"]  # older folders name one that no experiment but "sae" reads
    if config.experiment == "files":  # a file may change under its name; other directions follow from the settings
        settings["directions"] = _digests(task.direction for task in tasks)
    path = folder / SETTINGS
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        check_settings(folder.parent, "an experiment", {name: stored.get(name) for name in settings}, settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, settings)


def refuse_unchanged(
    method: str, direction: str, table: pa.Table, unsteered: pa.Table, counts: EditCounts | None = None
) -> None:
    """Raise `InputError` if no text of a condition at any strength differs from the unsteered one of its prompt."""
    plain = dict(zip(unsteered["prompt"].to_pylist(), unsteered["text"].to_pylist(), strict=True))
    steered = [row for row in table.select(["prompt", "text", "strength"]).to_pylist() if row["strength"]]
    if steered and all(row["text"] == plain[row["prompt"]] for row in steered):
        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
        did = f"; {counts}" if counts is not None else ""
        what = f"method {method!r} along {direction!r} changed none of {len(steered)} texts at any strength"
        raise InputError(f"{what}: nothing to report ({installed}{did})")


def _digests(directions: Iterable[Direction]) -> dict[str, str]:
    return {d.name: _digest(d.vector.numpy().tobytes()) for d in directions}


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
