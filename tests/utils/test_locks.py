"""One process at a time in a folder, with real processes: the second is refused, a killed one leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentprior.config import (
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    NeuronsConfig,
    ProbeConfig,
    RecordConfig,
    SteerConfig,
    SweepConfig,
    TrainConfig,
)
from latentprior.data.store.record import record
from latentprior.demo import demo
from latentprior.evaluation.evaluate import evaluate
from latentprior.neurons.collect import neurons
from latentprior.neurons.describe import describe_store
from latentprior.prior.official.convert import convert
from latentprior.probe.experiment import probe
from latentprior.scaling.sweep import sweep
from latentprior.steer.experiment import steer
from latentprior.training.fit import fit
from latentprior.utils import locks
from latentprior.utils.errors import InputError
from latentprior.utils.locks import locked

LONG = 60.0  # seconds; only a fault takes them
FORK = multiprocessing.get_context("fork")  # at once; the children do nothing with torch


def hold(folder: Path) -> None:
    with locked(folder):
        (folder / "held").touch()
        time.sleep(LONG)


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "out"``."""
    process = FORK.Process(target=hold, args=(tmp_path / "out",))
    process.start()
    wait_for(tmp_path / "out" / "held", process)
    yield process
    process.kill()
    process.join()


def wait_for(path: Path, process: multiprocessing.Process) -> None:
    deadline = time.monotonic() + LONG
    while not path.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- The lock


def test_a_second_process_is_refused_until_the_first_is_killed(holder, tmp_path):
    folder = tmp_path / "out"
    message = refusal(lambda: locked(folder).__enter__())
    assert message.startswith(f"{folder} is in use by process {holder.pid}: ")
    holder.kill()
    holder.join()
    assert (folder / locks.LOCK).exists()  # what the dead process left
    with locked(folder):
        assert (folder / locks.LOCK).read_text().split()[0] == str(os.getpid())
    assert [path.name for path in folder.iterdir()] == ["held"]


def test_one_process_holds_a_folder_once_and_other_folders_beside_it(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "a" / "inner"), locked(tmp_path / "b"):
        assert f"by process {os.getpid()}" in refusal(lambda: locked(tmp_path / "a").__enter__())
    assert not list(tmp_path.iterdir())  # nothing was written: nothing is left
    with locked(tmp_path / "a"):
        pass


def test_a_process_on_another_machine_is_named_with_it(holder, tmp_path, monkeypatch):
    here = locks.socket.gethostname()
    monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
    assert f"by process {holder.pid} on {here}: " in refusal(lambda: locked(tmp_path / "out").__enter__())


def test_folders_that_were_there_or_hold_something_stay(tmp_path):
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "deep" / "new"):
        (tmp_path / "deep" / "new" / "file").touch()
        _ = 1 / 0
    assert (tmp_path / "empty").is_dir() and (tmp_path / "deep" / "new" / "file").is_file()
    assert not list(tmp_path.rglob(locks.LOCK))


def test_a_file_in_the_way_is_said_plainly(tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file, not a folder: " in refusal(lambda: locked(tmp_path / "file").__enter__())
    below = tmp_path / "file" / "below" / "it"
    assert f"file is a file, not a folder, so there can be no folder {below}" in refusal(
        lambda: locked(below).__enter__()
    )


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*_: Any) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks"), locked(tmp_path / "out"):
        pass


def take_and_add(folder: Path, times: int) -> None:
    """Add one to a number `times` times, each time alone in the folder."""
    done = 0
    while done < times:
        try:
            with locked(folder):
                path = folder / "number"
                number = int(path.read_text()) if path.exists() else 0
                path.write_text(str(number + 1))
                done += 1
        except InputError:
            pass


def test_two_are_never_in_at_once(tmp_path):
    """The lock's file comes and goes hundreds of times; a number that two changed at once would be too small."""
    processes = [FORK.Process(target=take_and_add, args=(tmp_path / "out", 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "out" / "number").read_text() == "300"


# --- The commands


@pytest.fixture
def prior(tiny_glp, tmp_path) -> str:
    glp = tiny_glp(model="tiny-llama")
    glp.normalizer.mean_norm[:] = 5.0
    return str(glp.save_pretrained(tmp_path / "prior"))


def commands(out: str, prior: str) -> dict[str, Callable[[], object]]:
    return {
        "record": lambda: record(RecordConfig(output=out)),
        "train": lambda: fit(TrainConfig.of(store="somewhere", output=out)),
        "train --from llm": lambda: fit(TrainConfig.of(source="llm", output=out)),
        "train --record-to": lambda: fit(TrainConfig.of(source="llm", output=out + "-2", record_to=out)),
        "steer": lambda: steer(SteerConfig(output=out, priors=[prior], experiment="persona")),
        "probe": lambda: probe(ProbeConfig(priors=[prior], output=out)),
        "neurons": lambda: neurons(NeuronsConfig(prior=prior, output=out)),
        "descriptions": lambda: describe_store(out, None, 0, seed=0),
        "evaluate": lambda: evaluate(EvaluateConfig(prior=prior, heldout="heldout", output=out)),
        "sweep": lambda: sweep(SweepConfig(store="store", heldout="heldout", output=out)),
        "demo": lambda: demo(DemoConfig(output=out)),
        "convert": lambda: convert(ConvertConfig(source="somewhere", output=out, overwrite=True)),
    }


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    homes = ("data.store.record", "training.sources", "evaluation.evaluate", "scaling.sweep", "neurons.collect", "demo")
    for module in (*homes, "steer.experiment", "probe.experiment"):
        monkeypatch.setattr(f"latentprior.{module}.load_llm", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("name", list(commands("", "")))
def test_every_command_is_refused_while_another_process_is_in_its_folder(name, holder, prior, tmp_path, nothing_loads):
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert f"{out} is in use by process {holder.pid}" in refusal(commands(str(out), prior)[name])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not Path(f"{out}-2").exists()


@pytest.mark.parametrize("name", list(commands("", "")))
def test_every_command_says_that_its_output_is_a_file(name, prior, tmp_path, nothing_loads):
    out = tmp_path / "out"
    out.write_text("mine")
    assert f"{out} is a file, not a folder" in refusal(commands(str(out), prior)[name])
    assert out.read_text() == "mine" and not Path(f"{out}-2").exists()


def test_all_ranks_end_if_the_first_is_refused(holder, run_ranks, tmp_path):
    assert all(
        run_ranks(2, fit, TrainConfig.of(store="somewhere", output=str(tmp_path / "out"), device="cpu"), timeout=60.0)
    )
    holder.kill()
    holder.join()
