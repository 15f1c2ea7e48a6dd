"""A sweep of tiny priors: what it writes, what it reuses, that a kill loses nothing, and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latentprior.config import LLMConfig, SweepConfig, TextConfig, from_dict
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.cost import training_flops_per_activation
from latentprior.prior.glp import GLP
from latentprior.scaling import sweep as grid
from latentprior.scaling.sweep import findings, sweep
from latentprior.utils.errors import InputError

WIDTH = 32  # of the tiny language model
BATCH = 64
MEASURED = {"frechet": 1.0, "frechet_raw": 1.0}


def write_store(folder: Path, rows: int, *, seed: int, layers: tuple[int, ...] = (1,), model: str = "tiny") -> str:
    """A store of correlated Gaussian rows, a document for every four."""
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows * len(layers), WIDTH, generator=torch.Generator().manual_seed(seed)) @ mix
    index = torch.arange(len(x))
    batch = ActivationBatch(
        x=x, layer=torch.tensor(layers).repeat_interleave(rows), doc=index // 4, position=index, token=index
    )
    hookpoints = [Hookpoint(model=model, layer=layer, width=WIDTH) for layer in layers]
    with StoreWriter(folder, hookpoints, dtype="float32", source={"corpus": "tiny", "blocks": 4}) as writer:
        for i in range(len(layers)):
            writer.moments.median_norm[i] = 30.0
        writer.append(batch, next_batch=1, left_out={})
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, llm_folder) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "store": write_store(folder / "train", 2000, seed=1, model=llm_folder),
        "heldout": write_store(folder / "heldout", 600, seed=2, model=llm_folder),
    }


@pytest.fixture
def config(tmp_path, stores) -> SweepConfig:
    return SweepConfig(
        **stores,
        output=str(tmp_path / "sweep"),
        widths=[32, 48],
        blocks=[1],
        budgets=[2 * BATCH, 8 * BATCH, 32 * BATCH],
        recipe={"batch_size": BATCH, "distinct_times": 16, "learning_rate": 1e-2},
        samples=100,
        steps=2,
        delta_lm=False,
        precision="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory, sentences) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"Text {i}. " + sentences[i % len(sentences)])
    return str(folder)


def saved(config: SweepConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "sweep.json").read_text())


def test_a_sweep_trains_measures_and_fits(config):
    seen: dict[str, list[tuple[int, int]]] = {}

    def phase(name: str):
        return lambda done, total, figures: seen.setdefault(name, []).append((done, total))

    state = torch.get_rng_state()
    result = sweep(config, phase=phase)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads(json.dumps(result)) == saved(config)
    assert {"config", "versions", "git", "seed", "wall_seconds"} <= result.keys()
    assert result["kind"] == "sweep" and result["hookpoint"]["layer"] == 1

    runs = result["runs"]
    assert [run["flops"] for run in runs] == sorted(run["flops"] for run in runs) and len(runs) == 6
    for run in runs:
        folder = Path(config.output) / "runs" / run["name"]
        glp = GLP.from_pretrained(folder)
        assert run["parameters"] == sum(p.numel() for p in glp.denoiser.parameters())
        assert run["flops_6nd"] == 6 * run["parameters"] * run["activations"]
        each = training_flops_per_activation(glp.denoiser.config, distinct_times=16 / BATCH)
        assert run["flops"] == pytest.approx(each * run["activations"])
        assert run["heldout_loss"] == json.loads((folder / "train.json").read_text())["summary"]["heldout_loss"]
        assert run["frechet"] > result["bound"]["frechet"] > 0 and run["frechet_raw"] > 0
        assert not (folder / "steps").exists() and not (folder / "checkpoints").exists()
    for width in config.widths:  # more activations, less loss: each budget is a run of its own
        losses = [run["heldout_loss"] for run in runs if run["d_model"] == width]
        assert losses == sorted(losses, reverse=True)
    assert runs[0]["optimal"] and "delta_lm" not in runs[0]

    laws = {(law["runs"], law["compute"]): law for law in result["laws"]}
    every = laws["all", "executed"]
    assert every["points"] == 6 and every["alpha"] > 0
    assert every["alpha_interval"][0] <= every["alpha_interval"][1]
    assert every["curve"]["compute"][-1] == pytest.approx(4 * runs[-1]["flops"])
    assert result["correlations"]["frechet"]["points"] == 6
    assert result["correlations"].keys() == {"frechet", "frechet_raw"}

    done, totals = zip(*seen["train, GFLOP"], strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[-1] and len(set(totals)) == 1
    assert seen["measure"] == [(i, 6) for i in range(1, 7)]


def test_what_is_there_is_reused_and_what_is_new_is_added(config, monkeypatch):
    small = replace(config, widths=[32], budgets=config.budgets[:2])
    first = sweep(small)
    assert "at least 4" in first["correlations"]["frechet"]["failed"]
    assert all("at least 4" in law["failed"] for law in first["laws"])

    changed = {p: p.stat().st_mtime_ns for p in (Path(config.output) / "runs").rglob("*") if p.is_file()}
    measured = []
    monkeypatch.setattr(grid._Grid, "_frechet", lambda self, glp: measured.append(glp) or dict(MEASURED))
    result = sweep(small)
    assert not measured and [r["frechet"] for r in result["runs"]] == [r["frechet"] for r in first["runs"]]
    assert changed == {p: p.stat().st_mtime_ns for p in changed}
    sweep(config)
    assert len(measured) == 4
    assert changed == {p: p.stat().st_mtime_ns for p in changed}
    sweep(replace(small, samples=90))  # other samples are measured again
    assert len(measured) == 6


@pytest.mark.slow  # a process of its own has to import everything again
def test_a_killed_sweep_continues(config, run_killed, tmp_path):
    config = replace(config, budgets=config.budgets[:2])
    whole = sweep(replace(config, output=str(tmp_path / "whole")))
    if run_killed(sweep, config, changes=60):
        pytest.fail("the sweep was over before it was killed")
    finished = len(list((Path(config.output) / "runs").glob("*/train.json")))
    assert 0 < finished < 4
    again = sweep(config)
    same = ("name", "heldout_loss", "frechet", "frechet_raw")
    assert [[run[k] for k in same] for run in again["runs"]] == [[run[k] for k in same] for run in whole["runs"]]


def test_delta_lm_loss_is_measured_in_the_language_model(config, texts, llm_folder, monkeypatch):
    config = replace(
        config,
        budgets=config.budgets[:1],
        delta_lm=True,
        lm_documents=5,
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=TextConfig(dataset=texts, part="all"),
    )
    result = sweep(config)
    for run in result["runs"]:
        low, high = run["delta_lm_interval"]
        assert low <= run["delta_lm"] <= high and run["delta_lm"] != 0
    assert "delta_lm" in result["correlations"]
    monkeypatch.setattr(grid, "load_llm", lambda config: pytest.fail("loaded for nothing"))
    assert sweep(config)["runs"] == result["runs"]


def test_findings_of_an_exact_law():
    rows = []
    for i in range(8):
        flops = 1e12 * 3.0**i
        loss = 0.9 + 1e3 * flops**-0.25
        rows.append({"flops": flops, "flops_6nd": 2 * flops, "heldout_loss": loss, "frechet": loss**2})
    worse = {"flops": 5e13, "flops_6nd": 1e14, "heldout_loss": 2.9, "frechet": 9.0}
    found = findings([*rows, worse])
    assert [run["optimal"] for run in found["runs"]] == [True] * 8 + [False]
    executed, paper = found["laws"][:2]
    assert (executed["runs"], executed["compute"]) == ("envelope", "executed") and executed["E_pinned"]
    assert executed["E"] == pytest.approx(0.9, abs=1e-4)
    assert paper["alpha"] == pytest.approx(executed["alpha"], rel=1e-4)
    assert paper["A"] == pytest.approx(executed["A"] * 2**0.25, rel=1e-2)
    assert found["correlations"]["frechet"]["spearman"] == pytest.approx(1)


def refused(config: SweepConfig, message: str) -> None:
    before = sorted(os.listdir(Path(config.output).parent))
    with pytest.raises(InputError, match=message) as error:
        sweep(config)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(Path(config.output).parent)) == before


def test_what_cannot_work_is_refused_before_it_starts(config, tmp_path, texts, llm_folder):
    refused(replace(config, samples=500), "less than 500 samples")
    refused(replace(config, store=str(tmp_path / "nowhere")), "nowhere")
    refused(replace(config, layer=3), "unknown layer '3'")
    other = write_store(tmp_path / "other", 50, seed=0, model="another")
    refused(replace(config, heldout=other), "other hookpoints")
    other_model = replace(config, store=other, heldout=other, samples=20, delta_lm=True)
    refused(replace(other_model, llm=LLMConfig(model=llm_folder), text=TextConfig(dataset=texts)), "another")
    several = write_store(tmp_path / "several", 200, seed=0, layers=(0, 1))
    refused(replace(config, store=several, heldout=several), "choose one with --layer")


def test_a_folder_of_other_activations_is_refused(config, tmp_path):
    small = replace(config, widths=[32], budgets=config.budgets[:1])
    sweep(small)
    store = write_store(tmp_path / "more", 900, seed=5)
    with pytest.raises(InputError, match="other activations"):
        sweep(replace(small, store=store, heldout=store))


def test_several_layers_are_measured_at_one(config, tmp_path):
    store = write_store(tmp_path / "several", 300, seed=0, layers=(0, 1))
    result = sweep(replace(config, store=store, heldout=store, layer=0, widths=[32], budgets=[BATCH]))
    assert result["hookpoint"]["layer"] == 0 and result["runs"][0]["frechet"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "widths must name each value once and at least one"),
        ({"budgets": [1024, 1024]}, "budgets must name each value once"),
        ({"blocks": [0]}, "blocks must be positive"),
        ({"widths": [33]}, "must be even"),
        ({"budgets": [1000]}, "budget 1000 is not a multiple of the recipe's batch of 1024"),
        ({"preset": "qick"}, "did you mean 'quick'"),
        ({"recipe": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"samples": 0}, "samples must be positive"),
        ({"width": [32]}, "did you mean 'widths'"),
    ],
)
def test_bad_configuration_takes_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        from_dict(SweepConfig, {"store": "s", "heldout": "h", "output": "o"} | changes)
    assert "\n" not in str(error.value)
