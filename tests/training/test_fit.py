"""A whole run in a folder: the prior it leaves, its checkpoints and log, and that no interruption changes any of it."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from latentprior.config import TrainConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.training import logger, trainer
from latentprior.training.checkpoint import complete_states
from latentprior.training.fit import fit
from latentprior.training.loop import Diverged
from latentprior.training.loss import BINS, heldout_loss
from latentprior.training.tracking import read_log
from latentprior.training.trainer import FIRST_CHECKPOINT, _passes_checkpoint
from latentprior.utils.errors import InputError
from latentprior.utils.locks import LOCK

WIDTH = 4
BATCH = 4096
STEPS = 36  # past two checkpoints, at 65,536 and 131,072 activations


def write_store(folder: Path, *, layers: tuple[int, ...] = (1,), rows: int = 5000, seed: int = 0, model: str = "tiny"):
    """A store of correlated Gaussian rows, `rows` for each layer."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * len(layers)
    x = 3 + torch.randn(n, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    index = torch.arange(n)
    batch = ActivationBatch(
        x=x, layer=torch.tensor(layers).repeat_interleave(rows), doc=index, position=index, token=index
    )
    hookpoints = [Hookpoint(model=model, layer=layer, width=WIDTH) for layer in layers]
    with StoreWriter(folder, hookpoints, dtype="float32", source={"corpus": "tiny", "blocks": 4}) as writer:
        for i, chosen in enumerate(layers):
            writer.moments.median_norm[i] = batch.at_layer(chosen).norms().median()
        writer.append(batch, next_batch=1, left_out={})
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return {"store": write_store(folder / "train"), "heldout": write_store(folder / "heldout", rows=300, seed=1)}


@pytest.fixture
def config(tmp_path, stores) -> TrainConfig:
    return TrainConfig.of(
        **stores,
        output=str(tmp_path / "prior"),
        activations=STEPS * BATCH,
        preset="quick",
        recipe={"batch_size": BATCH, "learning_rate": 1e-2, "ema": 0.9},
        blocks=1,
        d_model=8,
        d_mlp=8,
        precision="float32",
        micro_batch=BATCH // 2,
        log_every=1,
        save_seconds=0.0,
        seed=3,
    )


def short(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A run of 6 small steps."""
    recipe = {"batch_size": 128, "learning_rate": 1e-2, "ema": 0.9} | changes.pop("recipe", {})
    return config.changed(activations=6 * 128, recipe=recipe, micro_batch=None, **changes)


def weights(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every prior below a run's folder."""
    found = (p for p in Path(folder).rglob("model.safetensors") if "steps" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in ("per_second", "measured_peak_share")}
        for line in read_log(Path(folder) / "log.jsonl")
    ]


# --- What a run leaves


def test_a_run_leaves_a_prior_checkpoints_and_a_log(config):
    seen: list[tuple] = []
    state = torch.get_rng_state()
    glp = fit(config, report=lambda done, total, figures: seen.append((done, total, dict(figures))))
    assert torch.equal(torch.get_rng_state(), state)
    output = Path(config.run.output)

    loaded = GLP.from_pretrained(output)
    for name, value in glp.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert not any(p.requires_grad for p in glp.parameters()) and not glp.training
    assert loaded.hookpoints == (Hookpoint(model="tiny", layer=1, width=WIDTH),)
    assert loaded.denoiser.config.d_mlp == 8 and loaded.denoiser.config.multi_layer_n_layers is None
    moments = ActivationStore(config.store.path).moments()
    torch.testing.assert_close(loaded.normalizer.mean.double(), moments.mean)
    torch.testing.assert_close(loaded.normalizer.var.double(), moments.variance())
    assert loaded.provenance["source"]["corpus"] == "tiny"
    assert loaded.provenance["training"]["activations"] == STEPS * BATCH
    assert loaded.provenance["training"]["distinct"] == 5000
    assert loaded.provenance["versions"].keys() >= {"latentprior", "torch", "python"}

    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["131072", "65536"]
    losses = {name: heldout(GLP.from_pretrained(output, checkpoint=name), config) for name in ("65536", "131072")}
    losses["final"] = heldout(loaded, config)
    logged = {line["activations"]: line for line in log_of(output) if "heldout_loss" in line}
    assert sorted(logged) == [0, 65536, 131072, STEPS * BATCH]
    assert losses["65536"] == pytest.approx(logged[65536]["heldout_loss"], rel=1e-5)
    assert losses["131072"] == pytest.approx(logged[131072]["heldout_loss"], rel=1e-5)
    assert losses["final"] == pytest.approx(logged[STEPS * BATCH]["heldout_loss"], rel=1e-5)
    assert losses["final"] < logged[0]["heldout_loss"] and len(logged[0]["heldout_loss_by_t"]) == BINS

    steps = [line["step"] for line in log_of(output) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert all(line["activations"] == line["step"] * BATCH for line in log_of(output))
    assert [done for done, _, _ in seen] == [step * BATCH for step in steps]
    assert {total for _, total, _ in seen} == {STEPS * BATCH}
    assert seen[-1][2] == {"loss": log_of(output)[-2]["loss"], "held-out": logged[STEPS * BATCH]["heldout_loss"]}

    result = json.loads((output / "train.json").read_text())
    assert result.keys() >= {"kind", "config", "settings", "versions", "git", "seed", "wall_seconds", "summary"}
    assert result["kind"] == "train" and result["seed"] == 3 and result["config"]["blocks"] == 1
    assert result["summary"]["heldout_loss"] == logged[STEPS * BATCH]["heldout_loss"]


def heldout(glp: GLP, config: TrainConfig) -> float:
    """The loss of a saved prior on the held-out rows of the run."""
    x, layer = next(ActivationStore(config.store.heldout).batches(300, seed=0))
    return heldout_loss(glp.denoiser, glp.normalizer, x, layer)[0]


def test_the_average_is_saved_and_not_the_last_weights(config):
    averaged = fit(short(config))
    plain = fit(short(config, output=config.run.output + "-plain", recipe={"ema": None}))
    assert not torch.equal(averaged.denoiser.in_proj.weight, plain.denoiser.in_proj.weight)
    torch.default_generator.manual_seed(config.run.seed)
    start = Denoiser(config.prior.denoiser(WIDTH)).in_proj.weight
    moved = (averaged.denoiser.in_proj.weight - start).norm(), (plain.denoiser.in_proj.weight - start).norm()
    assert 0 < moved[0] < moved[1]


def test_a_log_line_is_the_mean_of_the_steps_since_the_last(config):
    fit(short(config, heldout=None))
    fit(short(config, heldout=None, output=config.run.output + "-4", log_every=4))
    each = [line["loss"] for line in log_of(config.run.output)]
    lines = log_of(config.run.output + "-4")
    assert [line["step"] for line in lines] == [4, 6]
    assert lines[0]["loss"] == pytest.approx(sum(each[:4]) / 4) and lines[1]["loss"] == pytest.approx(sum(each[4:]) / 2)
    assert weights(config.run.output) == weights(config.run.output + "-4")


def test_several_layers(config, tmp_path):
    store = write_store(tmp_path / "several", layers=(0, 2), rows=400)
    glp = fit(short(config, store=store, heldout=store))
    assert glp.denoiser.config.multi_layer_n_layers == 4
    assert glp.normalizer.layers.tolist() == [0, 2]
    loaded = GLP.from_pretrained(config.run.output)
    assert not torch.equal(loaded.sample(3, layer=0, generator=0), loaded.sample(3, layer=2, generator=0))


def test_the_seed_decides(config):
    first, same, other = (
        fit(short(config, output=f"{config.run.output}-{i}", seed=seed)).denoiser.in_proj.weight
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_checkpoints_are_due_at_doublings():
    due = [done for done in range(1000, 40 * FIRST_CHECKPOINT // 10, 1000) if _passes_checkpoint(done - 1000, done)]
    assert [done // FIRST_CHECKPOINT for done in due] == [1, 2]
    assert _passes_checkpoint(0, 10 * FIRST_CHECKPOINT) and not _passes_checkpoint(FIRST_CHECKPOINT, 70_000)


def test_checkpoints_are_due_once_each(config, monkeypatch):
    monkeypatch.setattr(trainer, "FIRST_CHECKPOINT", 100)
    fit(short(config))  # steps of 128: 100 is first reached by 128, 200 by 256, 400 by 512; 800 never
    names = sorted(path.name for path in Path(config.run.output, "checkpoints").iterdir())
    assert names == ["128", "256", "512"]


# --- Interruptions


def assert_same_run(folder: str, whole: str) -> None:
    assert weights(folder) == weights(whole) and len(weights(whole)) == 3
    assert log_of(folder) == log_of(whole)
    for name in ("config.json", "checkpoints/65536/config.json"):
        assert Path(folder, name).read_text() == Path(whole, name).read_text()
    results = [json.loads(Path(path, "train.json").read_text()) for path in (folder, whole)]
    assert results[0]["summary"] == results[1]["summary"]
    assert not list(Path(folder).rglob("*.partial"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """Folder of the run that is never interrupted."""
    return str(tmp_path_factory.mktemp("whole") / "prior")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_between_any_two_changes_of_the_disk(config, whole, run_killed, seed):
    fit(config.changed(output=whole))  # the second time, the finished run is opened
    draws, kills, steps = random.Random(seed), 0, [0]
    while not run_killed(fit, config, changes=draws.randint(20, 120)):
        kills += 1
        states = complete_states(Path(config.run.output) / "steps")
        steps.append(int(states[-1].name) if states else 0)
        # What is visible is whole.
        for checkpoint in Path(config.run.output).glob("checkpoints/*/README.md"):
            GLP.from_pretrained(checkpoint.parent)
    assert kills >= 3 and steps == sorted(steps) and len(set(steps)) > 2
    assert_same_run(config.run.output, whole)


def test_killed_at_random_times(config, whole, run_killed):
    fit(config.changed(output=whole))
    draws = random.Random(0)
    for _ in range(4):
        run_killed(fit, config, seconds=draws.uniform(0.2, 1.0))
    fit(config)
    assert_same_run(config.run.output, whole)


def test_killed_after_the_last_state(config, whole, monkeypatch):
    """The weights are done, but the prior is not written yet."""
    fit(config.changed(output=whole))
    fit(config)
    for name in ("train.json", "model.safetensors", "config.json", "README.md"):
        Path(config.run.output, name).unlink()
    monkeypatch.setattr(trainer, "save_state", lambda *_: pytest.fail("a step was done again"))
    fit(config)
    assert_same_run(config.run.output, whole)


def test_the_rate_of_a_continued_run_is_its_own(config, run_killed, monkeypatch):
    clock = iter(range(10**6))
    assert not run_killed(fit, config, changes=300)
    before = int(complete_states(Path(config.run.output) / "steps")[-1].name)
    monkeypatch.setattr(logger.time, "perf_counter", lambda: float(next(clock)))
    fit(config)
    first = next(line for line in read_log(Path(config.run.output) / "log.jsonl") if line["step"] == before + 1)
    assert first["per_second"] <= BATCH


def test_a_finished_run_is_opened(config, whole):
    fit(config.changed(output=whole))
    before = {p: p.stat().st_mtime_ns for p in Path(whole).rglob("*")}
    again = fit(config.changed(output=whole), report=lambda *_: pytest.fail("it trained again"))
    assert torch.equal(again.denoiser.in_proj.weight, GLP.from_pretrained(whole).denoiser.in_proj.weight)
    assert {p: p.stat().st_mtime_ns for p in Path(whole).rglob("*")} == before


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_by_name(config, stores, tmp_path, run_killed, finished):
    config = short(config)
    if finished:
        fit(config)
    else:
        assert not run_killed(fit, config, changes=41)
        (Path(config.run.output) / LOCK).unlink()  # the killed process's
    before = {p: p.read_bytes() for p in Path(config.run.output).rglob("*") if p.is_file()}
    other = write_store(tmp_path / "other", seed=9)
    for change, name in [
        ({"seed": 4}, "seed is 3 .* and 4 now"),
        ({"activations": 5000}, "activations is 768 .* and 5000 now"),
        ({"recipe": config.recipe | {"learning_rate": 0.5}}, r"recipe\.learning_rate is 0.01 .* and 0.5 now"),
        ({"blocks": 2}, "blocks is 1 .* and 2 now"),
        ({"precision": "bfloat16"}, "precision is 'float32' .* and 'bfloat16' now"),
        ({"store": other}, "store is '[0-9a-f]{64}'"),
        ({"store": stores["heldout"]}, "store is '[0-9a-f]{64}'"),
    ]:
        with pytest.raises(InputError, match=f"holds a (finished )?run with other settings: {name}") as caught:
            fit(config.changed(**change))
        assert "\n" not in str(caught.value) and "choose another --output" in str(caught.value)
    assert {p: p.read_bytes() for p in Path(config.run.output).rglob("*") if p.is_file()} == before


def test_what_does_not_decide_the_weights_may_change(config, run_killed, tmp_path, stores):
    assert not run_killed(fit, config, changes=200)
    moved = tmp_path / "moved"
    Path(config.run.output).rename(moved)
    glp = fit(config.changed(output=str(moved), log_every=7, save_seconds=60.0, heldout_activations=10))
    fit(config)
    assert torch.equal(glp.denoiser.in_proj.weight, GLP.from_pretrained(config.run.output).denoiser.in_proj.weight)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_no_pickle_in_a_run_is_executed(config, whole, run_killed, tmp_path):
    fit(config.changed(output=whole))
    assert not run_killed(fit, config, changes=200)
    payload, steps = pickle.dumps(Malicious(tmp_path / "executed")), Path(config.run.output) / "steps"
    (steps / "999.partial").mkdir()
    for folder in (steps, *steps.iterdir()):
        for name in (".metadata", "__0_0.distcp", "state.pt"):
            if folder.is_dir():
                (folder / name).write_bytes(payload)
    fit(config)
    assert_same_run(config.run.output, whole)
    assert not (tmp_path / "executed").exists()


# --- Bad input


def test_a_run_that_diverges_keeps_its_last_state(config):
    config = short(config, recipe={"learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(Diverged, match="^step 1: loss"):
        fit(config)
    assert [path.name for path in complete_states(Path(config.run.output) / "steps")] == ["1"]
    assert (
        not Path(config.run.output, "model.safetensors").exists() and not Path(config.run.output, "train.json").exists()
    )


def test_bad_input_is_one_line_and_makes_no_folder(config, tmp_path):
    for change, message in [
        ({"store": str(tmp_path / "none")}, "holds no activation store"),
        ({"heldout": str(tmp_path / "none")}, "holds no activation store"),
        ({"heldout": write_store(tmp_path / "layer-2", layers=(2,), rows=200)}, "recorded at other hookpoints"),
        ({"heldout": write_store(tmp_path / "other", model="large", rows=200)}, "recorded at other hookpoints"),
        ({"recipe": {"batch_size": 8192}}, "holds 5000 rows, less than one batch of 8192"),
        ({"device": "quantum"}, "device 'quantum' is not available"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            fit(config.changed(**change))
        assert "\n" not in str(caught.value)
        assert not Path(config.run.output).exists()


def test_held_out_activations_of_a_copy_of_the_model_fit(config, tmp_path):
    """The two need not have been recorded from the same folder."""
    copied = write_store(tmp_path / "copied", model="/data/tiny", rows=300, seed=1)
    config = short(config.changed(heldout=copied))
    assert fit(config).hookpoints[0].model == "tiny"


def test_a_missing_tracker_is_one_line(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match="^wandb is not installed"):
        fit(config.changed(track="wandb"))


# --- Layers of a store


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("several")
    return {
        "store": write_store(folder / "train", layers=(1, 3, 5), rows=900),
        "heldout": write_store(folder / "heldout", layers=(1, 3, 5), rows=100, seed=1),
    }


@pytest.mark.parametrize("normalizer", ["standard", "whitened"])
@pytest.mark.parametrize("layers", [[3], [1, 5]])
def test_layers_of_a_store_are_chosen(config, several, layers, normalizer):
    config = short(config.changed(**several, layers=layers), recipe={"normalizer": normalizer})
    glp = fit(config)
    assert [h.layer for h in glp.hookpoints] == glp.normalizer.layers.tolist() == layers
    assert (glp.denoiser.config.multi_layer_n_layers is None) == (len(layers) == 1)
    store = ActivationStore(several["store"])
    rows = store.batch(store.rows_at(layers))
    for layer in layers:
        x = rows.at_layer(layer).x.double()
        index = glp.normalizer.layers.tolist().index(layer)
        torch.testing.assert_close(glp.normalizer.mean[index].double(), x.mean(0), atol=1e-5, rtol=1e-5)
    training = glp.provenance["training"]
    assert training["distinct"] == 768 and "heldout_loss" in training
    with pytest.raises(InputError, match="holds a finished run with other settings: (rows|layers)"):
        fit(config.changed(layers=[1]))


def test_all_layers_of_a_store_named_are_as_none_named(config, several):
    first = fit(short(config.changed(**several)))
    again = fit(short(config.changed(**several, layers=[5, 3, 1]), output=config.run.output + "-2"))
    assert weights(config.run.output) == weights(config.run.output + "-2") and again.hookpoints == first.hookpoints


def test_a_layer_that_the_store_does_not_have_is_refused(config, several):
    with pytest.raises(InputError, match=r"unknown layer '9' \(valid: 1, 3, 5\)"):
        fit(short(config.changed(**several, layers=[9])))
    with pytest.raises(InputError, match=r"followed gives all its layers, \[1, 3, 5\]: omit --layers"):
        fit(short(config.changed(**several, layers=[3], follow=True)))
    assert not Path(config.run.output).exists()


def test_the_log_has_a_share_of_the_measured_peak_and_an_mfu_where_the_data_sheet_is_known(config, monkeypatch):
    monkeypatch.setattr(trainer, "matrix_peak", lambda *_: 2e9)
    fit(short(config))
    monkeypatch.setattr(trainer, "data_sheet_peak", lambda *_: 4e9)
    fit(short(config, output=config.run.output + "-2"))
    plain, known = (
        [line for line in read_log(Path(folder) / "log.jsonl") if "per_second" in line]
        for folder in (config.run.output, config.run.output + "-2")
    )
    assert all("mfu" not in line and line["measured_peak_share"] > 0 for line in plain)
    assert all(line["mfu"] == pytest.approx(line["measured_peak_share"] / 2) for line in known) and known
