"""Options: complete documentation, round trips through plain values, and validation that names what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass, field

import jaxtyping
import pytest

from latentprior import config
from latentprior.config import (
    PRESETS,
    DenoiserConfig,
    EvaluateConfig,
    JudgeConfig,
    LLMConfig,
    NeuronsConfig,
    ProbeConfig,
    Recipe,
    RecordConfig,
    RepairConfig,
    SAEConfig,
    SteerConfig,
    StoreOptions,
    TextConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from latentprior.config.base import count_of, size_of
from latentprior.config.options import docs_of
from latentprior.utils.errors import InputError

CLASSES = [c for c in vars(config).values() if inspect.isclass(c) and dataclasses.is_dataclass(c)]
REQUIRED = {
    "DenoiserConfig": {"d_input": 8, "d_model": 16, "d_mlp": 32},
    "ConvertConfig": {"source": "a", "output": "b"},
    "EvaluateConfig": {"prior": "a", "heldout": "b", "output": "c"},
    "NeuronsConfig": {"prior": "a", "output": "b"},
    "ProbeConfig": {"priors": ["a"], "output": "b"},
    "RecordConfig": {"output": "a"},
    "SampleConfig": {"prior": "a", "output": "b"},
    "SteerConfig": {"priors": ["a"], "output": "b"},
    "SweepConfig": {"store": "a", "heldout": "b", "output": "c"},
    "RunOptions": {"output": "a"},
    "TextSource": {"dataset": "a.txt"},
    "TrainConfig": {"run": {"output": "a"}, "store": {"path": "b"}},
}


NEEDED = {"store": "a", "output": "b"}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch):
    """As outside of tests, where no type is checked before our own validation."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_frozen_and_every_field_documented(cls: type):
    """A field that holds another configuration is documented by that one's docstring."""
    names = {c.__name__ for c in CLASSES}
    assert cls.__doc__ and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    docs = docs_of(cls)
    for f in dataclasses.fields(cls):
        assert docs[f.name] or f.type in names, f"{cls.__name__}.{f.name}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_defaults_round_trip(cls: type):
    required = REQUIRED.get(cls.__name__, {})
    default = from_dict(cls, required)
    values = to_dict(default)
    json.dumps(values)
    assert from_dict(cls, values) == default


def test_changed_and_nested_values_round_trip_through_json():
    record = RecordConfig("a", layers=[3, 4], llm=LLMConfig(dtype="float32"), text=TextConfig(limit=5))
    assert from_dict(RecordConfig, json.loads(json.dumps(to_dict(record)))) == record
    denoiser = DenoiserConfig(8, 16, 32, multi_layer_n_layers=4)
    assert from_dict(DenoiserConfig, json.loads(json.dumps(to_dict(denoiser)))) == denoiser


def test_nested_values_may_be_partial():
    record = from_dict(RecordConfig, {"output": "a", "text": {"limit": 5}})
    assert record.text == TextConfig(limit=5) and record.llm == LLMConfig()


def test_unknown_keys_are_named_with_the_nearest():
    with pytest.raises(InputError, match="unknown TrainConfig key 'presett'; did you mean 'preset'"):
        from_dict(TrainConfig, {"presett": "quick"})
    with pytest.raises(InputError, match="unknown TextConfig key 'colunm'; did you mean 'column'"):
        from_dict(RecordConfig, {"output": "a", "text": {"colunm": "text"}})


def test_the_old_place_of_the_device_names_the_new_one():
    with pytest.raises(InputError, match="^llm.device has become device: --device says where all of a command comp"):
        from_dict(RecordConfig, {"output": "a", "llm": {"device": "cpu"}})


