"""The demo on the real embedded model and corpus, at its smallest size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from latentprior.cli.commands import USAGE, main
from latentprior.config import LLMConfig, SteerConfig
from latentprior.lm.loading import load_tokenizer
from latentprior.steer.tasks import neutral_beginnings


@pytest.mark.assets
@pytest.mark.slow
def test_tiny_demo_makes_its_page_and_a_second_run_reuses_everything(tmp_path, capsys):
    arguments = ["demo", "--tiny", "--output", str(tmp_path)]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "demo.json").read_text())
    assert first["record"]["rows"] >= 6000
    methods = {row["method"] for row in first["evaluate"]["delta_lm"]["rows"]}
    assert methods == {"prior", "gaussian", "noise", "mean"}
    (direction,) = first["steer"]["summary"]["directions"]
    assert {entry["method"] for entry in direction["methods"]} == {"plain", "repaired", "paired"}
    assert direction["prompts"] == 4 and len({row["prompt_text"] for row in first["steer"]["texts"]}) == 3
    (judge,) = first["steer"]["judges"].values()
    assert judge["heldout_accuracy"] > 0.7
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 7 and 'id="steering"' in page and 'id="texts"' in page
    assert "difference of means" in capsys.readouterr().out

    assert main(arguments) == 0
    second = json.loads((tmp_path / "demo.json").read_text())
    assert {k: v for k, v in second.items() if k != "wall_seconds"} == {
        k: v for k, v in first.items() if k != "wall_seconds"
    }
    assert second["wall_seconds"] < first["wall_seconds"] / 3
    assert main([*arguments, "--seed", "1"]) == USAGE


@pytest.mark.assets
def test_prompts_are_beginnings_of_held_out_news_of_one_length():
    tokenizer = load_tokenizer(LLMConfig("smollm2-135m"))
    prompts = neutral_beginnings(
        SteerConfig(priors=["p"], output="o", prompts=8), tokenizer, lambda texts: np.full(len(texts), 0.5)
    )
    assert len(set(prompts)) == 8 and {len(tokenizer(p).input_ids) for p in prompts} == {20}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--strengths", "0.5,-1", "positive"), ("--strengths", "0.5,0.5", "twice"), ("--prompts", "1", "at least 2")],
)
def test_steering_that_cannot_be_compared_is_refused_before_anything_runs(tmp_path, capsys, option, value, message):
    assert main(["demo", "--output", str(tmp_path / "demo"), option, value]) == USAGE
    assert message in capsys.readouterr().err and not (tmp_path / "demo").exists()
