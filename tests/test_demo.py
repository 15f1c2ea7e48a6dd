"""The demo on the real embedded model and corpus, at its smallest size."""

from __future__ import annotations

import json

import pytest

from latentprior.cli import USAGE, main
from latentprior.demo import neutral_prompts

pytestmark = [pytest.mark.assets, pytest.mark.slow]


def test_tiny_demo_makes_its_page_and_a_second_run_reuses_everything(tmp_path, capsys):
    arguments = ["demo", "--tiny", "--output", str(tmp_path)]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "demo.json").read_text())
    assert first["record"]["rows"] >= 6000
    methods = {row["method"] for row in first["evaluate"]["delta_lm"]["rows"]}
    assert methods == {"prior", "gaussian", "noise", "mean"}
    assert {row["method"] for row in first["steer"]["rows"]} == {"plain", "repaired", "paired"}
    assert first["steer"]["classifier"]["heldout_accuracy"] > 0.7
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 4
    assert "Steering" in capsys.readouterr().out

    assert main(arguments) == 0
    second = json.loads((tmp_path / "demo.json").read_text())
    assert {k: v for k, v in second.items() if k != "wall_seconds"} == {
        k: v for k, v in first.items() if k != "wall_seconds"
    }
    assert second["wall_seconds"] < first["wall_seconds"] / 3
    assert main([*arguments, "--seed", "1"]) == USAGE


def test_prompts_are_beginnings_of_held_out_news():
    prompts = neutral_prompts(8)
    assert len(set(prompts)) == 8 and all(len(p.split()) == 10 for p in prompts)