def test_options_of_training_need_no_group_and_keep_their_old_names():
    flat = {"store": "s", "heldout": "h", "output": "o", "blocks": 2, "seed": 3, "lanes": 6, "device": "cpu"}
    flat |= {"layers": [1], "recipe": {"draws": 2, "learning_rate": 1e-3}}
    config = from_dict(TrainConfig, flat)
    assert config.store == StoreOptions(path="s", heldout="h") and config.prior.blocks == 2
    assert config.run.seed == 3 and config.stream.document_shards == 6 and config.resolved_recipe().noise_samples == 2
    nested = {"store": {"path": "s", "heldout": "h"}, "run": {"output": "o", "seed": 3, "device": "cpu"}, "layers": [1]}
    nested |= {"prior": {"blocks": 2}, "stream": {"document_shards": 6}}
    assert from_dict(TrainConfig, nested | {"recipe": {"noise_samples": 2, "learning_rate": 1e-3}}) == config
    saved = config.without_groups()
    assert saved.items() >= flat.items() and from_dict(TrainConfig, json.loads(json.dumps(saved))) == config
    assert from_dict(TrainConfig, to_dict(config)) == config
    live = TrainConfig.of(source="llm", output="o", llm={"model": "m"}, text={"limit": 5}, noise_samples=4)
    assert live.stream.llm.model == "m" and live.stream.text.limit == 5 and live.recipe == {"noise_samples": 4}
    assert live.changed(blocks=5, buffer="1k").changed(blocks=3, buffer="65536") == live


def test_names_without_a_group_that_several_have_are_refused():
    @dataclass(frozen=True)
    class Two:
        one: LLMConfig = field(default_factory=LLMConfig)
        other: LLMConfig = field(default_factory=LLMConfig)

    with pytest.raises(InputError, match="model may be one.model or other.model"):
        from_dict(Two, {"model": "m"})


@pytest.mark.parametrize(("given", "name"), [({"output": "o"}, "--store"), ({"store": "s"}, "--output")])
def test_what_training_cannot_guess_is_asked_for(given, name):
    with pytest.raises(InputError, match=name):
        from_dict(TrainConfig, given)


def test_a_free_dictionary_stays_one():
    @dataclass(frozen=True)
    class Own:
        values: dict[str, int] = field(default_factory=dict)

    assert from_dict(Own, {"values": {"a": 1}}) == Own({"a": 1})


def train(**options) -> TrainConfig:
    return TrainConfig.of(**{"output": "a"} | ({} if options.get("source") == "llm" else {"store": "b"}) | options)


def test_the_official_recipe_is_the_papers():
    recipe = PRESETS["official"]
    assert (recipe.batch_size, recipe.learning_rate, recipe.clip) == (4096, 5e-5, 1.0)
    assert (recipe.warmup, recipe.final_rate, recipe.ema, recipe.times) == (0.01, 0.1, None, "grid")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_changed_by_recipe_keys(preset):
    assert train(preset=preset).resolved_recipe() == PRESETS[preset]
    changed = train(preset=preset, recipe={"learning_rate": 1e-3}).resolved_recipe()
    assert changed == dataclasses.replace(PRESETS[preset], learning_rate=1e-3)


