"""A steering experiment from its configuration, on a tiny model: what it measures follows from what it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latentprior.config import JudgeConfig, SteerConfig
from latentprior.data.prompts import tokenized
from latentprior.report import render
from latentprior.steer import Direction, read_direction, tasks
from latentprior.steer import experiment as run
from latentprior.steer.direction import write_direction
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.errors import InputError

PROMPTS = ["The quick brown", "A language model keeps what", "She"]


def vowels(texts) -> np.ndarray:
    """Share of vowels: a concept that needs no model."""
    return np.array([sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts])


def never() -> tuple[Any, Any]:
    raise AssertionError("the language model is loaded too early")


@pytest.fixture
def glp(tiny_glp):
    glp = tiny_glp(32, layers=(1,), model="tiny-llama")
    glp.provenance["training"] = {"heldout_loss": 1.5}
    glp.normalizer.mean_norm[:] = 5.0
    return glp


@pytest.fixture
def run_it(tiny_llm, tiny_tokenizer, glp, tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Runs an experiment along one direction; the asset packages, which `steering_tasks` needs, are left out."""
    vector = torch.randn(glp.width, generator=torch.Generator().manual_seed(0))
    direction = Direction.of(vector, glp.hookpoints[0], "vowels, test", "random", seed=0)
    task = SteeringTask(direction, tokenized(tiny_tokenizer, PROMPTS), vowels, {"name": "share of vowels"}, "vowels")
    monkeypatch.setattr(run, "steering_tasks", lambda *_: [task])
    monkeypatch.setattr(run, "check_named", lambda *_: [])
    prior = str(glp.save_pretrained(tmp_path / "prior"))

    def with_options(folder: str = "out", llm: Callable | None = None, **options: Any) -> dict[str, Any]:
        settings = {"methods": ["plain", "repaired", "paired"], "both_signs": False, "prompts": 3, "new_tokens": 5}
        config = SteerConfig(output=str(tmp_path / folder), priors=[prior], **settings | options)
        return run.experiment(config, llm or (lambda: (tiny_llm("llama"), tiny_tokenizer)))

    return with_options


