from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from conftest import build_glp, build_llm, build_tokenizer
from latentprior.config import DenoiserConfig, ProbeConfig
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.probe import experiment as module
from latentprior.probe.benchmark import probe_task
from latentprior.probe.experiment import benchmark
from latentprior.probe.recording import record_texts
from latentprior.probe.sources import Draws, Source, equal_draws, meta_neurons, sources_of
from latentprior.probe.tasks import Task
from latentprior.report import write_report
from latentprior.sae.sae import SAE
from latentprior.utils.errors import InputError

DRAWN = "mlp-neurons-drawn"


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


@pytest.fixture
def fewer(bench, tmp_path):
    """`bench` with one prior, of 48 meta-neurons beside 128 MLP neurons, and nothing but one-unit probes."""
    config, llm, loads = bench
    like = build_glp(model="tiny")
    narrow = Denoiser(DenoiserConfig(32, 16, 24, 2)).eval().requires_grad_(False)
    GLP(narrow, like.normalizer, like.hookpoints).save_pretrained(tmp_path / "narrow")
    changes = {"priors": [str(tmp_path / "narrow")], "times": [], "sparse": [], "dense": False}
    return dataclasses.replace(config, **changes), llm, loads


def synthetic(features: int = 60) -> tuple[Task, Source]:
    """A task of 160 texts, numbers, and a source of three blocks that looks their features up."""
    generator = torch.Generator().manual_seed(3)
    labels = np.arange(160) % 2
    x = torch.randn(160, features, generator=generator)
    x[torch.from_numpy(labels) == 1] += torch.linspace(0, 0.4, features)
    x[:, ::7] = x[:, ::7].round()
    texts = [str(i) for i in range(160)]
    task = Task("numbers", "own", texts, labels, np.arange(100), np.arange(100, 160))
    return task, Source("mlp-neurons", "MLP", "mlp", lambda texts: x[list(map(int, texts))], 3, features // 3)


def rows_of(result, source, draw=None):
    found = [row for row in result["rows"] if row["source"] == source and row.get("draw") == draw]
    return {row["selection"]: {k: v for k, v in row.items() if k not in ("source", "draw")} for row in found}


@pytest.mark.parametrize("method", ["rank", "logistic"])
def test_a_draw_is_the_protocol_on_its_features_alone(fewer, method):
    config = dataclasses.replace(fewer[0], candidates=4, method=method)
    task, source = synthetic(21 if method == "logistic" else 60)
    every = Draws(DRAWN, "all", source, source.units, 2, 0)
    result = probe_task(task, [source], [], config, every)
    alone = probe_task(task, [source], [], config)
    assert len(rows_of(result, DRAWN, 0)) == {"rank": 3, "logistic": 1}[method]
    assert rows_of(result, DRAWN, 0) == rows_of(result, DRAWN, 1) == rows_of(result, "mlp-neurons")
    some = Draws(DRAWN, "some", source, 11, 3, 0)
    result = probe_task(task, [source], [], config, some)
    for name in ("winners", "blocks"):
        assert result[name] == alone[name]
    assert rows_of(result, "mlp-neurons") == rows_of(alone, "mlp-neurons")
    for draw, subset in enumerate(some.subsets()):
        units = subset.nonzero().squeeze(1)
        sliced = Source("sliced", "s", "mlp", lambda texts, units=units: source.features(texts)[:, units], 1, 11)
        expected = rows_of(probe_task(task, [sliced], [], config), "sliced")
        for row in expected.values():
            _, row["block"], row["index"] = source.locate(int(units[row["index"]]))
        assert rows_of(result, DRAWN, draw) == expected


def test_draws_are_of_all_blocks_and_do_not_depend_on_their_number(fewer):
    source = synthetic()[1]
    prior = Source("meta-neurons", "Meta-neurons", "prior", source.features, 1, 20, (0.1, 0.5))
    draws = equal_draws(dataclasses.replace(fewer[0], mlp_draws=5), [source, prior])
    assert draws and (draws.size, draws.number) == (40, 5)  # a unit counts once at each noise level
    subsets = draws.subsets()
    assert subsets.sum(dim=1).tolist() == [40] * 5 and len({tuple(row.tolist()) for row in subsets}) == 5
    assert (subsets.view(5, 3, 20).sum(dim=2) > 0).all()
    assert torch.equal(subsets[:2], dataclasses.replace(draws, number=2).subsets())
    assert not torch.equal(subsets, dataclasses.replace(draws, seed=draws.seed + 1).subsets())
    config, as_many = fewer[0], dataclasses.replace(prior, width=30)
    assert equal_draws(dataclasses.replace(config, mlp_draws=0), [source, prior]) is None
    assert all(equal_draws(config, sources) is None for sources in ([source], [prior], [source, as_many]))


def test_a_run_compares_as_many_mlp_neurons(fewer, tmp_path):
    config, llm, _ = fewer
    result = benchmark(config, llm)
    names = [source["name"] for source in result["sources"]]
    assert names == ["layer", "rotation", "mlp-neurons", DRAWN, "random-denoiser", "meta-neurons"]
    drawn = result["sources"][3]
    assert (drawn["units"], drawn["draws"], drawn["kind"]) == (48, 10, "mlp")
    assert drawn["label"] == "MLP neurons, as many as meta-neurons (10 draws)"
    table = pq.read_table(tmp_path / "run" / "probes.parquet").to_pylist()
    picked = [row for row in table if (row["source"], row["selection"]) == (DRAWN, "screened")]
    aucs = np.array([[r["test_auc"] for r in picked if r["task"] == task] for task in ("colours", "again")])
    assert aucs.shape == (2, 10) and [row["draw"] for row in picked] == 2 * [*range(10)]
    assert {row["draw"] for row in table if row["source"] != DRAWN} == {None}
    assert [row["scores"][DRAWN] for row in result["rows"]] == pytest.approx(aucs.mean(axis=1))
    assert [row["sd"][DRAWN] for row in result["rows"]] == pytest.approx(aucs.std(axis=1, ddof=1))
    scores = {(row["source"], row["selection"]): row for row in result["summary"]["scores"]}
    score, means = scores[DRAWN, "screened"], aucs.mean(axis=0)
    assert score["auc"] == pytest.approx(aucs.mean()) and score["interval"][0] <= score["auc"] <= score["interval"][1]
    assert score["draws"] == pytest.approx({
        "number": 10, "sd": means.std(ddof=1), "sd_within_task": aucs.std(axis=1, ddof=1).mean(),
        "lowest": means.min(), "highest": means.max(),
    })  # fmt: skip
    assert "draws" not in scores["mlp-neurons", "screened"]
    (row,) = [r for r in result["summary"]["paired"] if (r["b"], r["selection"]) == (DRAWN, "screened")]
    meta = np.array([task["scores"]["meta-neurons"] for task in result["rows"]])
    assert row["difference"] == pytest.approx((meta - aucs.mean(axis=1)).mean())
    assert (row["wins"], row["tasks"]) == ((meta > aucs.mean(axis=1) + 1e-12).sum(), 2)
    assert {row["source"] for row in pq.read_table(tmp_path / "run" / "winners.parquet").to_pylist()} == {
        name for name in names if name != DRAWN
    }
    assert drawn["label"] in write_report(result, tmp_path / "report.html").read_text()


def test_a_finished_run_gets_the_draws_that_it_lacks(fewer, monkeypatch):
    config, llm, loads = fewer
    fresh = benchmark(config, llm)
    older = dataclasses.replace(config, output=config.output + "2", recording=config.output + "/recording")
    without = benchmark(dataclasses.replace(older, mlp_draws=0), llm)
    assert DRAWN not in {row["source"] for row in without["summary"]["scores"]}
    assert all("sd" not in row and DRAWN not in row["scores"] for row in without["rows"])
    monkeypatch.setattr(module, "probe_task", lambda *_: pytest.fail("a finished task was probed again"))
    benchmark(dataclasses.replace(older, mlp_draws=3), llm)
    for number, expected in ((10, fresh), (0, without), (10, fresh)):
        again = benchmark(dataclasses.replace(older, mlp_draws=number), llm)
        assert (again["summary"], again["rows"]) == (expected["summary"], expected["rows"])
    assert len(loads) == 1


def test_one_draw_of_one_task_has_no_spread(fewer):
    config, llm, _ = fewer
    result = benchmark(dataclasses.replace(config, mlp_draws=1, tasks=config.tasks[:1]), llm)
    (score,) = [r for r in result["summary"]["scores"] if (r["source"], r["selection"]) == (DRAWN, "screened")]
    assert score["interval"] is None and (score["draws"]["sd"], score["draws"]["sd_within_task"]) == (None, None)
    assert score["draws"]["lowest"] == score["draws"]["highest"] == score["auc"]
