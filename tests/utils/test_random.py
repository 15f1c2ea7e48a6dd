"""Draws come from explicit sources, and a seed means the same everywhere."""

from __future__ import annotations

import pytest
import torch

from latentprior.utils.random import generator_of, keyed_generator, normal, seed_of


def test_equal_seeds_draw_equal_numbers():
    assert torch.equal(normal(3, 5, seed=7), normal(3, 5, seed=7))
    assert not torch.equal(normal(3, 5, seed=7), normal(3, 5, seed=8))


def test_a_generator_is_used_and_advances():
    generator = torch.Generator().manual_seed(7)
    assert generator_of(generator) is generator
    first, second = normal(6, seed=generator), normal(6, seed=generator)
    assert torch.equal(first, normal(6, seed=7)) and not torch.equal(first, second)


@pytest.mark.parametrize("seed", [3, torch.Generator().manual_seed(3)], ids=["number", "generator"])
def test_the_default_generator_is_left_alone_if_a_seed_is_given(seed):
    before = torch.get_rng_state()
    normal(10, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_numbers_are_fresh_and_torchs_seed_rules_them():
    torch.manual_seed(5)
    first, second = normal(6, seed=None), normal(6, seed=None)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, normal(6, seed=None)) and torch.equal(second, normal(6, seed=None))
    torch.manual_seed(6)
    assert not torch.equal(first, normal(6, seed=None))


def test_the_seed_of_a_number_is_the_number_and_a_generator_draws_one():
    assert [seed_of(0), seed_of(7)] == [0, 7]
    generator = torch.Generator().manual_seed(7)
    first, second = seed_of(generator), seed_of(generator)
    assert first == seed_of(torch.Generator().manual_seed(7)) and first != second
    torch.manual_seed(7)
    assert seed_of(None) == first  # the default generator in its place


def test_neighbouring_keys_do_not_collide():
    draws = {float(torch.rand(1, generator=keyed_generator(seed, i))) for seed in range(20) for i in range(20)}
    assert len(draws) == 400


def test_numbers_are_standard_normal():
    x = normal(100_000, seed=0)
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02


@pytest.mark.gpu
def test_a_seed_means_the_same_on_every_device():
    assert torch.equal(normal(100, seed=1, device="cuda").cpu(), normal(100, seed=1))
