"""Several processes train as one: the same weights, no document lost or repeated, and no hang when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import on_store
from latentprior.config import LLMConfig, RecordConfig, TextConfig, TrainConfig
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.record import record
from latentprior.prior.glp import GLP
from latentprior.training.checkpoint import complete_states, latest
from latentprior.training.fit import fit
from latentprior.utils.errors import InputError

TERMINATED = -signal.SIGTERM


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_texts) -> TextConfig:
    return TextConfig(dataset=write_texts(tmp_path_factory.mktemp("text") / "texts.jsonl", 400), heldout=0.1)


@pytest.fixture(scope="module")
def config(text, llm_folder) -> TrainConfig:
    """A live run of 40 steps; its output is to be set."""
    return TrainConfig.of(
        source="llm",
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=text,
        layers=[0, 2],
        batch_tokens=256,
        buffer="480",
        statistics=200,
        document_shards=6,
        recipe={"batch_size": 96, "distinct_times": 8, "ema": 0.9, "learning_rate": 1e-2},
        activations=40 * 96,
        blocks=2,
        d_model=16,
        d_mlp=24,
        precision="float32",
        micro_batch=20,
        heldout_activations=101,
        log_every=1,
        save_seconds=0.0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> str:
    """The run of one process that is never interrupted."""
    folder = str(tmp_path_factory.mktemp("whole") / "prior")
    fit(config.changed(output=folder))
    return folder


def assert_close(folder: str, whole: str, tolerance: float = 2e-5) -> None:
    ours, theirs = GLP.from_pretrained(folder), GLP.from_pretrained(whole)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(
            a, b, atol=tolerance, rtol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    losses = [glp.provenance["training"]["heldout_loss"] for glp in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    counts = [glp.provenance["training"]["activations"] for glp in (ours, theirs)]
    assert counts[0] == counts[1]


# --- Equal to one process


@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_processes_train_as_one(config, whole, run_ranks, tmp_path, size, parallel):
    config = config.changed(output=str(tmp_path / "prior"), parallel=parallel)
    assert run_ranks(size, fit, config) == [0] * size
    assert_close(config.run.output, whole)
    assert json.loads(Path(config.run.output, "train.json").read_text())["processes"] == size


def test_processes_share_a_store(config, text, run_ranks, tmp_path, llm_folder):
    llm = config.stream.llm
    store = record(RecordConfig(output=str(tmp_path / "store"), layers=[1], llm=llm, text=text))
    config = on_store(config, store=str(store.folder), heldout=str(store.folder), document_shards=None)
    fit(config.changed(output=str(tmp_path / "one")))
    assert run_ranks(2, fit, config.changed(output=str(tmp_path / "two"))) == [0, 0]
    assert_close(str(tmp_path / "two"), str(tmp_path / "one"))


# --- Interruptions


def wait_for_state(folder: Path, step: int = 1) -> None:
    """Return once a training state of at least `step` is there."""
    deadline = time.monotonic() + 90
    while not any(int(state.name) >= step for state in complete_states(folder / "steps")):
        assert time.monotonic() < deadline, "no training state was saved"
        time.sleep(0.01)


def slowly(config: TrainConfig) -> None:
    """`fit` at a pace that a signal can catch."""
    fit(config, report=lambda *_: time.sleep(0.05))


def test_terminated_and_continued_by_other_numbers_of_processes(config, whole, run_ranks, tmp_path):
    """SIGTERM, as by a scheduler, to one process: all save and end; 3, then 1 go on where 2 stopped."""
    config = config.changed(output=str(tmp_path / "prior"), save_seconds=1000.0)
    steps = []
    for size, parallel in [(2, "fsdp"), (3, "ddp")]:
        before = steps[-1] if steps else 0

        def terminate(processes, before=before) -> None:
            path, deadline = Path(config.run.output, "log.jsonl"), time.monotonic() + 90
            while not path.exists() or f'"step": {before + 7}' not in path.read_text():
                assert time.monotonic() < deadline, "no step was made"
                time.sleep(0.01)
            os.kill(processes[1].pid, signal.SIGTERM)

        codes = run_ranks(size, slowly, config.changed(parallel=parallel), signals=terminate)
        assert len(codes) == size and all(code not in (0, TERMINATED) for code in codes)
        saved = latest(Path(config.run.output) / "steps")
        assert saved is not None
        steps.append(saved.step)
    assert 7 <= steps[0] < steps[1] < 40
    fit(config)
    assert_close(config.run.output, whole)


def test_a_dead_process_ends_all_and_the_run_continues(config, whole, run_ranks, tmp_path):
    config = config.changed(output=str(tmp_path / "prior"))

    def kill_one(processes) -> None:
        wait_for_state(Path(config.run.output), 6)
        os.kill(processes[1].pid, signal.SIGKILL)

    codes = run_ranks(2, slowly, config, signals=kill_one)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert run_ranks(2, fit, config) == [0, 0]
    assert_close(config.run.output, whole)


def test_every_document_is_used_once_over_kills_of_two_processes(config, run_ranks, tmp_path):
    """What the processes drew is on disk too: each document's rows once, whole, in one of the stores."""
    kept = tmp_path / "kept"
    config = config.changed(output=str(tmp_path / "prior"), record_to=str(kept), activations=10**6)

    def kill_both(processes) -> None:
        wait_for_state(Path(config.run.output), 5)
        for process in processes:
            process.kill()

    assert run_ranks(2, slowly, config, signals=kill_both) == [-signal.SIGKILL] * 2
    assert run_ranks(2, fit, config) == [0, 0]
    assert "ended" in json.loads(Path(config.run.output, "train.json").read_text())["summary"]
    seen: list[tuple[int, int, int]] = []
    for part in ("1-of-2", "2-of-2"):
        store = ActivationStore(kept / part, verify="full")
        layer, doc, position, _ = store.metadata(torch.arange(len(store)))
        seen += zip(doc.tolist(), position.tolist(), layer.tolist(), strict=True)
    alone = record(
        RecordConfig(output=str(tmp_path / "alone"), layers=[0, 2], llm=config.stream.llm, text=config.stream.text)
    )
    layer, doc, position, _ = alone.metadata(torch.arange(len(alone)))
    assert sorted(seen) == sorted(zip(doc.tolist(), position.tolist(), layer.tolist(), strict=True))
    assert json.loads(Path(config.run.output, "train.json").read_text())["summary"]["activations"] == len(seen)


