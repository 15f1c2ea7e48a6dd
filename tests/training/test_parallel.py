"""Where a denoiser lies changes nothing of what it computes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from latentprior.config import DenoiserConfig, Recipe
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loop import State, TrainingLoop
from latentprior.training.parallel import check_float8, parallelize, whole_weights
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError


def denoiser() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(DenoiserConfig(6, 16, 32, 2))


def trained(compiled: bool) -> dict[str, torch.Tensor]:
    recipe = Recipe(batch_size=32, learning_rate=1e-2)
    net = denoiser()
    state = State.start(net, recipe, parallelize(net, World(), compiled=compiled))
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(32, 6, generator=generator), None) for _ in range(3)]
    normalizer = Normalizer(torch.zeros(1, 6), torch.ones(1, 6), [0])
    list(TrainingLoop(state, normalizer, recipe, 3, micro_batch=8).over(data))
    return whole_weights(net)


def compare() -> None:
    plain, compiled = trained(compiled=False), trained(compiled=True)
    assert plain.keys() == compiled.keys()  # of the same names: checkpoints do not depend on it
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_alike():
    """In a process of its own: torch cannot compile the type checks of the tests."""
    subprocess.run([sys.executable, __file__], check=True, timeout=240)


def test_one_process_calls_the_denoiser_itself():
    net = denoiser()
    assert parallelize(net, World()) is net
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole_weights(net).items())


def test_float8_says_what_it_needs():
    with pytest.raises(InputError, match="^float8 needs"):
        check_float8(torch.device("cpu"))


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_makes_no_update_on_a_gpu():
    """There the host looks a step later, but the weights are as they were."""
    from latentprior.training.loop import Diverged

    recipe = Recipe(batch_size=32, learning_rate=1e-2)
    net = denoiser().cuda()
    before = whole_weights(net)
    x = torch.full((32, 6), float("nan"))
    normalizer = Normalizer(torch.zeros(1, 6), torch.ones(1, 6), [0]).cuda()
    with pytest.raises(Diverged, match="^step 0"):
        list(TrainingLoop(State.start(net, recipe), normalizer, recipe, 1).over([(x, None)]))
    assert all(torch.equal(value, before[name]) for name, value in whole_weights(net).items())


if __name__ == "__main__":
    compare()
