"""Draws come from explicit sources, and a seed means the same everywhere."""

from __future__ import annotations

import pytest
import torch

from latentprior.random import generator_of, normal


def test_equal_seeds_draw_equal_numbers():
    assert torch.equal(normal(3, 5, seed=7), normal(3, 5, seed=7))
    assert not torch.equal(normal(3, 5, seed=7), normal(3, 5, seed=8))
    assert torch.equal(normal(4, seed=None), normal(4, seed=0))


def test_a_generator_is_used_and_advances():
    generator = torch.Generator().manual_seed(7)
    assert generator_of(generator) is generator
    first, second = normal(6, seed=generator), normal(6, seed=generator)
    assert torch.equal(first, normal(6, seed=7)) and not torch.equal(first, second)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_global_generator_is_not_touched(seed):
    before = torch.get_rng_state()
    normal(10, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_are_standard_normal():
    x = normal(100_000, seed=0)
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02


@pytest.mark.gpu
def test_a_seed_means_the_same_on_every_device():
    assert torch.equal(normal(100, seed=1, device="cuda").cpu(), normal(100, seed=1))
