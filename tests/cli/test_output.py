"""What every command prints, as its user sees it: progress bars, tables, and not a line of noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SENTENCES

RUN_ALL = """
import json, sys, warnings
from latentprior.cli import main
warnings.filterwarnings("always", category=FutureWarning)
warnings.filterwarnings("always", category=DeprecationWarning, module="latentprior")
for name, *arguments in json.load(open(sys.argv[1])):
    print(f"== {name}", file=sys.stderr, flush=True)
    print(f"== {name}", flush=True)
    status = main(arguments)
    print(f"status {status}", flush=True)
"""


def commands(folder: Path, llm: str) -> list[list[str]]:
    """One tiny run of every command that needs no embedded text, each after what it builds on."""

    def at(name: str) -> str:
        return str(folder / name)

    model = ["--llm.model", llm]
    text = ["--text.dataset", at("texts.jsonl"), "--text.heldout", "0.3"]
    stores = ["--store", at("store"), "--heldout", at("heldout"), "--recipe", '{"batch_size": 128}']
    record = ["record", "record", "--layers", "1", *model, *text]
    sweep = ["--widths", "16,32", "--blocks", "1", "--budgets", "256,512", "--samples", "50", "--steps", "2"]
    evaluate = ["--heldout", at("heldout"), "--train", at("store"), "--samples", "50", "--projections", "8"]
    evaluate += ["--nfes", "2", "--solvers", "euler", "--text.limit", "4", "--steps", "2"]
    probe = ["--tasks", at("mine.csv"), "--times", "0.1", "--sparse", "1", "--candidates", "8", "--folds", "2"]
    return [
        [*record, "--output", at("store")],
        [*record, "--output", at("heldout"), "--text.part", "heldout"],
        ["train", "train", *stores, "--output", at("prior"), "--activations", "512"],
        ["sample", "sample", "--prior", at("prior"), "--n", "5", "--output", at("samples.safetensors")],
        ["evaluate", "evaluate", "--prior", at("prior"), "--output", at("evaluation"), *evaluate, *model, *text],
        ["convert", "convert", "--source", at("prior"), "--output", at("official"), "--to", "official"],
        ["plan", "plan", *model, "--activations", "1000000"],
        ["sweep", "sweep", *stores, *sweep, "--lm_documents", "3", "--output", at("sweep"), *model, *text],
        ["probe", "probe", "--priors", at("prior"), *probe, "--output", at("probe"), *model],
        ["neurons", "neurons", "--prior", at("prior"), "--probe", at("probe"), "--output", at("neurons"), "--tokens",
         "100", "--top", "2", "--reservoir", "4", "--html", at("site"), *model, *text],
    ]  # fmt: skip


def steer(folder: Path, llm: str) -> list[str]:
    return ["steer", "steer", "--priors", str(folder / "prior"), "--output", str(folder / "steer"), "--labelled", "120",
            "--prompts", "2", "--prompt-tokens", "6", "--new-tokens", "4", "--strengths", "2,8", "--directions",
            "difference_of_means", "--reading", "embedding", "--llm.model", llm]  # fmt: skip


@pytest.fixture(scope="module")
def printed(tmp_path_factory, llm_folder, write_texts, has_assets) -> dict[str, tuple[str, str]]:
    """What each command wrote to standard output and to standard error; one process, as each would import torch."""
    folder = tmp_path_factory.mktemp("output")
    write_texts(folder / "texts.jsonl", 120)
    rows = [f"{SENTENCES[i % 2][:20]} {i},{i % 2}" for i in range(130)]
    (folder / "mine.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")
    runs = commands(folder, llm_folder) + ([steer(folder, llm_folder)] if has_assets else [])
    (folder / "runs.json").write_text(json.dumps(runs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"} | {"COLUMNS": "80"}
    ran = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(folder / "runs.json")],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    out, err = (dict(part.split("\n", 1) for part in text.split("== ")[1:]) for text in (ran.stdout, ran.stderr))
    return {name: (out[name], err[name]) for name in out}


COMMANDS = ["record", "train", "sample", "evaluate", "convert", "plan", "sweep", "probe", "neurons", "steer"]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.assets] if name == "steer" else []) for name in COMMANDS]
)
def test_a_command_prints_bars_and_tables_only(printed, command):
    out, err = printed[command]
    assert out.splitlines()[-1] == "status 0", err
    assert [line for line in err.splitlines() if "━" not in line] == []
    assert "Warning" not in out and "Traceback" not in out


def test_names_in_tables_are_whole(printed):
    out, _ = printed["evaluate"]
    assert "gaussian-full" in out and "gaussian-diagonal" in out
    assert "Test AUC of the one task" in printed["probe"][0] and "too few" in printed["probe"][0]
    assert "Memory of the one process" in printed["plan"][0]