def figures(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each method at its only strength."""
    (direction,) = result["summary"]["directions"]
    return {entry["method"]: entry["points"][0] for entry in direction["methods"]}


def texts(result: dict[str, Any], method: str) -> list[str]:
    return [row["text"] for row in result["texts"] if row["method"] == method]


def test_an_edit_too_small_to_matter_changes_nothing_unless_it_is_repaired(run_it):
    result = run_it(strengths=[1e-12, 1.0], examples=4)
    unsteered = texts(result, "none")
    for method in figures(result):
        small = [row["text"] for row in result["texts"] if row["method"] == method and row["strength"] == 1e-12]
        assert (small == unsteered) == (method != "repaired"), method


def test_methods_that_do_nothing_at_all_are_refused(run_it):
    with pytest.raises(InputError, match="changed none of 3"):
        run_it(strengths=[1e-12])


def test_plain_steering_keeps_its_edit_and_repair_some_of_it(run_it):
    result = run_it(strengths=[1.0])
    retention = {method: point["retention"] for method, point in figures(result).items()}
    assert retention["plain"] == pytest.approx(1.0, abs=1e-4)
    assert retention["repaired"] != pytest.approx(1.0, abs=1e-3)
    assert {method: repair["nfe"] for method, repair in result["repairs"].items()} == {"repaired": 4, "paired": 8}
    assert result["mean_norm"] == 5.0 and [p["heldout_loss"] for p in result["priors"].values()] == [1.5]


def test_an_experiment_repeats_itself_and_goes_on_from_what_is_there(run_it, tmp_path):
    first, again = (run_it(folder, strengths=[0.5, 1.0]) for folder in ("out", "other"))
    continued = run_it(strengths=[0.5, 1.0])
    differing = ("wall_seconds", "config")
    for other in (again, continued):
        assert {k: v for k, v in other.items() if k not in differing} == {
            k: v for k, v in first.items() if k not in differing
        }
    tables = [pq.read_table(tmp_path / folder / "results.parquet") for folder in ("out", "other")]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 3 * (1 + 3 * 2)


def test_a_finished_experiment_loads_no_model(run_it, tmp_path):
    first = run_it(strengths=[0.5])
    assert run_it(llm=never, strengths=[0.5]) == json.loads(json.dumps(first))
    loaded = "loaded too early"
    with pytest.raises(AssertionError, match=loaded):
        run_it(llm=never, strengths=[0.5], examples=1)  # another page
    with pytest.raises(AssertionError, match=loaded):
        run_it(llm=never, strengths=[0.5], methods=["plain", "repaired", "paired", "guided"])
    for file in ("results.parquet", next((tmp_path / "out" / "cells").glob("paired-*")).name):
        (path,) = (tmp_path / "out").rglob(file)
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(AssertionError, match=loaded):
            run_it(llm=never, strengths=[0.5])
        path.write_bytes(kept)
    path = tmp_path / "out" / "steer.json"
    changed = {"ratings": {"failed": 1}}, {"priors": {}}
    for change in changed:
        path.write_text(json.dumps(first | change))
        with pytest.raises(AssertionError, match=loaded):
            run_it(llm=never, strengths=[0.5])


def test_directions_that_are_not_there_are_found_before_the_model_is_loaded(glp, tmp_path, monkeypatch):
    prior = glp.save_pretrained(tmp_path / "prior")
    monkeypatch.setattr(tasks, "binary_task", lambda name: ([], []))
    out = str(tmp_path / "out")
    files = {"experiment": "files", "output": out}
    assert "no-such.safetensors" in refusal(prior, directions=[str(tmp_path / "no-such.safetensors")], **files)
    vector = torch.randn(glp.width, generator=torch.Generator().manual_seed(0))
    for name, layer in (("far", 3), ("near", 1)):
        point = replace(glp.hookpoints[0], layer=layer)
        write_direction(Direction.of(vector, point, name, "random", seed=0), tmp_path / f"{name}.safetensors")
    near, far = (str(tmp_path / f"{name}.safetensors") for name in ("near", "far"))
    assert "belongs to" in refusal(prior, directions=[far], **files)
    assert "two directions have the same name" in refusal(prior, directions=[near, near], **files)
    assert "unknown trait 'quiet'" in refusal(prior, experiment="persona", directions=["quiet"], output=out)
    assert "no-sae" in refusal(prior, experiment="sae", sae=str(tmp_path / "no-sae"), store="s", output=out)
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_what_is_returned_and_drawn(run_it, tmp_path):
    result = run_it(strengths=[0.5, 1.0], examples=1)
    assert json.loads((tmp_path / "out" / "steer.json").read_text()) == json.loads(json.dumps(result))
    assert {row["prompt_text"] for row in result["texts"]} == set(PROMPTS[:1])
    (file,) = (tmp_path / "out" / "directions").iterdir()
    assert read_direction(file).name == result["directions"][0]["name"] == "vowels, test"
    page = render(result)
    for shown in ('id="steering"', 'id="texts"', "share of vowels", "Repairs", "mean activation norm, 5.00"):
        assert shown in page


def refusal(*priors: Any, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        options = {"priors": [str(prior) for prior in priors], "output": "runs/steer"} | options
        run.experiment(SteerConfig(**options), never)
    return str(error.value)


def test_what_can_be_refused_is_refused_before_the_model_is_loaded(glp, tiny_glp, tmp_path, monkeypatch):
    good = glp.save_pretrained(tmp_path / "good")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = JudgeConfig(url="http://127.0.0.1:9/v1", model="judge", key_variable="NO_SUCH_KEY")
    assert "NO_SUCH_KEY" in refusal(good, judge=judge)
    other = tiny_glp(32, layers=(2,), model="tiny-llama").save_pretrained(tmp_path / "other")
    assert "layer 2" in refusal(good, other)
    glp.normalizer.mean_norm[:] = float("nan")
    assert "mean activation norm" in refusal(glp.save_pretrained(tmp_path / "without norm"))
    glp.hookpoints = ()
    assert "hookpoints" in refusal(glp.save_pretrained(tmp_path / "without hookpoints"))


def test_a_model_that_the_prior_does_not_know_is_refused(glp, tiny_llm, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "check_named", lambda *_: [])
    config = SteerConfig(priors=[str(glp.save_pretrained(tmp_path / "prior"))], output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="tiny-gpt2"):
        run.experiment(config, lambda: (tiny_llm("gpt2"), tiny_tokenizer))
    assert not (tmp_path / "out").exists()
