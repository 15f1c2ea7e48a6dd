from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from conftest import build_glp, build_llm, build_tokenizer
from latentprior.config import ProbeConfig
from latentprior.lm.hooks import Hookpoint
from latentprior.probe import experiment as module
from latentprior.probe.experiment import benchmark
from latentprior.probe.recording import record_texts
from latentprior.probe.sources import meta_neurons, sources_of
from latentprior.report import write_report
from latentprior.sae.sae import SAE
from latentprior.utils.errors import InputError


@pytest.fixture
def bench(tmp_path):
    """A configuration with two tasks of 130 rows and two priors, and a tiny model whose loads are counted."""
    rng = np.random.default_rng(0)
    words = [["red", "green", "blue"], ["one", "two", "three"]]
    for name in ("colours", "again"):
        rows = [
            f'"{" ".join(rng.choice(words[i % 2], 4))} {name} {i}",{("number", "colour")[i % 2 == 0]}'
            for i in range(130)
        ]
        (tmp_path / f"{name}.csv").write_text("prompt,target\n" + "\n".join(rows) + "\n")
    for name, seed in (("a", 0), ("b", 1)):
        glp = build_glp(model="tiny", seed=seed)
        glp.provenance["training"] = {"heldout_loss": 1.0 + seed, "activations": 1000 * (seed + 1)}
        glp.save_pretrained(tmp_path / name)
    model = build_llm()
    model.config._name_or_path = "tiny"
    loads = []

    def llm():
        loads.append(1)
        return model, build_tokenizer()

    config = ProbeConfig(
        output=str(tmp_path / "run"),
        tasks=[str(tmp_path / "colours.csv"), str(tmp_path / "again.csv")],
        priors=[str(tmp_path / "a"), str(tmp_path / "b")],
        times=[0.1, 0.6],
        candidates=16,
        folds=2,
        sparse=[1, 2],
    )
    return config, llm, loads


def test_a_run_says_everything_and_is_drawn(bench, tmp_path):
    config, llm, _ = bench
    result = benchmark(config, llm)
    names = ["layer", "rotation", "mlp-neurons", "random-denoiser", "meta-neurons", f"meta-neurons: {tmp_path / 'b'}"]
    assert [source["name"] for source in result["sources"]] == names
    assert [source["units"] for source in result["sources"]] == [32, 32, 2 * 64, 2 * 128, 2 * 128, 2 * 128]
    summary = result["summary"]
    scores = {(row["source"], row["selection"]): row for row in summary["scores"]}
    assert len(scores) == 3 * len(names)
    assert all(
        0 <= row["auc"] <= 1 and row["interval"][0] <= row["auc"] <= row["interval"][1] for row in scores.values()
    )
    assert scores["layer", "screened"]["auc"] > 0.7  # the words are easy to tell apart, even untrained
    assert [row["b"] for row in summary["paired"] if row["selection"] == "screened"] == [
        n for n in names if n != "meta-neurons"
    ]
    assert np.shape(summary["grid"]["auc"]) == (2, 2)
    assert len(summary["mlp_blocks"]) == 2
    assert [row["heldout_loss"] for row in summary["scaling"]] == [1.0, 2.0]
    assert {row["k"] for row in summary["sparse"]} == {1, 2, None}
    folder = tmp_path / "run"
    assert json.loads((folder / "probe.json").read_text())["summary"] == json.loads(json.dumps(summary))
    table = pq.read_table(folder / "probes.parquet")
    assert len(table) == 2 * 3 * len(names) == len(pyarrow.csv.read_csv(folder / "probes.csv"))
    winners = pq.read_table(folder / "winners.parquet").to_pylist()
    assert {(row["task"], row["source"]) for row in winners} == {(t, s) for t in ("colours", "again") for s in names}
    assert all(row["rank"] == place % 20 for place, row in enumerate(winners))
    best = [row for row in winners if row["rank"] == 0 and row["source"] == "meta-neurons"]
    chosen = table.filter(pyarrow.compute.field("selection") == "all").to_pylist()
    chosen = [row for row in chosen if row["source"] == "meta-neurons"]
    assert [(r["block"], r["index"], r["test_auc"]) for r in best] == [
        (r["block"], r["index"], r["test_auc"]) for r in chosen
    ]
    assert "Meta-neurons" in write_report(result, folder / "report.html").read_text()


