"""The random numbers of a step belong to its document shards, so that they do not depend on who computes what."""

from __future__ import annotations

import pytest
import torch

from latentprior.config import Recipe
from latentprior.data.partition import BatchPartition
from latentprior.training.noise import NoiseSamples
from latentprior.utils.distributed import World
from latentprior.utils.random import keyed_generator

CPU = torch.device("cpu")


@pytest.mark.parametrize("times", ["grid", "uniform", "stratified", "logit_normal"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_draw_what_one_draws(times, size):
    recipe = Recipe(batch_size=96, times=times, distinct_times=8, weighting="snr")
    whole = NoiseSamples.draw(5, 7, BatchPartition(96, 7), 4, recipe, CPU)
    for rank in range(size):
        partition = BatchPartition(96, 7, World(rank, size))
        part, positions = NoiseSamples.draw(5, 7, partition, 4, recipe, CPU), partition.positions()
        assert torch.equal(part.noise, whole.noise[positions])
        assert torch.equal(part.t, whole.t[positions])
        assert torch.equal(part.weight, whole.weight[positions])


def test_no_shard_sees_one_noise_level_more_often():
    recipe = Recipe(batch_size=64)
    partition = BatchPartition(64, 4)
    t = torch.stack(
        [NoiseSamples.draw(0, step, partition, 1, recipe, CPU).t.view(4, 16).mean(1) for step in range(600)]
    )
    torch.testing.assert_close(t.mean(0), torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_noise_is_standard_normal_and_not_paired_with_times():
    samples = NoiseSamples.draw(0, 0, BatchPartition(20_000, 24), 2, Recipe(batch_size=20_000), CPU)
    assert abs(float(samples.noise.mean())) < 0.02 and float(samples.noise.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([samples.t, samples.noise[:, 0]]))[0, 1])) < 0.03


def test_distinct_times_and_their_index():
    recipe = Recipe(batch_size=64, times="stratified", distinct_times=8)
    samples = NoiseSamples.draw(0, 0, BatchPartition(64, 3), 1, recipe, CPU)
    distinct, index = samples.times()
    assert len(distinct) == 8 and torch.equal(distinct[index], samples.t)
    some = samples.select(torch.tensor([3, 60]))
    assert torch.equal(some.noise, samples.noise[[3, 60]]) and torch.equal(some.t, samples.t[[3, 60]])
    distinct, index = some.times()
    assert torch.equal(distinct[index], some.t)


def test_generators_of_neighbouring_keys_are_unrelated():
    drawn = [
        torch.randn(4, generator=keyed_generator(*key)) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 2)]
    ]
    assert torch.equal(drawn[0], drawn[4])
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:4])
