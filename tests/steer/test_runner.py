"""Cells of a steering experiment on a tiny model: what they measure, and that each is made once."""

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
from latentprior.steer import intervention as intervene
from latentprior.steer import runner as experiment
from latentprior.steer.direction import Direction
from latentprior.steer.frontier import summarise
from latentprior.steer.runner import Bench, Cell, cells, run_cells
from latentprior.steer.tasks import Case
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
def bench(tiny_llm, tiny_glp, tiny_tokenizer):
    model = tiny_llm("llama")
    priors = {n: tiny_glp(32, layers=(1,), model="tiny-llama", seed=i) for i, n in enumerate(CONFIG.priors)}
    return Bench(CONFIG, model, tiny_tokenizer, priors, 5.0, None)


@pytest.fixture
def case(bench, tiny_tokenizer):
    hookpoint = bench.priors["one"].hookpoints[0]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction = Direction.of(vector, hookpoint, "test", "random")
    return Case(direction, tokenized(tiny_tokenizer, TEXTS), vowels, {"name": "vowels"}, "vowels")


def rows(bench: Bench, case: Case, method: str, prior: str = "") -> list[dict]:
    return bench.measured(Cell(case, method, prior))[0].to_pylist()


def test_methods_without_repair_have_one_cell_for_all_priors(case):
    found = [(cell.method, cell.prior) for cell in cells(CONFIG, [case])]
    assert found == [("none", ""), ("plain", ""), ("paired", "one"), ("paired", "two"), ("random", "")]


def test_a_cell_has_every_prompt_at_every_strength(bench, case):
    found = rows(bench, case, "plain")
    assert [(row["prompt"], row["strength"]) for row in found] == [
        (prompt, r) for prompt in range(3) for r in (0.4, 1.0, -0.4, -1.0)
    ]
    assert {row["prompt_text"] for row in found} == set(TEXTS)
    assert all(row["tokens"] == 4 and row["retention"] == pytest.approx(1, abs=1e-4) for row in found)
    assert all(row["off_before"] == row["off_after"] != row["off_clean"] for row in found)
    assert [row["concept"] for row in found] == pytest.approx(vowels([row["text"] for row in found]).tolist())


def test_unsteered_texts_are_the_models_own(bench, case):
    found = rows(bench, case, "none")
    out = bench.model.generate(
        **case.prompts.inputs(), do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=2
    )
    assert [row["text"] for row in found] == bench.tokenizer.batch_decode(out[:, -4:], skip_special_tokens=True)
    assert all(row["retention"] is None and row["strength"] == 0 for row in found)


def test_repair_loses_some_of_the_edit_and_lands_elsewhere(bench, case):
    plain, paired = rows(bench, case, "plain"), rows(bench, case, "paired", "one")
    assert any(a["text"] != b["text"] for a, b in zip(plain, paired, strict=True))
    assert all(row["retention"] != pytest.approx(1, abs=1e-3) and row["moved"] > 1e-3 for row in paired)
    assert any(a["text"] != b["text"] for a, b in zip(paired, rows(bench, case, "paired", "two"), strict=True))


def test_the_batch_of_prompts_does_not_matter(bench, case):
    """Noise belongs to the prompt, not to its place in a batch."""
    small = dataclasses.replace(bench, config=dataclasses.replace(CONFIG, batch_rows=1))
    for method in ("paired", "plain"):
        mine, theirs = (rows(b, case, method, "one" if method == "paired" else "") for b in (bench, small))
        assert [row["text"] for row in mine] == [row["text"] for row in theirs]
        assert [row["off_after"] for row in mine] != []


def test_a_random_direction_of_equal_norm_is_the_control(bench, case):
    found = rows(bench, case, "random")
    assert [row["text"] for row in found] != [row["text"] for row in rows(bench, case, "plain")]
    assert all(row["direction"] == "test" for row in found)