def test_shape_of_the_denoiser():
    assert train(blocks=6).prior.denoiser(4096) == DenoiserConfig(4096, 8192, 16384, 6)
    assert train(d_model=10).prior.denoiser(4, 8) == DenoiserConfig(4, 10, 20, 3, 8)
    assert train(d_mlp=12).prior.denoiser(4) == DenoiserConfig(4, 8, 12, 3)


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (LLMConfig, {"dtype": "float16"}, "LLMConfig.dtype 'float16'.*bfloat16"),
        (TextConfig, {"part": "test"}, "unknown TextConfig.part 'test'"),
        (TextConfig, {"heldout": 1.5}, r"TextConfig.heldout must lie in \[0, 1\], got 1.5"),
        (TextConfig, {"documents": "lines"}, "unknown TextConfig.documents 'lines'; did you mean 'line'"),
        (RecordConfig, {"long_documents": "split"}, "unknown RecordConfig.long_documents 'split'"),
        (TrainConfig, {"source": "llm", "long_documents": "split"}, "unknown StreamConfig.long_documents 'split'"),
        (TextConfig, {"limit": 0}, "TextConfig.limit must be positive"),
        (RecordConfig, {"side": "outputs"}, "did you mean 'output'"),
        (RecordConfig, {"dtype": "float16"}, "unknown RecordConfig.dtype 'float16'"),
        (RecordConfig, {"max_length": 0}, "RecordConfig.max_length must be positive"),
        (Recipe, {"learning_rate": -1.0}, "Recipe.learning_rate must be positive"),
        (Recipe, {"learning_rate": float("nan")}, "Recipe.learning_rate must be positive"),
        (Recipe, {"ema": 1.0}, "Recipe.ema must lie between 0 and 1"),
        (Recipe, {"warmup": 2.0}, "Recipe.warmup must lie in"),
        (Recipe, {"times": "startified"}, "unknown Recipe.times 'startified'; did you mean 'stratified'"),
        (Recipe, {"optimizer": "muom"}, "unknown Recipe.optimizer 'muom'; did you mean 'muon'"),
        (Recipe, {"base_width": 0}, "Recipe.base_width must be positive"),
        (Recipe, {"logit_mean": float("inf")}, "Recipe.logit_mean must be finite"),
        (Recipe, {"schedule": "constant", "warmup": 0.5, "cooldown": 0.6}, "more than the whole run"),
        (TrainConfig, {"preset": "offical"}, "unknown TrainConfig.preset 'offical'; did you mean 'official'"),
        (TrainConfig, {"recipe": {"lr": 1}}, "unknown Recipe key 'lr'"),
        (TrainConfig, {"recipe": {"clip": 0.0}}, "Recipe.clip must be positive"),
        (TrainConfig, {"blocks": 0}, "PriorOptions.blocks must be positive"),
        (EvaluateConfig, {"solvers": ["euler", "rk4"]}, "unknown EvaluateConfig.solvers 'rk4'"),
        (EvaluateConfig, {"nfes": [0]}, "EvaluateConfig.nfes must be positive"),
        (RepairConfig, {"t_start": 1.5}, "RepairConfig.t_start must lie in"),
        (RepairConfig, {"steps": 0}, "RepairConfig.steps must be positive"),
        (RepairConfig, {"samples": 0}, "RepairConfig.samples must be positive"),
        (RepairConfig, {"noise": "row"}, "unknown RepairConfig.noise 'row'"),
        (RepairConfig, {"solver": "rk4"}, "unknown RepairConfig.solver 'rk4'"),
        (JudgeConfig, {"url": "http://127.0.0.1:1/v1"}, "name the judge's model with --judge.model"),
        (SteerConfig, {"methods": ["paird"]}, "unknown method 'paird'; did you mean 'paired'"),
        (SteerConfig, {"directions": ["mean"]}, "unknown direction of sentiment 'mean'"),
        (SteerConfig, {"positions": "first"}, "unknown SteerConfig.positions 'first'"),
        (SteerConfig, {"strengths": [0.0]}, "SteerConfig.strengths must be positive"),
        (SteerConfig, {"strengths": [1.0, 1.0]}, "SteerConfig.strengths names one twice"),
        (SteerConfig, {"prompts": 1}, "SteerConfig.prompts must be at least 2"),
        (SteerConfig, {"priors": []}, "SteerConfig.priors is empty"),
        (ProbeConfig, {"sources": ["mlp"]}, "unknown source of features 'mlp'"),
        (ProbeConfig, {"sources": []}, "ProbeConfig.sources is empty"),
        (ProbeConfig, {"sources": ["sae"]}, "name the folder of the autoencoder"),
        (ProbeConfig, {"priors": []}, "ProbeConfig.priors is empty"),
        (ProbeConfig, {"times": [0.1, 1.2]}, "noise levels must lie in"),
        (ProbeConfig, {"t": []}, "ProbeConfig.t is empty"),
        (ProbeConfig, {"folds": 1}, "ProbeConfig.folds must be at least 2"),
        (ProbeConfig, {"mlp_draws": -1}, "ProbeConfig.mlp_draws must be at least 0"),
        (ProbeConfig, {"sparse": [0]}, "ProbeConfig.sparse must be positive"),
        (ProbeConfig, {"max_test": 0}, "ProbeConfig.max_test must be positive"),
        (ProbeConfig, {"method": "ranks"}, "unknown ProbeConfig.method 'ranks'"),
        (NeuronsConfig, {"t": 2.0}, "NeuronsConfig.t must lie in"),
        (NeuronsConfig, {"max_length": 1}, "NeuronsConfig.max_length must be at least 2"),
        (NeuronsConfig, {"promoted": -1}, "NeuronsConfig.promoted must be at least 0"),
        (NeuronsConfig, {"describe": 3}, "describing units needs an endpoint"),
        (SteerConfig, {"experiment": "files"}, "name the files of the directions"),
        (SteerConfig, {"experiment": "sae"}, "name the folder of the autoencoder"),
        (SteerConfig, {"experiment": "sae", "sae": "x"}, "--store"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_values_are_refused(cls, change, message):
    with pytest.raises(InputError, match=message):
        from_dict(cls, REQUIRED.get(cls.__name__, {}) | change)


@pytest.mark.parametrize("change", [{"d_model": 15}, {"d_mlp": 0}, {"n_layers": -1}, {"multi_layer_n_layers": 0}])
def test_bad_denoisers_are_refused(change):
    with pytest.raises(InputError, match=f"DenoiserConfig.{next(iter(change))} must be"):
        from_dict(DenoiserConfig, {"d_input": 8, "d_model": 16, "d_mlp": 32, **change})


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: train(llm=LLMConfig(dtype="float32")), "--llm.dtype means nothing for a store"),
        (lambda: train(buffer="2GB"), "--buffer means nothing for a store"),
        (lambda: train(record_to="x"), "--record-to means nothing for a store"),
        (lambda: train(statistics=7), "--statistics means nothing for a store without --follow"),
        (lambda: train(wait_seconds=7.0), "--wait-seconds means nothing for a store without --follow"),
        (lambda: train(source="llm", store="x"), "--store means nothing with --from llm"),
        (lambda: train(source="llm", follow=True), "--follow means nothing with --from llm"),
        (lambda: train(source="llm", disk_budget="9GB"), "--disk-budget means nothing without --record-to"),
        (lambda: RecordConfig("a", wait_seconds=7.0), "--wait-seconds means nothing without --wait"),
        (lambda: RecordConfig("a", positions_per_document=2), "--positions-per-document means nothing unless"),
        (lambda: EvaluateConfig("a", "b", "c", sae=SAEConfig(k=3)), "--sae.k means nothing without --baseline sae"),
    ],
)
def test_an_option_without_a_meaning_is_refused(make, option):
    with pytest.raises(InputError, match=f"^{option}.*: leave it out$"):
        make()