def test_the_same_call_continues_and_records_nothing_twice(bench, monkeypatch):
    config, llm, loads = bench
    first = benchmark(dataclasses.replace(config, tasks=config.tasks[:1]), llm)
    both = benchmark(config, llm)
    assert len(loads) == 2  # the second task's texts were new
    again = benchmark(config, llm)
    assert len(loads) == 2
    assert again["summary"] == both["summary"] and again["rows"][0] == first["rows"][0]
    fresh = benchmark(
        dataclasses.replace(config, output=config.output + "2", recording=config.output + "/recording"), llm
    )
    assert len(loads) == 2 and fresh["summary"] == both["summary"]


def test_one_failing_task_loses_nothing(bench, monkeypatch, tmp_path):
    config, llm, _ = bench
    (tmp_path / "small.csv").write_text("prompt,target\na,1\nb,0\n")
    (tmp_path / "one.csv").write_text("prompt,target\n" + "".join(f"text {i},1\n" for i in range(150)))
    real = module.probe_task

    def failing(task, *arguments):
        if task.name == "colours":
            raise InputError("features to be probed must be finite")
        return real(task, *arguments)

    monkeypatch.setattr(module, "probe_task", failing)
    result = benchmark(
        dataclasses.replace(config, tasks=[*config.tasks, str(tmp_path / "small.csv"), str(tmp_path / "one.csv")]), llm
    )
    reasons = {entry["task"].rpartition("/")[2]: entry["reason"] for entry in result["skipped"]}
    assert "fewer than 120" in reasons["small.csv"] and "two distinct targets" in reasons["one.csv"]
    assert "finite" in reasons["colours"]
    assert [task["name"] for task in result["tasks"]] == ["again"]
    monkeypatch.undo()
    assert [task["name"] for task in benchmark(config, llm)["tasks"]] == ["colours", "again"]


def test_the_rank_statistics_pick_what_the_fitted_reference_picks(bench):
    config, llm, _ = bench
    config = dataclasses.replace(
        config,
        tasks=config.tasks[:1],
        priors=config.priors[:1],
        sources=["layer", "meta-neurons"],
        times=[],
        sparse=[],
        dense=False,
        candidates=8,
    )
    ranked = benchmark(config, llm)
    fitted = benchmark(dataclasses.replace(config, method="logistic", output=config.output + "2"), llm)
    for a, b in zip(ranked["rows"], fitted["rows"], strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-9)


def test_permuted_labels_carry_no_information(bench):
    config, llm, _ = bench
    config = dataclasses.replace(
        config, tasks=config.tasks[:1], priors=config.priors[:1], times=[], sparse=[], dense=False
    )
    picked = []
    for seed in range(12):
        result = benchmark(
            dataclasses.replace(config, seed=seed, output=f"{config.output}{seed}", recording=config.output), llm
        )
        picked += [
            row["auc"]
            for row in result["summary"]["scores"]
            if (row["source"], row["selection"]) == ("layer", "chance")
        ]
    assert abs(np.mean(picked) - 0.5) < 0.15


