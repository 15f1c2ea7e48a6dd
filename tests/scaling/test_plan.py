"""Plans against the paper, against the denoiser's and a model's real sizes, and against each other."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from latentprior.cli.commands import main
from latentprior.config import LLMConfig, PlanConfig
from latentprior.scaling import cost as llm_cost
from latentprior.scaling.cost import shape_of
from latentprior.scaling.plan import distinct_times, plan, tables
from latentprior.utils.errors import InputError


def planned(model: str = "8B", **options) -> dict:
    return plan(PlanConfig(llm=LLMConfig(model=model), **options))


def test_the_papers_run():
    """Llama-3.1-8B, layer 15, 6 blocks: 3.4 B parameters, 20.5 GFLOP for each activation, 8 TB if it were stored."""
    result = planned(blocks=6, preset="official")
    assert result["llm"]["layers"] == [15]
    assert result["prior"]["parameters"] == pytest.approx(3.4e9, rel=0.01)
    assert result["prior"]["paper_flops_per_activation"] == pytest.approx(20.5e9, rel=0.005)
    # As executed, 4096 activations share at most 1000 times.
    assert 0.75 < result["prior"]["flops_per_activation"] / 20.5e9 < 0.85
    assert result["disk_bytes"] == pytest.approx(8.2e12, rel=0.01)


@pytest.mark.parametrize(("blocks", "billions"), [(3, 0.5), (6, 0.9), (12, 1.7), (24, 3.3)])
def test_the_papers_priors_of_the_1b_model(blocks, billions):
    result = planned("1B", blocks=blocks)
    assert result["llm"]["layers"] == [7]
    assert round(result["prior"]["parameters"] / 1e9, 1) == billions


def test_time_is_flops_over_what_the_chips_give():
    one = planned("1B", llm_mfu=0.5, prior_mfu=0.25, chip="a100-80")
    times = one["time"]
    assert times["llm_seconds"] == pytest.approx(one["llm"]["flops"] / (312e12 * 0.5))
    assert times["prior_seconds"] == pytest.approx(one["prior"]["flops"] / (312e12 * 0.25))
    assert times["days"] * 86_400 == pytest.approx(times["llm_seconds"] + times["prior_seconds"])
    assert times["activations_per_second"] * times["seconds"] == pytest.approx(1e9)
    eight = planned("1B", llm_mfu=0.5, prior_mfu=0.25, chip="A100-80", chips=8)
    assert eight["time"]["llm_seconds"] == pytest.approx(times["llm_seconds"] / 8)
    # Fewer rows in each process share the same number of times, so there is a little more to do.
    assert times["prior_seconds"] / 8 < eight["time"]["prior_seconds"] < 1.2 * times["prior_seconds"] / 8


def test_several_layers_share_the_forward_pass():
    one, two = planned(layers=[15]), planned(layers=[15, 7])
    assert two["llm"]["layers"] == [7, 15]
    assert two["llm"]["flops_per_activation"] == pytest.approx(one["llm"]["flops_per_activation"] / 2)
    assert two["prior"]["shape"]["multi_layer_n_layers"] == 32
    assert two["prior"]["parameters"] > one["prior"]["parameters"]


def test_memory_adds_up_and_says_what_is_too_big():
    fits = planned("1B", chip="H100")["memory"]
    assert fits["fits"] and fits["verdict"].startswith("fits: ")
    assert fits["total"] == sum(fits["bytes"].values())
    too_big = planned("70B", chip="H200")["memory"]
    assert not too_big["fits"]
    assert "\n" not in too_big["verdict"]
    assert too_big["verdict"].endswith("the largest part is the LLM weights, 141 GB")


def test_a_billion_parameters_are_sharded():
    assert planned("1B", chips=8)["prior"]["parallel"] == "ddp"
    assert planned("8B", chips=8)["prior"]["parallel"] == "fsdp"
    assert planned("8B", chips=1)["prior"]["parallel"] == "ddp"
    assert planned("8B", chips=8, parallel="ddp")["prior"]["parallel"] == "ddp"


def test_the_buffer_is_shared_and_holds_whole_batches():
    batch = {"recipe": {"batch_size": 1000}, "preset": "official"}
    row = 2 * 4096
    assert planned(buffer="2999", **batch)["memory"]["bytes"]["buffer"] == 2000 * row
    assert planned(buffer="2999", chips=2, **batch)["memory"]["bytes"]["buffer"] == 1000 * row
    assert planned(buffer="20MB", **batch)["memory"]["bytes"]["buffer"] == 2000 * row
    assert planned(buffer="2000", layers=[1, 2], **batch)["memory"]["bytes"]["buffer"] == 2000 * (row + 4)
    with pytest.raises(InputError, match="buffer of 999 .* 1000"):
        planned(buffer="999", **batch)


def test_muon_costs_flops_and_saves_memory():
    adamw, muon = (planned("1B", recipe={"optimizer": name}) for name in ("adamw", "muon"))
    batch, shape = muon["prior"]["batch_size"], muon["prior"]["shape"]
    update = 4 * 3 * 5 * 2 * (2 * 4096**2 * 8192 + 4096**3) / batch
    assert (shape["d_model"], shape["d_mlp"], shape["n_layers"]) == (4096, 8192, 3)
    assert muon["prior"]["update_flops_per_activation"] == pytest.approx(update)
    assert adamw["prior"]["update_flops_per_activation"] == 0
    assert muon["memory"]["bytes"]["prior optimizer"] < adamw["memory"]["bytes"]["prior optimizer"]


@pytest.mark.parametrize(
    ("times", "rows", "micro_batch", "expected"),
    [("grid", 4096, 4096, 1000), ("grid", 512, 512, 512), ("uniform", 512, 128, 128), ("stratified", 512, 128, 64),
     ("logit_normal", 32, 32, 32)],
)  # fmt: skip
def test_distinct_times(times, rows, micro_batch, expected):
    recipe = PlanConfig(recipe={"times": times}).resolved_recipe()
    assert distinct_times(recipe, rows, micro_batch) == expected


def test_a_models_own_config_is_read(llm_folder, tiny_llm):
    state = torch.random.get_rng_state()
    result = planned(llm_folder, layers=[2], max_length=64)
    assert torch.equal(torch.random.get_rng_state(), state)
    shape = shape_of(tiny_llm("llama"))
    assert result["llm"]["parameters"] == sum(p.numel() for p in tiny_llm("llama").parameters())
    assert result["llm"]["flops_per_token"] == llm_cost.llm_flops_per_token(shape, blocks=3, sequence=64)


def test_of_a_mixture_only_the_chosen_experts_count():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=50,
    )  # fmt: skip
    with torch.device("meta"):
        shape = shape_of(transformers.AutoModelForCausalLM.from_config(config))
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 8 * 32, 3 * 32 * 64
    assert shape.block_weights == (attention + router + 2 * expert,) * 2


@pytest.mark.assets
def test_the_embedded_models_known_shape_is_its_own():
    from latentprior.lm.loading import load_llm

    model, _ = load_llm(LLMConfig())
    assert shape_of(model) == llm_cost.LLM_SHAPES["smollm2-135m"]


@pytest.mark.gemma
@pytest.mark.slow
def test_gemmas_known_shape_is_its_own():
    from latentprior.lm.loading import load_llm

    assert shape_of(load_llm("gemma-3-270m", "cpu")[0]) == llm_cost.LLM_SHAPES["gemma-3-270m"]


def test_a_measured_chip(monkeypatch):
    monkeypatch.setattr("latentprior.scaling.plan.matrix_peak", lambda device, dtype: 3e9)
    result = planned("smollm2-135m", chip="measured", activations=1000)
    assert result["chip"]["name"] == "this cpu" or torch.cuda.is_available()
    assert result["chip"]["llm_peak"] == 3e9
    assert result["memory"]["fits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chip": "H20"}, "unknown chip 'H20'; did you mean"),
        ({"llm": LLMConfig(model="9B")}, "unknown model '9B'"),
        ({"llm": LLMConfig(model="SmolLM-135m")}, "did you mean 'smollm2-135m'"),
        ({"llm": LLMConfig(model="nobody/nothing")}, "cannot load the model 'nobody/nothing': there is no such folder"),
        ({"llm": LLMConfig(model="8B", dtype="float32")}, "H100 in bfloat16"),
        ({"layers": [3, 32]}, "layer 32 is out of range: 8B has layers 0 to 31"),
        ({"layers": [-1]}, "layer -1 is out of range"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options, message):
    with pytest.raises(InputError, match=message) as raised:
        plan(PlanConfig(**options))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chips": 3}, "3 chips do not divide the batch of 1024"),
        ({"chips": 0}, "PlanConfig.chips must be positive"),
        ({"llm_mfu": 1.5}, "PlanConfig.llm_mfu must lie above 0 and at most at 1"),
        ({"max_length": 1}, "PlanConfig.max_length must be at least 2"),
        ({"buffer": "much"}, "buffer must be a number of activations or a size"),
        ({"preset": "qiuck"}, "did you mean 'quick'"),
        ({"recipe": {"batch": 1}}, "unknown Recipe key 'batch'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        PlanConfig(**{"recipe": {"batch_size": 1024}} | options)


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "plan.json"
    assert main(["plan", "--llm.model", "8b", "--blocks", "6", "--chips", "8", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["config"]["blocks"] == 6
    assert {"kind", "config", "versions", "git", "wall_seconds", "assumptions"} <= result.keys()
    shown = " ".join(capsys.readouterr().out.split())
    assert "20.5 GFLOP" in shown and "fits:" in shown and "8 x H100" in shown


def test_tables_are_readable():
    tables_of_8b = tables(planned(blocks=6, activations=1_000_000))
    work, memory, times = tables_of_8b.values()
    assert next(iter(tables_of_8b)) == "1 M activations"
    assert work["disk, if stored instead"] == "8.19 GB"
    assert memory["LLM weights"] == "16.1 GB"
    assert times["together"].endswith(" s")
    assert dataclasses.asdict(PlanConfig()).keys() == planned()["config"].keys()
