"""Times of a step have their law at any batch size, and weights are what makes each objective."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentprior.config import Recipe
from latentprior.prior.flow import training_times
from latentprior.training.times import WEIGHT_LIMIT, draw_times, loss_weights

LAWS = ("grid", "uniform", "stratified", "logit_normal")


def many(recipe: Recipe, steps: int = 300, count: int = 200) -> Tensor:
    return torch.cat([draw_times(0, step, count, recipe) for step in range(steps)])


@pytest.mark.parametrize("times", LAWS)
@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 700), seed=st.integers(-(2**63), 2**64), step=st.integers(0, 2**40))
def test_any_step_has_ascending_times(times, count, seed, step):
    t = draw_times(seed, step, count, Recipe(times=times))
    assert t.shape == (count,) and t.dtype == torch.float32
    assert (t.diff() >= 0).all() and t.min() >= 0 and t.max() <= 1


@pytest.mark.parametrize("times", LAWS)
def test_times_depend_on_seed_and_step_alone(times):
    recipe, state = Recipe(times=times), torch.get_rng_state()
    first = draw_times(3, 7, 256, recipe)
    torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw_times(3, 7, 256, recipe), first)
    assert torch.equal(torch.get_rng_state(), state)
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(draw_times(seed, step, 256, recipe), first)


@pytest.mark.parametrize("times", ["grid", "uniform", "stratified"])
@pytest.mark.parametrize("count", [50, 64, 200])
def test_uniform_laws_are_uniform(times, count):
    t = many(Recipe(times=times), count=count).double()
    share = torch.histc(t, 10, 0, 1) / len(t)
    torch.testing.assert_close(share, torch.full((10,), 0.1, dtype=torch.float64), atol=0.01, rtol=0)


def test_the_grid_is_the_official_one():
    grid = training_times(torch.arange(1000) / 1000 + 5e-4)
    assert torch.isin(many(Recipe(), steps=5), grid).all()


@pytest.mark.parametrize("count", [1, 10, 64, 100, 512])
def test_rows_are_dealt_to_the_strata_evenly(count):
    recipe, strata = Recipe(times="stratified", distinct_times=64), torch.zeros(64)
    for step in range(400):
        t = draw_times(0, step, count, recipe)
        rows = torch.bincount((t * 64).long().clamp(max=63), minlength=64)
        assert rows.sum() == count and rows.min() >= count // 64 and rows.max() <= -(-count // 64)
        assert len(t.unique()) == min(count, 64)
        strata += rows
    if count % 64:  # those left over go anywhere
        deviation = math.sqrt(400 * min(count % 64, 64 - count % 64) / 64)
        torch.testing.assert_close(strata, torch.full((64,), 400 * count / 64), atol=5 * deviation, rtol=0)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-0.7, 0.5), (1.0, 2.0)])
def test_logits_of_logit_normal_times_are_normal(mean, scale):
    recipe = Recipe(times="logit_normal", logit_mean=mean, logit_scale=scale)
    assert len(draw_times(0, 0, 512, recipe).unique()) == 64
    logit = torch.logit(many(recipe).double())
    assert float(logit.mean()) == pytest.approx(mean, abs=0.02 * scale)
    assert float(logit.std()) == pytest.approx(scale, rel=0.02)
    below = (logit < mean - scale).double().mean()
    assert float(below) == pytest.approx(0.1587, abs=0.01)


def test_no_weights_where_all_are_equal():
    t = torch.rand(10, generator=torch.Generator().manual_seed(0))
    assert loss_weights(t, Recipe()) is None
    assert loss_weights(t, Recipe(times="logit_normal")) is None
    for times in ("grid", "uniform", "stratified"):
        assert loss_weights(t, Recipe(times=times, weighting="unbiased")) is None


@pytest.mark.parametrize(("times", "weighting"), [*itertools.product(LAWS, ["snr"]), ("logit_normal", "unbiased")])
def test_weights_have_mean_one_under_their_law(times, weighting):
    recipe = Recipe(times=times, weighting=weighting, logit_mean=0.4)
    weight = loss_weights(many(recipe), recipe)
    assert weight is not None and weight.dtype == torch.float32
    assert float(weight.mean()) == pytest.approx(1.0, abs=0.01)


def test_a_weight_depends_on_its_own_time_alone():
    recipe = Recipe(times="logit_normal", weighting="unbiased")
    t = draw_times(0, 0, 256, recipe)
    whole = loss_weights(t, recipe)
    assert whole is not None and torch.equal(whole[200:], loss_weights(t[200:], recipe))


def test_unbiased_weights_give_the_uniform_objective():
    """The weighted mean of a function over logit-normal times is its plain mean over those that are not clipped."""
    recipe = Recipe(times="logit_normal", weighting="unbiased", logit_mean=0.5, logit_scale=1.5)  # clips under 1%
    t = many(recipe, steps=2000).double()
    weight = loss_weights(t, recipe)
    assert weight is not None
    for function in (torch.sin, torch.square, lambda t: (t - 0.3).abs()):
        plain = function((torch.arange(10_000).double() + 0.5) / 10_000).mean()
        assert float((weight * function(t)).mean()) == pytest.approx(float(plain), rel=0.02)
    assert float(t.square().mean()) != pytest.approx(1 / 3, rel=0.05)  # without weights it is another objective


def test_unbiased_weights_are_inverse_densities_up_to_their_limit():
    recipe = Recipe(times="logit_normal", weighting="unbiased", logit_mean=0.3, logit_scale=0.8)
    t = torch.tensor([0.0, 1e-6, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    weight = loss_weights(t, recipe)
    assert weight is not None and weight.isfinite().all()
    density = torch.exp(-0.5 * ((torch.logit(t) - 0.3) / 0.8) ** 2) / (0.8 * math.sqrt(2 * math.pi) * t * (1 - t))
    torch.testing.assert_close((weight[2:5] / weight[3]).double(), density[3] / density[2:5], rtol=1e-5, atol=0)
    assert weight[0] == weight[1] == weight[5] == weight.max()
    limit = float(weight.max() / weight[3] / density[3])
    assert limit == pytest.approx(WEIGHT_LIMIT, rel=1e-5)


def test_snr_weights_are_the_inverse_variance_of_the_velocity_of_normal_data():
    t = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    weight = loss_weights(t, Recipe(weighting="snr"))
    assert weight is not None
    snr = ((1 - t) / t) ** 2
    torch.testing.assert_close(weight.double() * 2 / 3, t**2 * (snr + 1), rtol=1e-4, atol=0)  # 2/3: the uniform mean
    generator = torch.Generator().manual_seed(0)
    z_0, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for time, w in zip(t, weight, strict=True):
        both = torch.stack([(1 - time) * z_0 + time * noise, noise - z_0])
        cov = both.cov()
        variance = cov[1, 1] - cov[0, 1] ** 2 / cov[0, 0]  # of the velocity, given z_t
        assert float(variance * w * 2 / 3) == pytest.approx(1, rel=0.01)
