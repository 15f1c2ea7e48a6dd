"""The demo on the real embedded model and corpus, at its smallest size."""

from __future__ import annotations

import html
import json
import shutil
from importlib import metadata

import numpy as np
import pytest

from latentprior.cli.commands import USAGE, main
from latentprior.config import LLMConfig, SteerConfig
from latentprior.demo import TRAINING
from latentprior.lm.loading import load_tokenizer
from latentprior.prior import installed
from latentprior.prior.installed import how_to_install
from latentprior.steer.tasks import neutral_beginnings
from prior_packages import offer

NAME = "smollm2-135m-layer15"


@pytest.fixture
def only_tiny(monkeypatch):
    """No prior is installed but the one that the test offers, if any."""
    monkeypatch.setattr(
        installed,
        "entry_points",
        lambda **wanted: [entry for entry in metadata.entry_points(**wanted) if entry.value == "tiny_prior"],
    )


@pytest.mark.assets
@pytest.mark.slow
def test_tiny_demo_makes_its_page_and_a_second_run_reuses_everything(tmp_path, capsys, only_tiny, monkeypatch):
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
    shown = capsys.readouterr().out
    assert "difference of means" in shown
    assert first["shipped"] == {"prior": None, "package": None, "install": how_to_install(NAME)}
    assert how_to_install(NAME) in html.unescape(page) and "not installed: pip install" in shown
    assert first["train"]["config"]["preset"] == "fast"

    assert main(arguments) == 0
    second = json.loads((tmp_path / "demo.json").read_text())
    assert {k: v for k, v in second.items() if k != "wall_seconds"} == {
        k: v for k, v in first.items() if k != "wall_seconds"
    }
    assert second["wall_seconds"] < first["wall_seconds"] / 3
    assert main([*arguments, "--seed", "1"]) == USAGE
    capsys.readouterr()
    train = json.loads((tmp_path / "train.json").read_text())
    former = {name: value for name, value in train["settings"].items() if name not in TRAINING}
    (tmp_path / "train.json").write_text(json.dumps(train | {"settings": former}))
    assert main(arguments) == USAGE and "preset is 'quick' there and 'fast' now" in capsys.readouterr().err
    (tmp_path / "train.json").write_text(json.dumps(train))

    (tmp_path / "site").mkdir()
    shutil.copytree(tmp_path / "prior", tmp_path / "site" / "tiny_prior")
    offer(tmp_path / "site", "tiny", NAME, "tiny_prior")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(arguments) == 0
    shipped_is_told(first, tmp_path, capsys.readouterr().out)


def shipped_is_told(first, folder, shown):
    """A prior that was installed meanwhile is measured beside the demo's; what does not concern it is kept."""
    third, page = json.loads((folder / "demo.json").read_text()), (folder / "report.html").read_text(encoding="utf-8")
    assert third["shipped"]["prior"] == NAME and third["shipped"]["install"] is None
    assert {part: third[part] for part in ("record", "train")} == {part: first[part] for part in ("record", "train")}
    (compared,) = third["evaluate"]["compared"]  # the same weights, so the same figures
    assert compared["heldout_loss"] == first["evaluate"]["heldout_loss"] == third["evaluate"]["heldout_loss"]
    assert third["evaluate"]["distribution"][:-1] == first["evaluate"]["distribution"]
    (before,), (now,) = ([*part["steer"]["summary"]["directions"]] for part in (first, third))
    ours = [entry for entry in now["methods"] if entry["prior"] != NAME]
    assert ours == before["methods"]
    assert [entry["method"] for entry in now["methods"] if entry["prior"] == NAME] == ["repaired", "paired"]
    assert f"The shipped prior {NAME} is measured beside this prior" in page and f"paired by {NAME}" in page
    assert f"Prior {NAME}, AB2, 20" in page and "not installed" not in shown and NAME in shown


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
