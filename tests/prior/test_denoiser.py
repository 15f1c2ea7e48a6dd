"""The denoiser against the paper's formulas, written out row by row without sharing anything between rows."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentprior.config import DenoiserConfig
from latentprior.prior.denoiser import Condition, Denoiser
from latentprior.utils.errors import InputError

SINGLE = DenoiserConfig(d_input=6, d_model=12, d_mlp=20, n_layers=3)
MULTI = DenoiserConfig(d_input=6, d_model=12, d_mlp=20, n_layers=2, multi_layer_n_layers=5)
SKIP = replace(SINGLE, skip="normal")
NORM = replace(SINGLE, modulation="norm", skip="normal")
NORM_MULTI = replace(MULTI, modulation="norm")


def make(config: DenoiserConfig, dtype: torch.dtype = torch.float64) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        denoiser = Denoiser(config)
        for p in denoiser.parameters():  # layer norms and biases away from where they start
            torch.nn.init.normal_(p, std=0.4)
    return denoiser.to(dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def features(value: float, width: int) -> Tensor:
    """Sinusoid with cosines first and a period of at most 2 pi 10000."""
    angles = [value * 10_000 ** (-i / (width // 2)) for i in range(width // 2)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def reference_row(w: dict[str, Tensor], config: DenoiserConfig, z: Tensor, t: float, layer: int | None) -> Tensor:
    """The denoiser for one activation [d], from the weights alone: the paper's, or with skip and modulated norms."""

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def embed(name: str, value: float) -> Tensor:
        return linear(f"{name}.2", F.silu(linear(f"{name}.0", features(value, config.d_model).to(z.dtype))))

    e = embed("time_embed", (30 if config.modulation == "norm" else 1000) * t)
    if layer is not None:
        e = e + embed("layer_embed", layer / (config.multi_layer_n_layers - 1))

    def adapted(name: str, h: Tensor) -> Tensor:
        scale, shift = linear(name, e).split(config.d_model)
        return h * (1 + scale) + shift

    x = linear("in_proj", z)
    for i in range(config.n_layers):
        h, factor = norm(f"layers.{i}.ln", x), 1.0
        if config.modulation == "norm":
            h = adapted(f"layers.{i}.time_proj", h)
        else:
            factor = linear(f"layers.{i}.time_proj", e)
        gate = F.silu(linear(f"layers.{i}.gate_proj", h) * factor)
        x = x + linear(f"layers.{i}.down_proj", gate * linear(f"layers.{i}.up_proj", h))
    h = norm("ln", x)
    u = linear("out_proj", adapted("time_proj", h) if config.modulation == "norm" else h)
    if config.skip == "none":
        return u
    scale = t / math.hypot(t, 0.05) * (1 - t) / math.hypot(1 - t, 0.05)
    return scale * u + (2 * t - 1) / ((1 - t) ** 2 + t**2) * z


def reference(denoiser: Denoiser, z: Tensor, t: Tensor, layer: Tensor | None) -> Tensor:
    n = len(z)
    w = dict(denoiser.named_parameters())
    times = t.expand(n).tolist()
    layers = [None] * n if layer is None else layer.expand(n).tolist()
    return torch.stack([reference_row(w, denoiser.config, *row) for row in zip(z, times, layers, strict=True)])


CASES = {
    "scalar t": (SINGLE, torch.tensor(0.375), None),
    "t of one": (SINGLE, torch.tensor([0.375]), None),
    "t for each row": (SINGLE, torch.tensor([0.0, 1.0, 0.25, 0.5, 0.125]), None),
    "repeated t": (SINGLE, torch.tensor([0.5, 0.125, 0.5, 0.125, 0.5]), None),
    "one layer": (MULTI, torch.tensor(0.375), torch.tensor(3)),
    "layer for each row": (MULTI, torch.tensor(0.375), torch.tensor([0, 4, 2, 2, 0])),
    "t and layer for each row": (MULTI, torch.tensor([0.5, 0.125, 0.5, 0.125, 0.5]), torch.tensor([4, 4, 1, 0, 1])),
    "skip, scalar t": (SKIP, torch.tensor(0.375), None),
    "skip, t for each row": (SKIP, torch.tensor([0.0, 1.0, 0.25, 0.25, 0.125]), None),
    "norms, scalar t": (NORM, torch.tensor(0.375), None),
    "norms, t for each row": (NORM, torch.tensor([0.0, 1.0, 0.25, 0.25, 0.125]), None),
    "norms, t and layer for each row": (
        *(NORM_MULTI, torch.tensor([0.5, 0.125, 0.5, 0.125, 0.5]), torch.tensor([4, 4, 1, 0, 1])),
    ),
}