# --- Uneven data and bad input


def test_processes_whose_text_ends_early_do_not_hang(config, run_ranks, tmp_path):
    """With 7 documents left to train on some of the six document shards have more rows than others."""
    config = config.changed(text=replace(config.stream.text, limit=7), statistics=20, output=str(tmp_path / "two"))
    fit(config.changed(output=str(tmp_path / "one")))
    assert run_ranks(2, fit, config) == [0, 0]
    assert_close(config.run.output, str(tmp_path / "one"))
    summary = json.loads(Path(config.run.output, "train.json").read_text())["summary"]
    assert summary["ended"].startswith("the activations ended after") and summary["activations"] < 500


def refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(config)


def test_a_batch_that_processes_cannot_share_is_refused(config, run_ranks, tmp_path):
    config = config.changed(output=str(tmp_path / "prior"), recipe=config.recipe | {"batch_size": 100})
    message = "^a batch of 100 cannot be divided evenly over 3 processes$"
    assert run_ranks(3, refused, config, message) == [0, 0, 0]
    assert not Path(config.run.output).exists()


@pytest.mark.slow
def test_the_command_line_under_torchrun(config, whole, tmp_path):
    """One real launch: torchrun, two processes, SIGTERM's exit status, and the same command to the end."""
    output = tmp_path / "prior"
    options = {"output": str(output), "buffer": "480", "statistics": 200, "lanes": 6, "batch_tokens": 256}
    options |= {"activations": 40 * 96, "blocks": 2, "d_model": 16, "d_mlp": 24, "precision": "float32"}
    options |= {"micro_batch": 20, "heldout_activations": 101, "log_every": 1, "save_seconds": 0.0, "device": "cpu"}
    options |= {"llm.model": config.stream.llm.model, "llm.dtype": "float32"}
    options |= {"text.dataset": config.stream.text.dataset, "text.heldout": 0.1, "layers": "0,2"}
    options |= {"recipe": json.dumps(config.recipe)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "latentprior", "train", "--from", "llm"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert_close(str(output), whole)
    assert done.stdout.count("held-out loss") == 1  # one process speaks for all