def test_an_option_at_its_default_or_with_a_meaning_is_taken():
    assert train(follow=True, statistics=7, wait_seconds=7.0, layers=[3]).layers == [3]
    assert train(source="llm").layers == [15] and train().layers == []
    assert train(source="llm", llm=LLMConfig("gemma-3-270m")).layers == [9]
    assert train(source="llm", record_to="x", disk_budget="9GB", buffer="64k").stream.record_to
    assert RecordConfig(
        "a", positions="random", positions_per_document=2, wait=True, disk_budget="9GB", wait_seconds=7.0
    )
    assert EvaluateConfig("a", "b", "c", baseline=["sae"], sae=SAEConfig(k=3)).sae.k == 3


@pytest.mark.parametrize(
    ("size", "amount"),
    [("65536", (65536, False)), ("64k", (64000, False)), ("1M", (10**6, False)), ("2e3", (2000, False)),
     ("1_000", (1000, False)), ("2GB", (2 * 10**9, True)), ("3MiB", (3 * 2**20, True)), ("70B", (70, True))],
)  # fmt: skip
def test_sizes(size, amount):
    assert size_of("buffer", size) == amount


@pytest.mark.parametrize("size", ["0", "x", "1e999", "-1", "1 Q", "1e-3"])
def test_what_is_no_size(size):
    with pytest.raises(InputError, match="^buffer must be a number of activations or a size"):
        size_of("buffer", size)
    assert count_of(size) in (None, 0)


def test_settings_are_json_with_groups_in_lists():
    mixed = config.TextConfig(mix=[config.TextSource(dataset="a"), config.TextSource(dataset="b", weight=2.0)])
    assert json.loads(json.dumps(config.settings_of(mixed))) == config.to_dict(mixed)  # all of it decides
