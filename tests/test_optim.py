"""Learning rate, optimizer and averaged weights against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latentprior.config import PRESETS, Recipe
from latentprior.optim import AveragedWeights, adamw, learning_rate

RECIPE = Recipe(learning_rate=2.0, warmup=0.1, final_rate=0.25)


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


@pytest.mark.parametrize("recipe", [*PRESETS.values(), Recipe(warmup=0.0), Recipe(warmup=1.0)])
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
    optimizer = adamw(model, recipe)
    w, m, v = weight.detach().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(1, 5):
        gradient = torch.tensor([0.5 * step, -1.0])
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        w = w * (1 - 0.1 * 0.3) - 0.1 * update
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=1e-6)


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
