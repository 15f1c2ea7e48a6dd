"""What a run counts beside its steps: checkpoints that are due, and the FLOPs behind its shares of the peak."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentprior.config import DenoiserConfig, Recipe
from latentprior.data.partition import Batch, Deal
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loop import backward
from latentprior.training.noise import Draws
from latentprior.training.run import FIRST_CHECKPOINT, _passes_checkpoint, step_flops


def test_checkpoints_are_due_at_doublings():
    due = [done for done in range(1000, 40 * FIRST_CHECKPOINT // 10, 1000) if _passes_checkpoint(done - 1000, done)]
    assert [done // FIRST_CHECKPOINT for done in due] == [1, 2]
    assert _passes_checkpoint(0, 10 * FIRST_CHECKPOINT) and not _passes_checkpoint(FIRST_CHECKPOINT, 70_000)


@pytest.mark.parametrize("times", ["stratified", "uniform"])
def test_flops_of_a_step_are_those_executed(times):
    recipe = Recipe(batch_size=64, times=times, distinct_times=8, draws=2)
    config = DenoiserConfig(6, 16, 32, 2)
    net, device = Denoiser(config), torch.device("cpu")
    normalizer = Normalizer(torch.zeros(1, 6), torch.ones(1, 6), [0])
    draws = [Draws.of(0, step, Deal(64, 4), 6, recipe, device) for step in range(recipe.draws)]
    with FlopCounterMode(display=False) as counter:
        backward(
            net,
            normalizer,
            Batch(torch.randn(64, 6)),
            draws,
            64,
            deal=Deal(64, 4),
            precision=torch.float32,
            micro_batch=None,
        )
    assert counter.get_total_flops() == pytest.approx(step_flops(config, recipe, 1), rel=1e-9)
