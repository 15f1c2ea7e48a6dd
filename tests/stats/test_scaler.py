"""Standardising: scikit-learn's numbers, constants to zero, and no order among what the mean drowns."""

from __future__ import annotations

import pytest
import torch
from sklearn.preprocessing import StandardScaler

from latentprior import InputError
from latentprior.stats import scaler
from latentprior.stats.scaler import Scaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [10, 1 << 18])
def test_numbers_are_those_of_scikit_learn(dtype, chunk, monkeypatch):
    monkeypatch.setattr(scaler, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(60, 7, generator=generator) * torch.logspace(-3, 3, 7) + 5).to(dtype)
    before, train, test = x.clone(), x[:40], x[40:]
    theirs = StandardScaler().fit(train.double().numpy())
    ours = Scaler.of(train)
    for part in (train, test):
        expected = torch.from_numpy(theirs.transform(part.double().numpy()))
        torch.testing.assert_close(ours(part), expected, rtol=1e-9, atol=1e-9)
    places = torch.tensor([4, 1])
    assert torch.equal(ours.select(places)(x[:, places]), ours(x)[:, places])
    assert torch.equal(x, before)


def test_order_is_kept_but_not_below_what_the_mean_leaves():
    x = torch.tensor([[-3.0], [1e-40], [1e-30], [1e-9], [1e-3], [0.5], [9.0]])
    z = Scaler.of(x)(x).squeeze(1)
    assert (z.diff() >= 0).all()
    assert z.unique().tolist() == [float(z[i]) for i in (0, 1, 3, 4, 5, 6)]
    assert (z * 2**40 == (z * 2**40).round()).all()


def test_features_that_do_not_vary_become_zero():
    x = torch.full((50, 2), 0.1)
    fitted = Scaler.of(x)
    x[0] = 3.0  # among other rows
    assert not fitted(x).any()


def test_features_that_are_not_finite_are_refused():
    for value in (torch.nan, torch.inf):
        x = torch.zeros(5, 3)
        x[2, 1] = value
        with pytest.raises(InputError, match="finite"):
            Scaler.of(x)
