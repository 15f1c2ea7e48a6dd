"""The benchmarks for a GPU: their dry run passes, failures are recorded, and a prior's parts make the prior again."""

from __future__ import annotations

import json
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from latentprior import GLP, InputError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def words(tmp_path, sentences) -> str:
    """A text of 400 documents, some of which are held out."""
    draw = random.Random(0)
    vocabulary = " ".join(sentences).split()
    path = tmp_path / "words.jsonl"
    lines = (json.dumps({"text": " ".join(draw.choices(vocabulary, k=12))}) for _ in range(400))
    path.write_text("\n".join(lines))
    return str(path)


def results(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["results"]


@pytest.mark.slow
def test_the_dry_run_measures_every_part(gpu, tmp_path, llm_folder, words):
    output = tmp_path / "results"
    arguments = ["--dry-run", "--llm", llm_folder, "--text", words, "--layer", "2", "--output", str(output)]
    assert gpu.main([*arguments, "--work", str(tmp_path / "work")]) == 0
    found = results(output)
    for shape in ("36M", "0.5B", "3.4B"):
        for how in ("compiled", "eager"):
            training = found[f"training/{shape}/{how}"]
            assert training["compiled"] == (how == "compiled")
            assert training["loss"]["ours"] == pytest.approx(training["loss"]["plain"], rel=1e-3)
            assert 0 < training["mfu"]["ours"] < 1 and training["ratio"] > 0
        assert found[f"training/{shape}/float8"].keys() == {"skipped", "part_seconds"}
        assert found[f"sampling/{shape}"]["projection_ms"] > 0
    assert found["recording"]["difference"] < 0.01
    assert set(found["steering"]["tokens_per_second"]) >= {"plain", "steered", "repaired 4", "paired 4", "repaired 20"}
    assert found["stream"]["activations"] == 512 and found["stream"]["seconds"].keys() > {"llm", "buffer", "training"}
    assert found["commands"]["seconds"].keys() > {"record", "train", "evaluate", "probe", "neurons", "sweep"}
    prior = found["prior"]
    assert prior["distribution"]["frechet"]["standardised"].keys() == {"prior", "real"}
    assert prior["delta_lm"]["delta"].keys() == {"prior", "gaussian", "noise"}
    assert GLP.from_pretrained(tmp_path / "work" / "parts").hookpoints[0].layer == 2


@pytest.mark.slow
def test_an_error_is_recorded_and_makes_the_exit_status(gpu, tmp_path):
    arguments = ["--dry-run", "--llm", str(tmp_path / "nowhere"), "--output", str(tmp_path / "results")]
    assert gpu.main([*arguments, "--only", "recording", "sampling/36M"]) == 1
    found = results(tmp_path / "results")
    assert found["recording"]["error"].startswith("InputError: no such model")
    assert found["sampling/36M"]["ratio"] > 0
    with pytest.raises(InputError, match="unknown part 'samplings'"):
        gpu.main([*arguments, "--only", "samplings"])


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_part_with_it(gpu):
    kept = {}
    parts = {"dies": gpu.Part(partial(os._exit, 3), {}), "after": gpu.Part(dict, {"ratio": 2.0})}
    gpu.run_parts(parts, 120, True, kept.__setitem__)
    assert kept["dies"]["error"] == "its process died: exit code 3"
    assert kept["after"]["ratio"] == 2.0


def test_a_part_that_runs_out_of_time_is_ended_and_the_rest_skipped(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.1)
    kept, hangs = {}, gpu.Part(partial(time.sleep, 600), {})
    gpu.run_parts({"absent": "no such chip", "hangs": hangs, "after": hangs}, 0.5, True, kept.__setitem__)
    assert kept["absent"]["skipped"] == "no such chip"
    assert kept["hangs"]["error"].startswith("not done in the")
    assert kept["after"]["skipped"] == "no time was left"


def test_parts_of_a_prior_make_the_prior_again(gpu, tmp_path, tiny_glp):
    from bench_prior import join_weights, split_weights

    tiny_glp().save_pretrained(tmp_path / "prior")
    sizes = split_weights(tmp_path / "prior", tmp_path / "parts", most_bytes=20_000)
    assert len(sizes) > 2 and max(sizes.values()) < 30_000
    with pytest.raises(InputError, match="no readable prior"):
        GLP.from_pretrained(tmp_path / "parts")
    join_weights(tmp_path / "parts")
    joined = GLP.from_pretrained(tmp_path / "parts").state_dict()
    expected = tiny_glp().cast(torch.bfloat16).state_dict()
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected if "norm" not in name)

    (tmp_path / "parts" / min(sizes)).unlink()
    with pytest.raises(InputError, match="does not hold all parts"):
        join_weights(tmp_path / "parts")
