"""Conditions of a steering experiment on a tiny model: what they measure, and that each is made once."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from latentprior.config import SteerConfig
from latentprior.data.prompts import tokenized
from latentprior.steer import conditions as files
from latentprior.steer import intervention
from latentprior.steer.conditions import Condition, conditions
from latentprior.steer.direction import Direction
from latentprior.steer.frontier import summarise
from latentprior.steer.runner import Runner, run_conditions
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.errors import InputError

TEXTS = ["The quick brown fox", "She", "A language model keeps what"]
CONFIG = SteerConfig(
    priors=["one", "two"],
    output="o",
    methods=["paired", "random"],
    strengths=[0.4, 1.0],
    new_tokens=4,
    prompts=3,
    batch_rows=8,
    positions="last",
)


def vowels(texts) -> np.ndarray:
    """Share of vowels: a concept that needs no model."""
    return np.array([sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts])


@pytest.fixture
def runner(tiny_llm, tiny_glp, tiny_tokenizer):
    model = tiny_llm("llama")
    priors = {n: tiny_glp(32, layers=(1,), model="tiny-llama", seed=i) for i, n in enumerate(CONFIG.priors)}
    return Runner(CONFIG, model, tiny_tokenizer, priors, 5.0, None)


@pytest.fixture
def task(runner, tiny_tokenizer):
    hookpoint = runner.priors["one"].hookpoints[0]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction = Direction.of(vector, hookpoint, "test", "random")
    return SteeringTask(direction, tokenized(tiny_tokenizer, TEXTS), vowels, {"name": "vowels"}, "vowels")


def rows(runner: Runner, task: SteeringTask, method: str, prior: str = "") -> list[dict]:
    return runner.run(Condition(task, method, prior))[0].to_pylist()


def test_methods_without_repair_have_one_condition_for_all_priors(task):
    found = [(condition.method, condition.prior) for condition in conditions(CONFIG, [task])]
    assert found == [("none", ""), ("plain", ""), ("paired", "one"), ("paired", "two"), ("random", "")]


def test_a_condition_has_every_prompt_at_every_strength(runner, task):
    found = rows(runner, task, "plain")
    assert [(row["prompt"], row["strength"]) for row in found] == [
        (prompt, r) for prompt in range(3) for r in (0.4, 1.0, -0.4, -1.0)
    ]
    assert {row["prompt_text"] for row in found} == set(TEXTS)
    assert all(row["tokens"] == 4 and row["retention"] == pytest.approx(1, abs=1e-4) for row in found)
    assert all(row["off_before"] == row["off_after"] != row["off_clean"] for row in found)
    assert [row["concept"] for row in found] == pytest.approx(vowels([row["text"] for row in found]).tolist())


def test_unsteered_texts_are_the_models_own(runner, task):
    found = rows(runner, task, "none")
    out = runner.model.generate(
        **task.prompts.inputs(), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=2
    )
    assert [row["text"] for row in found] == runner.tokenizer.batch_decode(out[:, -4:], skip_special_tokens=True)
    assert all(row["retention"] is None and row["strength"] == 0 for row in found)


def test_repair_loses_some_of_the_edit_and_lands_elsewhere(runner, task):
    plain, paired = rows(runner, task, "plain"), rows(runner, task, "paired", "one")
    assert any(a["text"] != b["text"] for a, b in zip(plain, paired, strict=True))
    assert all(row["retention"] != pytest.approx(1, abs=1e-3) and row["moved"] > 1e-3 for row in paired)
    assert any(a["text"] != b["text"] for a, b in zip(paired, rows(runner, task, "paired", "two"), strict=True))


def test_the_batch_of_prompts_does_not_matter(runner, task):
    """Noise belongs to the prompt, not to its place in a batch."""
    small = dataclasses.replace(runner, config=dataclasses.replace(CONFIG, batch_rows=1))
    for method in ("paired", "plain"):
        mine, theirs = (rows(b, task, method, "one" if method == "paired" else "") for b in (runner, small))
        assert [row["text"] for row in mine] == [row["text"] for row in theirs]
        assert [row["off_after"] for row in mine] != []


def test_a_random_direction_of_equal_norm_is_the_control(runner, task):
    found = rows(runner, task, "random")
    assert [row["text"] for row in found] != [row["text"] for row in rows(runner, task, "plain")]
    assert all(row["direction"] == "test" for row in found)


def test_finished_conditions_are_not_made_again(runner, task, tmp_path, monkeypatch):
    table = run_conditions(runner, [task], tmp_path)
    made = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, condition: made.append(condition.method) or run(self, condition))
    assert run_conditions(runner, [task], tmp_path).equals(table) and made == []
    more = dataclasses.replace(runner, config=dataclasses.replace(CONFIG, methods=["plain", "paired", "repaired"]))
    assert len(run_conditions(more, [task], tmp_path)) > 0 and made == ["repaired", "repaired"]


def test_a_killed_run_makes_only_what_is_missing(runner, task, tmp_path, monkeypatch):
    whole = run_conditions(runner, [task], tmp_path / "whole")
    write = pq.write_table
    written: list[str] = []

    def dies(table, path, **options):
        written.append(str(path))
        if len(written) == 3:
            path.write_bytes(b"half")  # what a kill in the middle leaves behind
            raise KeyboardInterrupt
        write(table, path, **options)

    monkeypatch.setattr(files.pq, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        run_conditions(runner, [task], tmp_path / "cut")
    assert run_conditions(runner, [task], tmp_path / "cut").equals(whole)
    assert len(written) == 3 + 3  # five conditions, one of them twice


def test_other_settings_are_refused(runner, task, tmp_path):
    run_conditions(runner, [task], tmp_path / "cells")
    other = dataclasses.replace(runner, config=dataclasses.replace(CONFIG, new_tokens=5))
    with pytest.raises(InputError, match="new_tokens is 4 .* and 5 now"):
        run_conditions(other, [task], tmp_path / "cells")


def test_a_direction_that_changed_in_its_file_is_refused(runner, task, tmp_path):
    files = dataclasses.replace(CONFIG, experiment="files", directions=["a.safetensors"])
    run_conditions(dataclasses.replace(runner, config=files), [task], tmp_path / "cells")
    direction = Direction.of(-task.direction.vector, task.direction.hookpoint, "test", "random")
    with pytest.raises(InputError, match="directions"):
        other = dataclasses.replace(task, direction=direction)
        run_conditions(dataclasses.replace(runner, config=files), [other], tmp_path / "cells")


def test_a_method_that_changes_no_text_is_refused(runner, task, tmp_path, monkeypatch):
    """Whatever the reason: here each push is lost on the way."""
    monkeypatch.setattr(intervention, "_APPLY", intervention._APPLY | {"add": lambda x, w, strength, unit: x})
    with pytest.raises(InputError) as caught:
        run_conditions(runner, [task], tmp_path)
    message = str(caught.value)
    assert "'plain' along 'test' changed none of 12 texts at any strength" in message and "\n" not in message
    assert "transformers" in message and "48 edited" in message  # 12 texts of 4 tokens
    assert len(list(tmp_path.glob("plain-*.parquet"))) == 0


def test_texts_that_were_kept_are_refused_as_well(runner, task, tmp_path):
    run_conditions(runner, [task], tmp_path)
    (plain,) = tmp_path.glob("plain-*.parquet")
    (none,) = tmp_path.glob("none-*.parquet")
    table, unsteered = pq.read_table(plain), pq.read_table(none)["text"].to_pylist()
    texts = pa.array([unsteered[prompt] for prompt in table["prompt"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), plain)
    with pytest.raises(InputError, match="changed none"):
        run_conditions(runner, [task], tmp_path)


def test_the_frontiers_of_the_rows(runner, task, tmp_path):
    summary = summarise(run_conditions(runner, [task], tmp_path), resamples=50)
    (direction,) = summary["directions"]
    assert direction["prompts"] == 3
    assert {(entry["method"], entry["prior"]) for entry in direction["methods"]} == {
        ("plain", None),
        ("paired", "one"),
        ("paired", "two"),
        ("random", None),
    }
    json.dumps(summary, allow_nan=False)
