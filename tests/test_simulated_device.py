"""The simulated GPU refuses what a GPU refuses and computes what the CPU computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simulated_device import CPU, GPU, MixUp, simulated_gpu


@pytest.fixture
def gpu():
    with simulated_gpu() as calls:
        yield calls


MIX_UPS = {
    "sum": lambda x, y: x + y,
    "reversed sum": lambda x, y: y + x,
    "in place": lambda x, y: x.mul_(y),
    "product": lambda x, y: x @ y.T,
    "linear": lambda x, y: F.linear(x, y),
    "cat": lambda x, y: torch.cat([y, x]),
    "stack in a list": lambda x, y: torch.stack([x, x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "comparison": lambda x, y: torch.equal(x, y),
    "index": lambda x, y: x[torch.tensor([0, 1])],
    "mask": lambda x, y: y[x[:, 0] > 0],
    "put by index": lambda x, y: x.__setitem__(torch.tensor([0]).to(GPU), y[:1]),
    "put by mask": lambda x, y: x.__setitem__(y > 0, 0.0),
    "out": lambda x, y: torch.add(x, x, out=y),
    "loss": lambda x, y: F.mse_loss(x, y),
    "numpy": lambda x, y: x.numpy(),
    "asarray": lambda x, y: np.asarray(x),
    "numpy function": lambda x, y: np.sort(x),
    "generator": lambda x, y: torch.randn(3, generator=torch.Generator("cuda")),
    "generator of the CPU": lambda x, y: torch.randn(3, generator=torch.Generator(), device="cuda"),
    "generator in place": lambda x, y: x.normal_(generator=torch.Generator()),
    "data": lambda x, y: setattr(x, "data", y),
    "pin": lambda x, y: x.pin_memory(),
    "module": lambda x, y: nn.Linear(4, 2)(x),
    "module on the GPU": lambda x, y: nn.LayerNorm(4).to("cuda")(y),
}


@pytest.mark.parametrize("name", MIX_UPS)
def test_a_mix_up_is_caught(gpu, name):
    x, y = torch.randn(3, 4).to(GPU), torch.randn(3, 4)
    with pytest.raises(MixUp):
        MIX_UPS[name](x, y)


def test_what_a_gpu_allows_is_allowed(gpu):
    x, y = torch.ones(3, 4, device="cuda"), torch.full((3, 4), 2.0)
    assert (x * torch.tensor(3.0)).sum().item() == 36  # a number may be on the CPU
    x[1:] = y[1:]
    y[:1] = x[:1]
    assert x.tolist() == y.tolist() == [[1.0] * 4, [2.0] * 4, [2.0] * 4]
    x.copy_(y)
    assert x[torch.tensor([0], device=GPU)].device == GPU and len(x) == 3 and float(x.max()) == 2
    assert [row.device for row in x] == [GPU] * 3


def test_devices_and_memory():
    y = torch.zeros(3)
    with simulated_gpu():
        x = y.to("cuda")
        x += 1
        assert x.device == x.cpu().to(0).device == GPU and x.is_cuda and x.cpu().device == CPU
        assert x.to(GPU) is x and x.to(x) is x and x.to(x, copy=True) is not x
        assert y.sum() == 0 and x.cpu().sum() == 3  # moving copies
        assert x.new_zeros(2).device == torch.zeros_like(x).device == torch.as_tensor(x).device == GPU
        assert torch.zeros_like(x, device="cpu").device == torch.tensor([float(v) for v in x]).device == CPU
        assert torch.Generator("cuda").device == GPU and isinstance(torch.default_generator, torch.Generator)
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            x.to("cuda:1")
    assert x.device == GPU  # also outside
    assert isinstance(torch.default_generator, torch.Generator) and not torch.cuda.is_available()
    with pytest.raises(MixUp):
        x + y


def trained(device: str) -> tuple[list[float], torch.Tensor]:
    """Losses of a few steps of a small network, and its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(3):
        loss = (model(x) - x.flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
        optimizer.step()
        losses.append(loss.item())
    weights = nn.utils.parameters_to_vector(copy.deepcopy(model).parameters())
    assert weights.device.type == device
    return losses, weights.detach().cpu()


def test_training_has_the_values_of_the_cpu(gpu):
    losses, weights = trained("cuda")
    expected, expected_weights = trained("cpu")
    assert losses == expected and torch.equal(weights, expected_weights)
    assert gpu["linear", "cuda"] == gpu["linear", "cpu"] == 6


def test_gradients_cross_from_one_device_to_the_other(gpu):
    x = torch.ones(3, requires_grad=True)
    (x.to("cuda") * 2).square().sum().cpu().backward()
    assert x.grad is not None and x.grad.tolist() == [8.0] * 3


def test_a_language_model_says_the_same(gpu, tiny_llm):
    ids = torch.tensor([[0, 5, 6, 7], [0, 9, 3, 4]])
    expected = tiny_llm("llama").generate(ids, max_new_tokens=5, do_sample=False)
    model = tiny_llm("llama").to("cuda")
    with pytest.raises(MixUp):
        model(ids)
    found = model.generate(ids.to(model.device), max_new_tokens=5, do_sample=False)
    assert found.device == GPU and torch.equal(found.cpu(), expected)
