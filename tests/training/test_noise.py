"""The random numbers of a step belong to its lanes, so that they do not depend on who computes what."""

from __future__ import annotations

import pytest
import torch

from latentprior.config import Recipe
from latentprior.data.partition import Deal
from latentprior.training.noise import Draws
from latentprior.utils.distributed import World
from latentprior.utils.random import keyed_generator

CPU = torch.device("cpu")


@pytest.mark.parametrize("times", ["grid", "uniform", "stratified", "logit_normal"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_draw_what_one_draws(times, size):
    recipe = Recipe(batch_size=96, times=times, distinct_times=8, weighting="snr")
    whole = Draws.of(5, 7, Deal(96, 7), 4, recipe, CPU)
    for rank in range(size):
        deal = Deal(96, 7, World(rank, size))
        part, places = Draws.of(5, 7, deal, 4, recipe, CPU), deal.positions()
        assert torch.equal(part.noise, whole.noise[places])
        assert torch.equal(part.t, whole.t[places])
        assert torch.equal(part.weight, whole.weight[places])


def test_no_lane_sees_one_noise_level_more_often():
    recipe = Recipe(batch_size=64)
    deal = Deal(64, 4)
    t = torch.stack([Draws.of(0, step, deal, 1, recipe, CPU).t.view(4, 16).mean(1) for step in range(600)])
    torch.testing.assert_close(t.mean(0), torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_noise_is_standard_normal_and_not_paired_with_times():
    draws = Draws.of(0, 0, Deal(20_000, 24), 2, Recipe(batch_size=20_000), CPU)
    assert abs(float(draws.noise.mean())) < 0.02 and float(draws.noise.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([draws.t, draws.noise[:, 0]]))[0, 1])) < 0.03


def test_distinct_times_and_their_index():
    recipe = Recipe(batch_size=64, times="stratified", distinct_times=8)
    draws = Draws.of(0, 0, Deal(64, 3), 1, recipe, CPU)
    distinct, index = draws.times()
    assert len(distinct) == 8 and torch.equal(distinct[index], draws.t)
    some = draws.select(torch.tensor([3, 60]))
    assert torch.equal(some.noise, draws.noise[[3, 60]]) and torch.equal(some.t, draws.t[[3, 60]])
    distinct, index = some.times()
    assert torch.equal(distinct[index], some.t)


def test_generators_of_neighbouring_keys_are_unrelated():
    drawn = [
        torch.randn(4, generator=keyed_generator(*key)) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 2)]
    ]
    assert torch.equal(drawn[0], drawn[4])
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:4])
