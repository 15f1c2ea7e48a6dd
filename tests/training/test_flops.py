"""The FLOPs of training, counted from shapes, are those that are executed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentprior.config import DenoiserConfig, Recipe
from latentprior.data.partition import Batch, BatchPartition
from latentprior.prior.cost import distinct_times, training_flops
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loss import backward
from latentprior.training.noise import NoiseSamples


@pytest.mark.parametrize("times", ["stratified", "uniform"])
def test_flops_of_a_step_are_those_executed(times):
    recipe = Recipe(batch_size=64, times=times, distinct_times=8, noise_samples=2)
    config = DenoiserConfig(6, 16, 32, 2)
    net, device = Denoiser(config), torch.device("cpu")
    normalizer = Normalizer(torch.zeros(1, 6), torch.ones(1, 6), [0])
    partition = BatchPartition(64, 4)
    samples = [NoiseSamples.draw(0, step, partition, 6, recipe, device) for step in range(recipe.noise_samples)]
    with FlopCounterMode(display=False) as counter:
        backward(
            net,
            normalizer,
            Batch(torch.randn(64, 6)),
            samples,
            64,
            partition=partition,
            precision=torch.float32,
            micro_batch=None,
        )
    assert counter.get_total_flops() == pytest.approx(64 * training_flops(config, recipe, 64).activation, rel=1e-9)


def test_flops_of_a_run_count_the_grids_distinct_times_and_muons_update():
    config, grid, muon = DenoiserConfig(6, 16, 32, 2), Recipe(times="grid"), Recipe(times="grid", optimizer="muon")
    times = torch.randint(1000, (2000, 4096), generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(2000, 1000).scatter_(1, times, 1.0).sum(1).mean()
    assert distinct_times(grid, 4096) == pytest.approx(float(seen), rel=1e-3)
    assert training_flops(config, grid, 4096).update == 0 < training_flops(config, muon, 4096).update
