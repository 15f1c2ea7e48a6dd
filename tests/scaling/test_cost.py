"""Counts against what runs: parameters, FLOPs seen by torch's counter, bytes that autograd saves, bytes on disk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentprior import hooks
from latentprior.config import DenoiserConfig, Recipe
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.prior import cost, flow
from latentprior.prior.denoiser import Denoiser
from latentprior.scaling import cost as llm_cost
from latentprior.scaling.cost import shape_of
from latentprior.training.optim import AveragedWeights, optimizers
from latentprior.utils import chips

SMALL = DenoiserConfig(d_input=24, d_model=40, d_mlp=56, n_layers=3)
SHAPES = [
    SMALL,
    DenoiserConfig(6, 12, 20, 1),
    DenoiserConfig(10, 8, 4, 5),
    DenoiserConfig(6, 12, 20, 2, multi_layer_n_layers=5),
    DenoiserConfig(16, 32, 64, 1, multi_layer_n_layers=1),
    DenoiserConfig(6, 12, 20, 2, skip="normal", modulation="norm"),
    DenoiserConfig(6, 12, 20, 2, multi_layer_n_layers=5, modulation="norm"),
]
PAPER_8B = DenoiserConfig(4096, 8192, 16384, 6)


def inputs(config: DenoiserConfig, rows: int, times: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Noisy activations, `times` distinct times and, for a multi-layer prior, two distinct layers."""
    layer = torch.tensor([0, config.multi_layer_n_layers - 1]) if config.multi_layer_n_layers else None
    z_t = torch.randn(rows, config.d_input, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, times).repeat(rows // times)
    return z_t, t, None if layer is None else layer.repeat(rows // 2)


def distinct(config: DenoiserConfig, rows: int, times: int) -> dict[str, float]:
    layers = min(2, config.multi_layer_n_layers or 0)
    return {"distinct_times": times / rows, "distinct_layers": layers / rows}


@pytest.mark.parametrize("config", SHAPES)
def test_parameters_are_those_of_the_network(config):
    assert cost.parameters(config) == sum(p.numel() for p in Denoiser(config).parameters())


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("times", [1, 2, 8])
def test_flops_are_those_that_the_counter_sees(config, times):
    denoiser = Denoiser(config)
    z_t, t, layer = inputs(config, 8, times)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        denoiser(z_t, t, layer)
    with FlopCounterMode(display=False) as step:
        denoiser(z_t, t, layer).square().mean().backward()
    shared = distinct(config, 8, times)
    assert forward.get_total_flops() == pytest.approx(8 * cost.flops_per_activation(config, **shared), rel=1e-12)
    assert step.get_total_flops() == pytest.approx(8 * cost.training_flops_per_activation(config, **shared), rel=1e-12)


def test_the_papers_largest_prior():
    """3.4 B parameters and 20.5 GFLOP for each activation; sharing the time path saves a quarter of the forward."""
    assert cost.parameters(PAPER_8B) == pytest.approx(3.4e9, rel=0.01)
    assert cost.paper_flops_per_activation(PAPER_8B) == pytest.approx(20.5e9, rel=0.005)
    own_time = cost.flops_per_activation(PAPER_8B, distinct_times=1.0)
    assert own_time == pytest.approx(2 * cost.parameters(PAPER_8B), rel=1e-3)
    assert 1 - cost.flops_per_activation(PAPER_8B) / own_time == pytest.approx(0.27, abs=0.01)


@pytest.mark.parametrize(("blocks", "billions"), [(3, 0.5), (6, 0.9), (12, 1.7), (24, 3.3)])
def test_the_papers_priors_of_the_1b_model(blocks, billions):
    assert round(cost.parameters(DenoiserConfig(2048, 4096, 8192, blocks)) / 1e9, 1) == billions


@pytest.mark.parametrize("modulation", ["gate", "norm"])
def test_muon_flops_are_those_of_the_optimizer(modulation):
    config = dataclasses.replace(SMALL, modulation=modulation)
    muon, _ = optimizers(Denoiser(config), Recipe(optimizer="muon"))
    (group,) = muon.param_groups
    total = 0
    for m, n in (sorted(p.shape) for p in group["params"]):
        total += group["ns_steps"] * 2 * (m * n * m + m**3 + m * m * n)  # Gram matrix, its square, the product back
    assert cost.muon_flops_per_step(config) == total


@pytest.mark.parametrize("modulation", ["gate", "norm"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_weights_gradients_optimizer_and_average(optimizer, modulation):
    config = dataclasses.replace(SMALL, modulation=modulation)
    denoiser = Denoiser(config)
    made = optimizers(denoiser, Recipe(optimizer=optimizer))
    denoiser(*inputs(config, 8, 2)).square().mean().backward()
    for one in made:
        one.step()
    counted = cost.training_bytes(config, rows=8, micro_batch=8, optimizer=optimizer, average=True, item=4)
    moments = [v for one in made for state in one.state.values() for v in state.values() if v.numel() > 1]
    assert counted["weights"] == counted["gradients"] == held(denoiser.parameters())
    assert counted["optimizer"] == held(moments)
    assert counted["average"] == held(AveragedWeights(denoiser, 0.9).state_dict().values())
    assert counted["copies"] == 0


def held(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(("item", "dtype"), [(4, torch.float32), (2, torch.bfloat16)])
@pytest.mark.parametrize("modulation", ["gate", "norm"])
def test_activation_bytes_bound_what_autograd_saves(item, dtype, modulation):
    """Exact but for few distinct times; a CPU autocasts LayerNorm to bf16, whose input is then smaller than CUDA's."""
    config, rows = dataclasses.replace(SMALL, d_model=64, d_mlp=128, modulation=modulation), 512
    denoiser = Denoiser(config)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    z_t, t, _ = inputs(config, rows, 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype, enabled=item == 2):
        predicted = denoiser(z_t, t).float()
        loss = (predicted - flow.target(z_t, z_t)).square().mean()
    sizes = [x.untyped_storage().nbytes() for place, x in saved.items() if place not in weights]
    copied = cost.training_bytes(config, rows=rows, micro_batch=rows, item=item)["copies"]
    working = 3 * rows * item * config.d_mlp
    counted = cost.activation_bytes(config, rows, item=item) - working
    assert loss.requires_grad
    low = 1.0 if item == 4 else 0.85
    assert low * counted <= sum(sizes) <= 1.02 * counted + copied


def test_sharding_divides_what_is_kept_but_not_what_a_process_computes():
    def counted(**options) -> dict[str, int]:
        return cost.training_bytes(PAPER_8B, rows=512, world=8, average=True, **options)

    copied, sharded = counted(micro_batch=512, parallel="ddp"), counted(micro_batch=512, parallel="fsdp")
    for part in ("weights", "gradients", "optimizer", "average"):
        assert sharded[part] == pytest.approx(copied[part] / 8, rel=1e-6)
    assert sharded["activations"] == copied["activations"]
    accumulated = counted(micro_batch=256, parallel="fsdp")
    assert accumulated["activations"] == sharded["activations"] // 2
    assert accumulated["copies"] > 4 * cost.parameters(PAPER_8B) > sharded["copies"]  # gradients wait unsharded


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_llm_flops_are_those_of_a_cut_forward_pass(tiny_llm, family, blocks):
    model, sequence = tiny_llm(family, width=64), 48
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        hooks.run_cut(model, [blocks - 1], input_ids=torch.zeros(2, sequence, dtype=torch.long))
    counted = llm_cost.llm_flops_per_token(shape_of(model), blocks=blocks, sequence=sequence)
    assert counter.get_total_flops() / (2 * sequence) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("1B", 1.236), ("8B", 8.030), ("70B", 70.554), ("smollm2-135m", 0.1345), ("gemma-3-270m", 0.2681)],
)
def test_known_shapes_have_the_published_sizes(name, billions):
    assert llm_cost.LLM_SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_llama_shape_is_that_of_the_model(tiny_llm):
    shape = llm_cost.llama_shape(width=32, blocks=4, heads=4, kv_heads=2, head=8, mlp=64, vocabulary=320, tied=False)
    assert shape == shape_of(tiny_llm("llama"))


def test_store_bytes_are_those_on_disk(tmp_path):
    """Documents of 100 tokens from a vocabulary of 49,152, as frequent as Zipf's law has it."""
    width, rows = 64, 65_536
    row = torch.arange(rows)
    token = (49_152 ** torch.rand(rows, generator=torch.Generator().manual_seed(0))).long()
    batch = ActivationBatch(
        torch.ones(rows, width).bfloat16(), torch.full((rows,), 3), row // 100, row % 100 + 1, token
    )
    with StoreWriter(tmp_path / "store", [Hookpoint("m", 3, width)], source={}) as writer:
        writer.append(batch, next_batch=1, left_out={"sinks": 0, "nonfinite": 0})
    shards = ActivationStore(tmp_path / "store").manifest["shards"]
    measured = sum(shard[part]["bytes"] for shard in shards for part in ("activations", "metadata")) / rows
    assert measured == pytest.approx(llm_cost.store_bytes_per_activation(width), abs=0.8)


def test_matrix_peak_is_a_rate_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    assert chips.matrix_peak(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
    assert torch.equal(torch.random.get_rng_state(), before)
    assert chips.device_memory(torch.device("cpu")) > 1e9


def test_the_data_sheet_peak_is_of_known_devices_in_bfloat16_alone(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, tflops in [
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 PCIe", None),  # slower than the SXM that `CHIPS` describes
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert chips.data_sheet_peak(gpu, torch.bfloat16) == (None if tflops is None else tflops * 1e12)
        assert chips.data_sheet_peak(gpu, torch.float32) is None
    assert chips.data_sheet_peak(torch.device("cpu"), torch.bfloat16) is None
    assert all(chip.names for chip in chips.CHIPS.values())