@pytest.mark.parametrize(("config", "t", "layer"), CASES.values(), ids=CASES)
# The sinusoid is float32 by design: its angles carry an error of 3e-5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-4), (torch.float32, 3e-4)])
def test_equals_the_row_by_row_reference(config, t, layer, dtype, tolerance):
    denoiser, z = make(config, dtype), draw(5, 6, dtype=dtype)
    expected = reference(denoiser, z, t, layer)
    assert expected.abs().mean() > 0.2
    found = denoiser(z, t, layer)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("config", "t", "layer"), CASES.values(), ids=CASES)
def test_gradients_equal_the_reference(config, t, layer):
    denoiser = make(config)
    gradients = []
    for function in (denoiser, lambda *a: reference(denoiser, *a)):
        z = draw(5, 6).requires_grad_()
        loss = (function(z, t, layer) * draw(5, 6).flip(0)).sum()
        gradients.append(torch.autograd.grad(loss, [z, *denoiser.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(found, expected, atol=1e-3 * scale, rtol=1e-3)


def test_times_are_embedded_once_each():
    denoiser, rows = make(MULTI), []
    for embedding in (denoiser.time_embed, denoiser.layer_embed):
        embedding.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    t = torch.tensor([0.5, 0.125]).repeat(50)
    denoiser(draw(100, 6), t, torch.tensor([3, 1, 4, 1]).repeat(25))
    assert rows == [2, 3]


def test_rows_do_not_depend_on_each_other():
    denoiser, z, t = make(SINGLE), draw(7, 6), torch.linspace(0, 1, 7)
    whole = denoiser(z, t)
    for i in range(7):
        torch.testing.assert_close(denoiser(z[i : i + 1], t[i : i + 1])[0], whole[i])
    assert denoiser(z[:0], t[:0]).shape == (0, 6)


def test_meta_neurons_are_the_inputs_of_down_proj():
    denoiser, z = make(SINGLE), draw(5, 6)
    seen = []
    for block in denoiser.layers:
        block.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    factors = denoiser.factors(torch.tensor([0.1]))
    velocity = denoiser.run(z, torch.tensor(0.1), factors)
    taken = list(seen)  # the units are asked for with the same hooks in place
    hidden = list(denoiser.units(z, factors))
    assert [tuple(h.shape) for h in hidden] == [(5, 20)] * 3
    assert all(torch.equal(a, b) for a, b in zip(hidden, taken, strict=True))
    assert torch.equal(velocity, denoiser(z, torch.tensor(0.1)))


def test_block_called_alone_adds_its_hidden_units():
    block, x, e = make(SINGLE).layers[0], draw(5, 12), draw(2, 12)
    index = torch.tensor([0, 1, 1, 0, 1])
    expected = x + block.down_proj(block.hidden(x, block.time_proj(e[index])))
    torch.testing.assert_close(block(x, Condition(torch.tensor([0.2, 0.4]), e, index)), expected)


@pytest.mark.parametrize("config", [SINGLE, MULTI, NORM, NORM_MULTI], ids=str)
def test_distinct_times_and_layers_with_an_index_are_times_and_layers_of_each_row(config: DenoiserConfig):
    denoiser, z = make(config), draw(6, config.d_input)
    t, index = torch.tensor([0.1, 0.7]).double(), torch.tensor([1, 0, 1, 1, 0, 0])
    layer = torch.tensor([2, 0]) if config.multi_layer_n_layers else None
    rows = None if layer is None else layer[index]
    expected = denoiser(z, t[index], rows)
    torch.testing.assert_close(
        denoiser(z, t, layer, time_index=index, layer_index=None if layer is None else index), expected
    )
    torch.testing.assert_close(denoiser.run(z, t[index], denoiser.row_factors(t[index], rows)), expected)


def test_low_precision_weights_keep_the_dtype_of_the_state():
    exact, rounded = make(SINGLE, torch.float32), make(SINGLE, torch.bfloat16)
    z = draw(5, 6, dtype=torch.float32)
    velocity = rounded(z, torch.tensor(0.3))
    assert rounded.dtype == torch.bfloat16 and velocity.dtype == torch.float32
    error = (velocity - exact(z, torch.tensor(0.3))).norm() / velocity.norm()
    assert 0 < error < 0.1


def test_layers_must_fit_the_denoiser():
    z, t = draw(2, 6), torch.tensor(0.5)
    with pytest.raises(InputError, match="`layer`"):
        make(SINGLE)(z, t, torch.tensor(0))
    with pytest.raises(InputError, match="several layers"):
        make(MULTI)(z, t)
    for layer in (5, -1):
        with pytest.raises(InputError, match=rf"layer must lie in 0\.\.4, got \[0, {layer}\]|got \[{layer}, 0\]"):
            make(MULTI)(z, t, torch.tensor([0, layer]))


def test_one_layer_of_one():
    denoiser = make(DenoiserConfig(6, 12, 20, 1, multi_layer_n_layers=1))
    assert denoiser(draw(2, 6), torch.tensor(0.5), torch.tensor(0)).isfinite().all()


def test_the_time_path_is_cached_in_a_context_only(monkeypatch):
    net = Denoiser(DenoiserConfig(6, 8, 16, 2)).eval().requires_grad_(False)
    asked = []
    factors = Denoiser.factors
    monkeypatch.setattr(Denoiser, "factors", lambda self, t: asked.append(t.tolist()) or factors(self, t))
    with torch.no_grad():
        assert net.cached_factors([0.25, 0.5]) is not net.cached_factors([0.25, 0.5]) and len(asked) == 2
        with net.caching():
            first, other = net.cached_factors([0.25, 0.5]), net.cached_factors([0.25, 0.75])
            with net.caching():
                assert net.cached_factors([0.25, 0.5]) is first
            assert net.cached_factors([0.25, 0.75]) is other and len(asked) == 4
            net.time_embed[0].weight.add_(0.5)  # as an optimizer's step
            changed = net.cached_factors([0.25, 0.75])
            assert len(asked) == 5 and not torch.equal(changed[0][0], first[0][0])
            net.to(torch.bfloat16)
            assert net.cached_factors([0.25, 0.75])[0].dtype == torch.bfloat16 and len(asked) == 6
            copied = copy.deepcopy(net)
        assert net.cached_factors([0.25, 0.75]) is not net.cached_factors([0.25, 0.75]) and len(asked) == 8
        copied.cached_factors([0.25, 0.75])
        copied.cached_factors([0.25, 0.75])
        assert len(asked) == 10
    with net.caching():
        net.cached_factors([0.25, 0.75])
        net.cached_factors([0.25, 0.75])  # a graph for gradients is never cached
    assert len(asked) == 12


def test_no_time_path_outlives_its_weights():
    """`data.copy_` and a freed address leave nothing to tell new weights by, so nothing may be kept."""
    net, other = (Denoiser(DenoiserConfig(6, 8, 16, 2)).eval().requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        with net.caching():
            net.cached_factors([0.25, 0.5])
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.data.copy_(q)
        assert all(map(torch.equal, net.cached_factors([0.25, 0.5]), other.cached_factors([0.25, 0.5])))
        with net.caching():
            assert all(map(torch.equal, net.cached_factors([0.25, 0.5]), other.cached_factors([0.25, 0.5])))


def test_what_is_cached_is_bounded():
    net = Denoiser(DenoiserConfig(6, 8, 16, 2)).eval().requires_grad_(False)
    with torch.no_grad(), net.caching():
        for i in range(1000):
            net.cached_factors([i / 1000])
            assert len(net._cache) <= 64