def test_finished_cells_are_not_made_again(bench, case, tmp_path, monkeypatch):
    table = run_cells(bench, [case], tmp_path)
    made = []
    measured = Bench.measured
    monkeypatch.setattr(Bench, "measured", lambda self, cell: made.append(cell.method) or measured(self, cell))
    assert run_cells(bench, [case], tmp_path).equals(table) and made == []
    more = dataclasses.replace(bench, config=dataclasses.replace(CONFIG, methods=["plain", "paired", "repaired"]))
    assert len(run_cells(more, [case], tmp_path)) > 0 and made == ["repaired", "repaired"]


def test_a_killed_run_makes_only_what_is_missing(bench, case, tmp_path, monkeypatch):
    whole = run_cells(bench, [case], tmp_path / "whole")
    write = pq.write_table
    written: list[str] = []

    def dies(table, path, **options):
        written.append(str(path))
        if len(written) == 3:
            path.write_bytes(b"half")  # what a kill in the middle leaves behind
            raise KeyboardInterrupt
        write(table, path, **options)

    monkeypatch.setattr(experiment.pq, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        run_cells(bench, [case], tmp_path / "cut")
    assert run_cells(bench, [case], tmp_path / "cut").equals(whole)
    assert len(written) == 3 + 3  # five cells, one of them twice


def test_other_settings_are_refused(bench, case, tmp_path):
    run_cells(bench, [case], tmp_path / "cells")
    other = dataclasses.replace(bench, config=dataclasses.replace(CONFIG, new_tokens=5))
    with pytest.raises(InputError, match=r"another new_tokens \(4, not 5\): choose another --output"):
        run_cells(other, [case], tmp_path / "cells")


def test_a_direction_that_changed_in_its_file_is_refused(bench, case, tmp_path):
    files = dataclasses.replace(CONFIG, experiment="files", directions=["a.safetensors"])
    run_cells(dataclasses.replace(bench, config=files), [case], tmp_path / "cells")
    direction = Direction.of(-case.direction.vector, case.direction.hookpoint, "test", "random")
    with pytest.raises(InputError, match="another directions"):
        other = dataclasses.replace(case, direction=direction)
        run_cells(dataclasses.replace(bench, config=files), [other], tmp_path / "cells")


def test_a_method_that_changes_no_text_is_refused(bench, case, tmp_path, monkeypatch):
    """Whatever the reason: here each push is lost on the way."""
    monkeypatch.setattr(intervene, "_APPLY", intervene._APPLY | {"add": lambda x, w, strength, unit: x})
    with pytest.raises(InputError) as caught:
        run_cells(bench, [case], tmp_path)
    message = str(caught.value)
    assert "'plain' along 'test' changed none of 12 texts at any strength" in message and "\n" not in message
    assert "transformers" in message and "48 edited" in message  # 12 texts of 4 tokens
    assert len(list(tmp_path.glob("plain-*.parquet"))) == 0


def test_texts_that_were_kept_are_refused_as_well(bench, case, tmp_path):
    run_cells(bench, [case], tmp_path)
    (plain,) = tmp_path.glob("plain-*.parquet")
    (none,) = tmp_path.glob("none-*.parquet")
    table, unsteered = pq.read_table(plain), pq.read_table(none)["text"].to_pylist()
    texts = pa.array([unsteered[prompt] for prompt in table["prompt"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), plain)
    with pytest.raises(InputError, match="changed none of 12 texts"):
        run_cells(bench, [case], tmp_path)


def test_the_frontiers_of_the_rows(bench, case, tmp_path):
    summary = summarise(run_cells(bench, [case], tmp_path), resamples=50)
    (direction,) = summary["directions"]
    assert direction["prompts"] == 3
    assert {(entry["method"], entry["prior"]) for entry in direction["methods"]} == {
        ("plain", None),
        ("paired", "one"),
        ("paired", "two"),
        ("random", None),
    }
    json.dumps(summary, allow_nan=False)
