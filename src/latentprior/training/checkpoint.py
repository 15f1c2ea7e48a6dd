"""Training states on disk: complete or invisible, continued bit for bit.

A state is a folder ``steps/<step>``, written under a temporary name and renamed. Tensors are written by torch's
distributed checkpoint as safetensors (its default would be a pickle), by every process its own shards; any number of
processes can read them again. The rest (step, settings, position in the data) is in a marker file, written last.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from latentprior.training.loop import State
from latentprior.utils.distributed import ALONE, World
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text, sync
from latentprior.utils.settings import check_settings

Json = dict[str, Any]

MARKER = "complete.json"
KEPT = 2  # the newest states; older ones are removed


def save_state(folder: Path, state: State, settings: Json, position: Json | None = None, world: World = ALONE) -> Path:
    """Write `state` to ``folder/<step>`` and remove all but the newest `KEPT`; returns that folder.

    Called by every process of `world`; the first one makes the state visible once all have written. `position` is
    where the data are, as JSON values. On an error, as of a full disk, the states before it are good.
    """
    target = folder / str(state.step)
    partial = folder / f"{state.step}.partial"
    if world.main:
        complete = complete_states(folder)
        for path in folder.glob("*"):  # what killed runs left of states that they were writing or removing
            if path.name.removesuffix(".partial").isdigit() and path not in complete:
                shutil.rmtree(path)
    world.wait()
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=world.size > 1)
    try:
        with _one_process():
            save(_tensors(state), storage_writer=writer, no_dist=world.size == 1)
    except (CheckpointException, OSError) as error:
        raise InputError(f"cannot write the training state {target}: {_reason(error)}") from error
    world.wait()
    if world.main:
        partial.replace(target)
        marker = {"step": state.step, "settings": settings, "position": position}
        replace_text(target / MARKER, json.dumps(marker))
        sync(folder)
        for old in complete_states(folder)[:-KEPT]:
            (old / MARKER).unlink()  # first, so that what a kill leaves of it is no complete state
            shutil.rmtree(old)
    world.wait()
    return target


def complete_states(folder: Path) -> list[Path]:
    """The complete states in `folder`, oldest first."""
    steps = [p for p in folder.glob("*") if p.name.isdigit() and (p / MARKER).is_file()]
    return sorted(steps, key=lambda p: int(p.name))


@dataclass(frozen=True)
class Saved:
    """A complete state on disk."""

    folder: Path
    step: int
    settings: Json
    position: Json | None


def latest(folder: Path, settings: Json | None = None) -> Saved | None:
    """The newest complete state in `folder`, of a run with these `settings`, its tensors not yet read; None if none."""
    states = complete_states(folder)
    if not states:
        return None
    newest = states[-1]
    try:
        marker = json.loads((newest / MARKER).read_text(encoding="utf-8"))
        saved = Saved(newest, int(marker["step"]), dict(marker["settings"]), marker.get("position"))
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(newest, error) from error
    if settings is not None:
        check_settings(folder.parent, "a run", saved.settings, settings)
    return saved


def load_state(saved: Saved, state: State, world: World = ALONE) -> None:
    """Bring `state` to a saved one, whatever number of processes wrote it; called by every process of `world`."""
    reader = HuggingFaceStorageReader(str(saved.folder))
    tensors = _tensors(state)  # the ones that model, optimizer and average hold: loading fills them in place
    try:
        found = reader.read_metadata().state_dict_metadata  # here, as torch would log a traceback
        if missing := {f"{part}.{name}" for part, values in tensors.items() for name in values} - found.keys():
            raise _damaged(saved.folder, f"it lacks {sorted(missing)[0]} and {len(missing) - 1} others")
        with _one_process():
            load(tensors, storage_reader=reader, no_dist=world.size == 1)
    except (CheckpointException, SafetensorError, OSError) as error:
        raise _damaged(saved.folder, error) from error
    state.step = saved.step


def _tensors(state: State) -> dict[str, dict[str, Any]]:
    """The state's own tensors by name. The optimizer's options are no part of it: they follow from the recipe."""
    flat_names = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(state.denoiser, state.optimizers, options=flat_names)
    return {
        "denoiser": get_model_state_dict(state.denoiser),
        "optimizer": {name: value for name, value in flat.items() if isinstance(value, Tensor)},
        "average": {} if state.average is None else state.average.state_dict(),
    }


@contextmanager
def _one_process() -> Iterator[None]:
    """Without torch's warning that one process alone writes or reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _damaged(path: Path, error: object) -> InputError:
    remedy = "remove it to continue from the one before"
    return InputError(f"the training state {path} is damaged: {_reason(error)}; {remedy}")


def _reason(error: object) -> str:
    """The message, on one line: of torch's summary of all ranks the first rank's own."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0]
