"""`train --from llm` and `--follow` as whole runs: exact over kills, without a disk, and in step with a recorder."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import on_store
from latentprior.config import LLMConfig, RecordConfig, TextConfig, TextSource, TrainConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.record import record
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.glp import GLP
from latentprior.training import sources
from latentprior.training.checkpoint import complete_states
from latentprior.training.fit import fit
from latentprior.training.tracking import read_log
from latentprior.utils.errors import InputError, Stopped


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_texts) -> TextConfig:
    folder = tmp_path_factory.mktemp("text")
    files = [write_texts(folder / f"{name}.jsonl", 300, name) for name in ("a", "b")]
    return TextConfig(mix=[TextSource(files[0], weight=2.0), TextSource(files[1])], heldout=0.1)


@pytest.fixture(scope="module")
def config(text, llm_folder) -> TrainConfig:
    """A live run of 60 steps over two sources of text; its output is to be set."""
    return TrainConfig.of(
        source="llm",
        output="to be set",
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=text,
        layers=[1],
        batch_tokens=256,
        buffer="320",
        statistics=200,
        recipe={"batch_size": 64, "distinct_times": 8, "ema": 0.9, "learning_rate": 1e-2},
        activations=60 * 64,
        blocks=1,
        d_model=16,
        d_mlp=16,
        precision="float32",
        heldout_activations=128,
        log_every=1,
        save_seconds=0.0,
        device="cpu",
    )


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def log_of(folder: str) -> list[dict]:
    lines = read_log(Path(folder, "log.jsonl"))
    return [
        {key: value for key, value in line.items() if key not in ("per_second", "measured_peak_share")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> str:
    """The folder of the run that is never interrupted."""
    folder = str(tmp_path_factory.mktemp("whole") / "prior")
    fit(config.changed(output=folder))
    return folder


# --- A live run


def test_a_live_run_leaves_a_prior_and_says_where_its_time_went(whole, config):
    glp = GLP.from_pretrained(whole)
    assert glp.hookpoints[0].layer == 1 and glp.provenance["source"]["text"]["mix"][0]["weight"] == 2.0
    result = json.loads(Path(whole, "train.json").read_text())
    assert result["seconds"].keys() == {"training", "llm", "buffer", "evaluating and saving"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["summary"]["activations"] == result["summary"]["distinct"] == 60 * 64
    losses = [line["heldout_loss"] for line in read_log(Path(whole, "log.jsonl")) if "heldout_loss" in line]
    assert losses[-1] < 0.9 * losses[0]  # of documents that the stream holds out by itself
    assert not list(Path(whole).rglob("shard-*"))
    assert Path(whole, "statistics.safetensors").is_file()


def test_a_live_run_says_what_was_cut(whole, config, tmp_path):
    found = json.loads(Path(whole, "train.json").read_text())["summary"]["left_out"]
    assert found["cut_tokens"] == 0
    short = {"max_length": 5, "long_documents": "cut", "document_shards": 1, "batch_tokens": 64, "activations": 10 * 64}
    config = config.changed(output=str(tmp_path / "prior"), **short)
    fit(config)
    found = json.loads(Path(config.run.output, "train.json").read_text())["summary"]["left_out"]
    assert found["cut_tokens"] >= found["cut_documents"] > 100
    assert found == GLP.from_pretrained(config.run.output).provenance["training"]["left_out"]


@pytest.mark.slow
def test_killed_twenty_times_at_random(config, whole, run_killed, tmp_path):
    """SIGKILL at any time, also in the warm-up, a refill or a save: the weights are the same, bit for bit."""
    config = config.changed(output=str(tmp_path / "prior"))
    draws, kills = random.Random(0), 0
    while kills < 20:
        if run_killed(fit, config, seconds=draws.uniform(0.3, 1.6)):
            shutil.rmtree(config.run.output)  # it came to its end: begin again
        else:
            kills += 1
    fit(config)
    assert weights(config.run.output) == weights(whole)
    assert log_of(config.run.output) == log_of(whole)


def test_killed_between_changes_of_the_disk(config, whole, run_killed, tmp_path):
    config = config.changed(output=str(tmp_path / "prior"))
    draws, steps = random.Random(1), []
    while not run_killed(fit, config, changes=draws.randint(30, 200)):
        states = complete_states(Path(config.run.output) / "steps")
        steps.append(int(states[-1].name) if states else 0)
    assert len(steps) > 3 and steps == sorted(steps)
    assert weights(config.run.output) == weights(whole) and log_of(config.run.output) == log_of(whole)


@pytest.mark.parametrize("step", range(4, 10))
def test_terminated_at_any_step_of_a_buffer(config, whole, tmp_path, step):
    """The buffer holds five batches; SIGTERM comes while step `step` is reported, and one more is made."""
    config = config.changed(output=str(tmp_path / "prior"), save_seconds=1000.0)

    def report(done: int, total: int | None, figures: object) -> None:
        if done == step * 64:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=f"^stopped after {step + 1} of 60 steps$"):
        fit(config, report=report)
    assert [state.name for state in complete_states(Path(config.run.output) / "steps")] == [str(step + 1)]
    fit(config)
    assert weights(config.run.output) == weights(whole) and log_of(config.run.output) == log_of(whole)


def test_the_end_of_the_text_is_the_end_of_the_run(config, tmp_path):
    config = config.changed(
        output=str(tmp_path / "prior"), activations=10**6, text=replace(config.stream.text, limit=60)
    )
    glp = fit(config)
    training = glp.provenance["training"]
    assert training["ended"].startswith("the activations ended after") and 0 < training["activations"] < 2000
    assert weights(config.run.output) and fit(config).provenance == glp.provenance  # finished: opened again


def test_what_is_streamed_can_be_kept_within_a_budget(config, whole, tmp_path):
    kept = tmp_path / "kept"
    budget = config.changed(output=str(tmp_path / "prior"), record_to=str(kept), disk_budget="40KB", buffer="64")
    with pytest.raises(InputError, match="budget"):  # two shards of 65,536 rows do not fit
        fit(budget)
    fit(budget.changed(disk_budget="40MB", buffer="320"))
    store = ActivationStore(kept, verify="full")
    assert len(store) >= 60 * 64 and store.manifest["complete"] and weights(budget.run.output) == weights(whole)


def test_stream_and_store_train_alike(config, tmp_path):
    """Equal numbers of equal activations: the held-out losses agree."""
    store = record(
        RecordConfig(output=str(tmp_path / "store"), layers=[1], llm=config.stream.llm, text=config.stream.text)
    )
    heldout = record(
        RecordConfig(
            output=str(tmp_path / "heldout"),
            layers=[1],
            llm=config.stream.llm,
            text=replace(config.stream.text, part="heldout"),
        )
    )
    config = config.changed(heldout=str(heldout.folder), heldout_activations=1000, save_seconds=1000.0)
    live = fit(config.changed(output=str(tmp_path / "live"), statistics=10**6))
    stored = fit(on_store(config, output=str(tmp_path / "stored"), store=str(store.folder)))
    losses = [glp.provenance["training"]["heldout_loss"] for glp in (live, stored)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    torch.testing.assert_close(live.normalizer.mean, stored.normalizer.mean, atol=1e-4, rtol=1e-3)


# --- Beside a recorder


def test_trains_while_another_process_records(config, text, run_ranks, tmp_path):
    """A recorder with room for some shards and a trainer that follows it: all rows, each once, and both end."""
    settings = RecordConfig(
        output=str(tmp_path / "store"),
        layers=[1],
        llm=config.stream.llm,
        text=text,
        batch_tokens=256,
        shard_rows=600,
        disk_budget="600KB",
        wait=True,
        wait_seconds=60.0,
    )
    options = {"store": settings.output, "follow": True, "wait_seconds": 60.0, "statistics": 500}
    trainer = on_store(config, **options, output=str(tmp_path / "prior"), activations=10**6, save_seconds=1000.0)
    assert run_ranks(2, record_or_train, settings, trainer) == [0, 0]
    store = ActivationStore(settings.output)
    training = GLP.from_pretrained(trainer.run.output).provenance["training"]
    assert training["activations"] == len(store) + store.manifest["evicted"] and store.manifest["evicted"] > 0
    assert training["ended"].startswith("the activations ended")


def record_or_train(settings: RecordConfig, trainer: TrainConfig) -> None:
    """One of two processes records, the other one trains; they are no group."""

    rank = os.environ.pop("RANK")
    record(settings) if rank == "0" else fit(trainer)


# --- Bad input


def test_bad_input_is_one_line_before_anything_is_computed(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    file = config.stream.text.mix[0].dataset
    for change, message in [
        ({"layers": [9]}, "layer"),
        ({"buffer": "63"}, "^a buffer of 63 activations does not hold a batch of 64"),
        ({"buffer": "900TB"}, "is larger than the memory of cpu"),
        ({"text": TextConfig(dataset=str(empty))}, "no documents"),
        ({"text": TextConfig(dataset=file, column="body")}, "unknown column .*'body'"),
        (
            {"document_shards": 65},
            "^document_shards .* 65$",
        ),
        ({"float8": True}, "^float8 needs"),
        ({"llm": LLMConfig(model=str(tmp_path / "none"))}, "no such model"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            fit(config.changed(output=str(tmp_path / "prior"), **change))
        assert "\n" not in str(caught.value), change
        assert not Path(tmp_path, "prior").exists(), change


# --- Started twice, terminated while waiting


def test_a_second_start_is_refused_and_continues_once_the_first_is_killed(config, whole, run_killed, tmp_path):
    config = config.changed(output=str(tmp_path / "prior"))
    first = multiprocessing.get_context("forkserver").Process(target=slow_fit, args=(config,))
    first.start()
    while not complete_states(Path(config.run.output) / "steps"):
        assert first.is_alive()
        time.sleep(0.02)
    with pytest.raises(InputError, match=f"prior is in use by process {first.pid}: "):
        fit(config)
    first.kill()
    first.join()
    fit(config)
    assert weights(config.run.output) == weights(whole) and log_of(config.run.output) == log_of(whole)


def slow_fit(config: TrainConfig) -> None:
    fit(config, report=lambda *_: time.sleep(0.2))


def test_a_finished_run_loads_no_language_model(config, whole, monkeypatch):
    monkeypatch.setattr(sources, "load_llm", lambda *_: pytest.fail("a model was loaded"))
    assert torch.equal(fit(config.changed(output=whole)).normalizer.mean, GLP.from_pretrained(whole).normalizer.mean)
    for change, name in [
        ({"seed": 1}, "seed is 0"),
        ({"text": replace(config.stream.text, heldout=0.2)}, "source_of_rows"),
        ({"layers": [2]}, "source_of_rows"),
    ]:
        with pytest.raises(InputError, match=f"finished run .*{name}"):
            fit(config.changed(output=whole, **change))


def follow(store: str, output: str, **options) -> subprocess.Popen:
    """`latentprior train --follow` in a process of its own."""
    arguments = {"--store": store, "--output": output, "--device": "cpu", "--blocks": "1", "--log-every": "1"} | options
    command = [sys.executable, "-m", "latentprior", "train", "--follow"]
    for name, value in arguments.items():
        command += [name, value]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def terminated(process: subprocess.Popen) -> str:
    """What it says when it is asked to end, with the status of one that was."""
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60.0)
    assert process.returncode == 143
    return said


def test_a_follower_that_waits_for_its_first_rows_can_be_terminated(tmp_path):
    process = follow(str(tmp_path / "store"), str(tmp_path / "prior"))
    while not (tmp_path / "prior" / ".lock").exists():  # it is in the folder, and has SIGTERM's handler soon
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    assert f"stopped while waiting for more of {tmp_path / 'store'}" in " ".join(terminated(process).split())
    assert not (tmp_path / "prior").exists()


def test_a_follower_that_waits_for_more_saves_its_state(tmp_path):
    point, rows = Hookpoint("tiny", 1, 8), 300
    number = torch.arange(rows)
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    writer = StoreWriter(tmp_path / "store", [point], dtype="float32", shard_rows=rows, source={})
    writer.append(ActivationBatch(x, torch.ones(rows).long(), number, number, number), next_batch=1, left_out={})
    output = tmp_path / "prior"
    recipe = {"--recipe": '{"batch_size": 64}', "--statistics": "100", "--activations": "640"}
    process = follow(str(tmp_path / "store"), str(output), **recipe)
    while not (output / "log.jsonl").exists() or '"step": 4,' not in (output / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    terminated(process)
    assert [state.name for state in complete_states(output / "steps")] == ["4"]
