"""Rates, optimizers, initial weights and averaged weights against their formulas."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from latentprior.config import PRESETS, DenoiserConfig, Recipe
from latentprior.prior import flow
from latentprior.prior.denoiser import Block, Denoiser
from latentprior.training.optim import (
    AveragedWeights,
    initialise,
    optimizers,
    principal_directions,
    rate_share,
    set_rates,
)
from latentprior.utils.errors import InputError

RECIPE = Recipe(learning_rate=2.0, warmup=0.1, final_rate=0.25)
MATRICES = [f"layers.{i}.{name}_proj.weight" for i in range(2) for name in ("up", "gate", "time", "down")]


def denoiser(d_model: int = 16, layers: int | None = None, d_input: int = 8) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(DenoiserConfig(d_input, d_model, 2 * d_model, 2, layers))


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    return recipe.learning_rate * rate_share(step, total, recipe)


def test_schedule_values():
    rates = [learning_rate(step, 1000, RECIPE) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)  # 1% of the peak
    assert rates[50] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert rates[100] == max(rates) == 2.0  # the warm-up's end
    assert rates[550] == pytest.approx(2.0 * (1 + 0.25) / 2)  # the cosine's middle
    assert rates[1000] == pytest.approx(0.5)  # where the run ends
    assert all(a < b for a, b in zip(rates[:100], rates[1:101], strict=True))
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))


def test_warm_up_is_linear():
    rates = torch.tensor([learning_rate(step, 1000, RECIPE) for step in range(101)], dtype=torch.float64)
    torch.testing.assert_close(rates.diff(), torch.full((100,), 2.0 * 0.99 / 100, dtype=torch.float64))


def test_linear_and_constant_schedules():
    linear = Recipe(warmup=0.1, final_rate=0.25, schedule="linear")
    assert rate_share(100, 1000, linear) == 1.0
    assert rate_share(550, 1000, linear) == pytest.approx((1 + 0.25) / 2)
    assert rate_share(1000, 1000, linear) == pytest.approx(0.25)
    constant = Recipe(warmup=0.1, final_rate=0.25, schedule="constant", cooldown=0.4)
    shares = [rate_share(step, 1000, constant) for step in range(1001)]
    assert set(shares[100:601]) == {1.0} and shares[601] < 1
    assert shares[800] == pytest.approx((1 + 0.25) / 2) and shares[1000] == pytest.approx(0.25)
    assert rate_share(999, 1000, Recipe(schedule="constant", cooldown=0.0)) == 1.0
    for recipe in (linear, constant):
        assert shares[:100] == [rate_share(step, 1000, recipe) for step in range(100)]  # the same warm-up


SCHEDULES = [Recipe(schedule=schedule, final_rate=0.0, warmup=0.02) for schedule in ("linear", "constant")]


@pytest.mark.parametrize("recipe", [*PRESETS.values(), *SCHEDULES, Recipe(warmup=0.0), Recipe(warmup=1.0)])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_any_run_has_rates_between_zero_and_the_peak(recipe, total):
    rates = [learning_rate(step, total, recipe) for step in range(total)]
    assert all(0 < rate <= recipe.learning_rate for rate in rates)
    assert rates[0] == pytest.approx(0.01 * recipe.learning_rate)


def test_the_papers_recipe():
    rates = [learning_rate(step, 10_000, PRESETS["official"]) for step in range(10_000)]
    assert rates[0] == pytest.approx(5e-7) and rates[100] == max(rates) == 5e-5
    assert rates[-1] == pytest.approx(5e-6, rel=1e-3)


def test_adamw_updates_by_its_formula():
    recipe = Recipe(learning_rate=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    model = nn.ParameterList([weight])
    (optimizer,) = optimizers(model, recipe)
    w, m, v = weight.detach().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 5):
        gradient = torch.tensor([0.5 * step, -1.0])
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        w = w * (1 - 0.1 * 0.3) - 0.1 * update
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-6)


def test_one_adamw_with_one_group_by_default():
    model = denoiser()
    (optimizer,) = optimizers(model, PRESETS["official"])
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["fused"]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert (group["lr"], group["peak"], group["betas"], group["weight_decay"]) == (5e-5, 5e-5, (0.9, 0.999), 0.01)


@pytest.mark.parametrize("layers", [None, 4])
def test_muon_takes_the_matrices_of_the_blocks(layers):
    model = denoiser(layers=layers)
    muon, adamw = optimizers(model, Recipe(optimizer="muon", matrix_rate=0.5, weight_decay=0.3))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    (matrices,), (rest,) = muon.param_groups, adamw.param_groups
    assert names(model, matrices) == set(MATRICES)
    assert names(model, rest) == {name for name, _ in model.named_parameters()} - set(MATRICES)
    assert (matrices["lr"], matrices["peak"], matrices["weight_decay"]) == (0.5, 0.5, 0.3)
    assert (rest["lr"], rest["peak"]) == (5e-5, 5e-5)


def test_muon_moves_along_the_orthogonalised_gradient():
    model = denoiser()
    muon, _ = optimizers(model, Recipe(optimizer="muon", matrix_rate=0.5, weight_decay=0.0))
    up, down = model.layers[0].up_proj.weight, model.layers[0].down_proj.weight
    generator, before, gradient = torch.Generator().manual_seed(1), {}, {}
    for p in (up, down):
        p.grad = torch.randn(p.shape, generator=generator)
        before[p], gradient[p] = p.detach().clone(), p.grad.clone()
    muon.step()
    for p, scale in ((up, math.sqrt(2)), (down, 1.0)):  # sqrt(max(1, out / in))
        u, _, vt = torch.linalg.svd(gradient[p], full_matrices=False)
        step = (before[p] - p.detach()) / (0.5 * scale)
        assert torch.linalg.svdvals(step).max() < 1.3 and torch.linalg.svdvals(step).min() > 0.5
        cosine = torch.nn.functional.cosine_similarity(step.flatten(), (u @ vt).flatten(), dim=0)
        assert cosine > 0.95


def test_width_transfer_scales_what_has_a_growing_fan_in():
    model = denoiser(d_model=64, layers=4)
    wide = {n for n, p in model.named_parameters() if p.ndim == 2} - {"in_proj.weight"}
    assert {"out_proj.weight", "time_embed.0.weight", "layer_embed.2.weight", *MATRICES} <= wide
    (optimizer,) = optimizers(model, Recipe(learning_rate=0.1, base_width=16))
    groups = {g["peak"]: names(model, g) for g in optimizer.param_groups}
    assert groups == {0.1: {n for n, _ in model.named_parameters()} - wide, 0.1 * 16 / 64: wide}
    muon, adamw = optimizers(model, Recipe(learning_rate=0.1, base_width=16, optimizer="muon", matrix_rate=0.5))
    assert [g["peak"] for g in muon.param_groups] == [0.5]
    groups = {g["peak"]: names(model, g) for g in adamw.param_groups}
    assert groups[0.1 * 16 / 64] == wide - set(MATRICES)
    assert len(optimizers(denoiser(16), Recipe(base_width=16))[0].param_groups) == 1


def test_rates_are_set_from_their_peaks():
    both = optimizers(denoiser(), Recipe(optimizer="muon", learning_rate=0.1, base_width=8))
    for share in (0.5, 0.0, 1.0):
        set_rates(both, share)
        found = sorted(g["lr"] for o in both for g in o.param_groups)
        assert found == pytest.approx([0.02 * share, 0.05 * share, 0.1 * share])


def growth(recipe: Recipe, widths: tuple[int, ...] = (32, 256)) -> float:
    """How much more the blocks' sum changes over a few steps in a wide denoiser than in a narrow one."""
    generator = torch.Generator().manual_seed(0)
    z_0, noise = torch.randn(2, 128, 8, generator=generator)
    t = (torch.arange(128) % 8 + 0.5) / 8
    z_t, change = flow.interpolate(z_0, noise, t), []
    for width in widths:
        model = denoiser(width)
        initialise(model, recipe, torch.Generator().manual_seed(1))
        seen = []
        model.ln.register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[0].detach()))
        updates = optimizers(model, recipe)
        for _ in range(6):
            (model(z_t, t) - flow.target(z_0, noise)).square().mean().backward()
            for optimizer in updates:
                optimizer.step()
                optimizer.zero_grad()
        change.append(float((seen[-1] - seen[0]).square().mean().sqrt()))
    return change[-1] / change[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_width_transfer_hidden_activations_move_alike_at_any_width(optimizer):
    """The coordinate check of muP."""
    recipe = Recipe(learning_rate=2e-3, init="scaled", base_width=32, optimizer=optimizer, matrix_rate=0.05)
    assert 0.5 < growth(recipe) < 2.0


def test_without_width_transfer_they_move_more_the_wider_it_is():
    assert growth(Recipe(learning_rate=2e-3, init="scaled")) > 3.0


def test_default_initial_weights_are_left_alone():
    model = denoiser()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialise(model, Recipe(), torch.Generator().manual_seed(5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scaled_initial_weights():
    model, recipe, state = denoiser(128, layers=4), Recipe(init="scaled"), torch.get_rng_state()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    initialise(model, recipe, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        if name == "out_proj.weight" or (name.endswith("bias") and "time_proj" not in name):
            assert not p.any(), name
        elif p.ndim == 2:
            branches = math.sqrt(2 * 2) if "down_proj" in name else 1.0
            assert float(p.detach().std()) == pytest.approx(p.shape[1] ** -0.5 / branches, rel=0.1), name
        else:  # the scales of the norms and the time factor's bias
            assert (p == 1).all(), name
    again = denoiser(128, layers=4)
    initialise(again, recipe, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    initialise(again, recipe, torch.Generator().manual_seed(6))
    assert not torch.equal(model.in_proj.weight, again.in_proj.weight)
    assert not model(torch.randn(3, 8), torch.rand(3), torch.tensor([0, 1, 2])).any()


@pytest.mark.parametrize("width", [32, 256])
def test_scaled_blocks_start_at_unit_size(width):
    """torch's own initial weights leave the gates shut: their units start a hundred times smaller."""
    model = denoiser(width)
    x, t = torch.randn(64, width, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 64)
    size = {}
    for init in ("default", "scaled"):
        initialise(model, Recipe(init=init), torch.Generator().manual_seed(5))
        block = model.layers[0]
        assert isinstance(block, Block)
        size[init] = float(block.hidden(x, model.factors(t)[0]).detach().square().mean().sqrt())
    assert 0.3 < size["scaled"] < 1.5 and size["default"] < 0.05


def test_principal_initial_weights():
    """The stream starts as coordinates along the directions, the output leads back; the first prediction is zero."""
    spread = torch.tensor([3.0, 0.1, 2.0, 1.0, 0.5, 0.2, 4.0, 1.5])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    z = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(4)) * spread @ turn
    directions = principal_directions(z)
    torch.testing.assert_close(directions.T @ directions, torch.eye(8), atol=1e-5, rtol=0)
    assert (z @ directions).std(0).tolist() == pytest.approx(sorted(spread.tolist(), reverse=True), rel=0.05)
    for width in (4, 8, 16):
        model = Denoiser(DenoiserConfig(8, width, 32, 2, modulation="norm"))
        initialise(model, Recipe(init="principal"), torch.Generator().manual_seed(5), directions)
        assert not model(z[:3], torch.rand(3)).any()
        stream = model.in_proj(z[:5])
        torch.testing.assert_close(stream[:, :8], (z[:5] @ directions)[:, :width], atol=1e-5, rtol=1e-5)
        assert not stream[:, 8:].any()
        kept = directions[:, :width]
        torch.testing.assert_close(model.out_proj(stream), z[:5] @ kept @ kept.T, atol=1e-4, rtol=1e-4)
        assert all(
            float(b.up_proj.weight.detach().std()) == pytest.approx(0.3 * width**-0.5, rel=0.3) for b in model.layers
        )
    with pytest.raises(InputError, match="principal directions"):
        initialise(model, Recipe(init="principal"), torch.Generator())


def test_what_time_alone_passes_through_has_its_own_rate():
    config = DenoiserConfig(8, 16, 32, 2, multi_layer_n_layers=4, modulation="norm")
    model = Denoiser(config)
    (adamw,) = optimizers(model, Recipe(learning_rate=0.1, time_rate=0.5, base_width=8))
    rate = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert len(rate) == len(rates)
    for name, found in rates.items():
        of_time = any(part in name for part in ("time_embed", "layer_embed", "time_proj"))
        wide = name.endswith("weight") and "ln" not in name and name != "in_proj.weight"
        assert found == pytest.approx(0.1 * (0.5 if of_time else 1.0) * (0.5 if wide else 1.0)), name


def test_average_is_the_exponential_one():
    model = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(0)
    average = AveragedWeights(model, 0.5)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(12):
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)
        assert value.data_ptr() != dict(model.named_parameters())[name].data_ptr() and not value.requires_grad


def test_average_forgets_the_initial_weights():
    """A plain average of decay 0.999 would still be 90% of them after 100 steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1e6)
    average = AveragedWeights(model, 0.999)
    nn.init.constant_(model.weight, 1.0)
    for step in range(100):
        average.update(model, step)
    share = math.prod((1 + step) / (10 + step) for step in range(100))
    assert average.state_dict()["weight"].item() == pytest.approx(1 + share * (1e6 - 1), rel=1e-3)
    assert share < 1e-11


@pytest.mark.parametrize("error", [None, KeyError])
def test_the_average_takes_the_weights_place_for_a_while(error):
    model = denoiser()
    average = AveragedWeights(model, 0.5)
    for p in model.parameters():
        p.data.add_(1.0)
    average.update(model, 0)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    averaged = {name: value.clone() for name, value in average.state_dict().items()}
    storage = [p.data_ptr() for p in model.parameters()]
    with contextlib.suppress(KeyError), average.in_place_of(model):
        assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
        assert [p.data_ptr() for p in model.parameters()] == storage
        if error:
            raise error
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, averaged[name]) for name, value in average.state_dict().items())
