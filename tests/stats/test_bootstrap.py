from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from latentprior.stats import bootstrap as module
from latentprior.stats.bootstrap import bootstrap_interval
from latentprior.utils.errors import InputError


def test_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.exponential(2.0, 80), level=0.9, resamples=400, seed=trial)
        hits += low <= 2.0 <= high
    assert 0.84 <= hits / 300 <= 0.94


def test_covers_a_weighted_mean_when_weights_and_values_go_together():
    """Long documents are easier: the mean over tokens is not the mean over documents."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        tokens = rng.integers(1, 20, 80)
        low, high = bootstrap_interval(10 / tokens + rng.normal(size=80), tokens, level=0.9, resamples=400, seed=trial)
        hits += low <= 1.0 <= high  # E[10 / n * n] / E[n] = 10 / 10
    assert 0.84 <= hits / 300 <= 0.94


def test_has_the_width_of_the_central_limit():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.1)


def test_a_document_counts_once_however_many_tokens_it_has():
    """Weights all a hundred times larger are no more data."""
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, np.full(50, 100.0)) == pytest.approx(bootstrap_interval(values))


def test_entries_of_weight_zero_take_no_part():
    values = np.random.default_rng(0).normal(size=30)
    padded, weights = np.append(values, [1e9, -1e9]), np.append(np.ones(30), [0, 0])
    assert bootstrap_interval(padded, weights) == bootstrap_interval(values)


def test_wider_at_a_higher_level_and_nested():
    values = np.random.default_rng(0).normal(size=40)
    low, high = bootstrap_interval(values, level=0.5)
    lower, higher = bootstrap_interval(values, level=0.99)
    assert lower < low < high < higher


def test_the_seed_alone_decides_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).normal(size=40)
    state = np.random.get_state()[1].copy()
    first = bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) == first != bootstrap_interval(values, seed=2)
    assert (np.random.get_state()[1] == state).all()
    monkeypatch.setattr(module, "DRAWS_AT_ONCE", 400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == pytest.approx(first, abs=0.05)


def test_equal_values_have_no_width():
    assert bootstrap_interval([3.0, 3.0, 3.0], [1, 2, 3]) == (3.0, 3.0)


def test_takes_tensors_of_any_precision():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16, requires_grad=True)
    assert bootstrap_interval(values, torch.ones(4)) == bootstrap_interval([1.0, 2.0, 4.0, 8.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0]}, "at least 2"),
        ({"values": [1.0, 2.0], "weights": [1.0, 0.0]}, "at least 2"),
        ({"values": [1.0, 2.0], "weights": [1.0]}, r"must both be \[n\]"),
        ({"values": np.ones((2, 2))}, r"must both be \[n\]"),
        ({"values": [1.0, float("nan")]}, "finite"),
        ({"values": [1.0, 2.0], "weights": [1.0, -1.0]}, "not negative"),
        ({"values": [1.0, 2.0], "level": 1.0}, "level"),
        ({"values": [1.0, 2.0], "resamples": 0}, "resamples"),
    ],
)
def test_refuses_bad_input(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(bootstrap_interval)(**arguments)  # as without type checks