def test_sources_are_what_they_say(bench):
    config, llm, _ = bench
    model, tokenizer = llm()
    texts = ["red green", "one two three", "blue"]
    recording = record_texts(model, tokenizer, texts, Hookpoint.of(model, 1), config.output)
    glp = build_glp(model="tiny")
    eye = torch.eye(32)
    sae = SAE.of(eye, torch.zeros(32), eye, torch.zeros(32), recording.hookpoint, threshold=torch.zeros(32))
    latents = sources_of(dataclasses.replace(config, sae="there"), recording, {"p": glp}, sae)[3]
    assert latents.name == "sae" and torch.equal(latents.features(texts), recording.output(texts).float().relu())
    config = dataclasses.replace(config, noises=3)
    sources = {source.name: source for source in sources_of(config, recording, {"p": glp})}
    x = recording.output(texts).float()
    assert torch.equal(sources["layer"].features(texts), x)
    rotated = sources["rotation"].features(texts)
    torch.testing.assert_close(rotated @ rotated.T, x @ x.T)
    units = sources["meta-neurons"].features(texts)
    assert units.shape == (3, sources["meta-neurons"].units)
    alone = sources["meta-neurons"].features(texts[1:2])
    torch.testing.assert_close(units[1:2], alone)  # shared noise: the activation alone decides
    own = meta_neurons(dataclasses.replace(config, noise="own"), recording, glp, "p").features
    assert not torch.allclose(own(texts)[1:2], own(texts[1:2]))
    both = meta_neurons(dataclasses.replace(config, t=[0.1, 0.7]), recording, glp, "p")
    assert torch.equal(both.features(texts)[:, : units.shape[1]], units)
    late = meta_neurons(config, recording, glp, "p", t=0.7).features(texts)
    assert torch.equal(both.features(texts)[:, units.shape[1] :], late)
    assert [both.locate(unit) for unit in (0, 130, 256 + 129)] == [(0.1, 0, 0), (0.1, 1, 2), (0.7, 1, 1)]
    before = torch.get_rng_state()
    again = {source.name: source for source in sources_of(config, recording, {"p": glp})}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again["random-denoiser"].features(texts), sources["random-denoiser"].features(texts))
    assert not torch.allclose(sources["random-denoiser"].features(texts), units)


def test_what_does_not_belong_together_is_refused(bench, tmp_path):
    config, llm, loads = bench
    build_glp(layers=(2,), model="tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="tiny layer 2 .* tiny layer 1"):
        benchmark(dataclasses.replace(config, priors=[config.priors[0], str(tmp_path / "other")]), llm)
    nowhere = [str(tmp_path / "none")]  # tasks come before priors, which come before the language model
    with pytest.raises(InputError, match="none.csv.*no such file"):
        benchmark(dataclasses.replace(config, tasks=[*config.tasks, "none.csv"], priors=nowhere), llm)
    with pytest.raises(InputError, match="colours.csv 'promt'.*'prompt'"):
        benchmark(dataclasses.replace(config, text_column="promt", priors=nowhere), llm)
    with pytest.raises(InputError, match="cfg.json is missing"):
        benchmark(dataclasses.replace(config, sae=config.priors[0]), llm)
    eye = torch.eye(32)
    parts = (eye, torch.zeros(32), 2 * eye, torch.ones(32))
    SAE.of(*parts, Hookpoint("tiny", 3, 32), k=4).save(tmp_path / "sae")
    with pytest.raises(InputError, match="layer 3 .* tiny layer 1"):
        benchmark(dataclasses.replace(config, sae=str(tmp_path / "sae")), llm)
    assert not loads and not (tmp_path / "run").exists()
    benchmark(config, llm)
    with pytest.raises(InputError, match="candidates is 16"):
        benchmark(dataclasses.replace(config, candidates=8), llm)
    with pytest.raises(InputError, match="tiny layer 1 .* tiny layer 2"):
        benchmark(
            dataclasses.replace(
                config,
                priors=[str(tmp_path / "other")],
                output=str(tmp_path / "new"),
                recording=config.output + "/recording",
            ),
            llm,
        )
    (tmp_path / "run" / "tasks" / "again.json").write_text('{"task"')
    assert "damaged" in benchmark(config, llm)["skipped"][0]["reason"]
