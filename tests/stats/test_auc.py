from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from latentprior.stats import auc as module
from latentprior.stats.auc import aucs, class_difference, probe_1d, stratified_folds
from latentprior.stats.scaler import Scaler
from latentprior.utils.errors import InputError


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    values = [roc_auc_score(y.numpy(), column) for column in x.double().numpy().T]
    return torch.tensor(values, dtype=torch.float64)


def labels(n: int, seed: int) -> torch.Tensor:
    y = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.4).long()
    y[0], y[1] = 0, 1
    return y


@given(st.integers(0, 10_000), st.integers(4, 60), st.sampled_from(["float32", "bfloat16", "float16", "float64"]))
@settings(deadline=None, max_examples=80)
def test_auc_equals_scikit_learn_with_any_ties(seed, n, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    x[:, 1] = x[:, 1].round()  # many ties
    x[:, 2] = x[:, 2].clamp(min=0)  # one heavy tie
    x[:, 3] = torch.where(torch.rand(n, generator=generator) < 0.5, 0.0, -0.0)  # equal, though their bits differ
    x[:, 4] *= 1e-42  # subnormal
    x = x.to(getattr(torch, dtype))
    y = labels(n, seed)
    torch.testing.assert_close(aucs(x, y), reference(x, y), rtol=0, atol=1e-12)


def test_small_differences_are_not_taken_for_ties():
    x = torch.tensor([[1.0], [1.0 + 2**-23], [-1.0], [-1.0 - 2**-23]])
    assert aucs(x, torch.tensor([0, 1, 1, 0])).item() == 0.75


def test_features_in_chunks_are_those_at_once(monkeypatch):
    x, y = torch.randn(50, 33, generator=torch.Generator().manual_seed(1)), labels(50, 2)
    whole = aucs(x, y), class_difference(x, y)
    monkeypatch.setattr(module, "CHUNK", 200)
    assert torch.equal(aucs(x, y), whole[0])
    torch.testing.assert_close(class_difference(x, y), whole[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [2, 5])
def test_folds_are_those_of_scikit_learn(k):
    y = labels(83, 3)
    fold = stratified_folds(y, k)
    for number, (_, rows) in enumerate(StratifiedKFold(k).split(np.zeros(83), y.numpy())):
        assert (fold == number).nonzero().squeeze(1).tolist() == rows.tolist()


def test_the_probe_follows_the_protocol_by_hand():
    generator = torch.Generator().manual_seed(4)
    y, y_test = labels(100, 5), labels(60, 6)
    x = torch.randn(100, 30, generator=generator) + y[:, None] * torch.linspace(-1, 1, 30)
    x_test = torch.randn(60, 30, generator=generator) + y_test[:, None] * torch.linspace(-1, 1, 30)
    probes = probe_1d(x, y, candidates=7, folds=4)

    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    assert probes.units.tolist() == difference.abs().argsort(descending=True)[:7].tolist()
    fold = stratified_folds(y, 4)
    for place, unit in enumerate(probes.units.tolist()):
        found = []
        for k in range(4):
            inside, column = fold != k, x[:, unit]
            rising = column[inside & (y == 1)].mean() > column[inside & (y == 0)].mean()
            auc = roc_auc_score(y[fold == k], column[fold == k])
            found.append(auc if rising else 1 - auc)
        assert probes.validation_auc[place].item() == pytest.approx(np.mean(found), abs=1e-12)
        test = roc_auc_score(y_test, x_test[:, unit] * difference[unit].sign())
        assert probes.test_auc(torch.tensor([place]), x_test, y_test).item() == pytest.approx(test, abs=1e-12)
    assert probes.best() == int(probes.validation_auc.argmax())
    assert probes.best(2) == int(probes.validation_auc[:2].argmax())


@given(st.integers(0, 10_000), st.sampled_from([1, 5, 12, None]))
@settings(deadline=None, max_examples=40)
def test_choosing_from_a_subset_is_probing_it_alone(seed, candidates):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(80, 40, generator=generator), labels(80, seed)
    x[:, 5:20] = x[:, 5:20].round()  # ties in order and in AUC
    x[:, 20:24] = 1.0
    subsets = torch.rand(3, 40, generator=generator) < torch.tensor([[0.2], [0.6], [1.1]])
    subsets[0, 3] = True
    kept = [probe_1d(x, y, candidates=n, folds=2, subsets=subsets) for n in {candidates, None}]
    for probes, subset in itertools.product(kept, subsets):
        units = subset.nonzero().squeeze(1)
        alone = probe_1d(x[:, units], y, candidates=candidates, folds=2)
        here, there = probes.best(candidates, subset), alone.best()
        assert probes.units[here] == units[alone.units[there]]
        assert (probes.validation_auc[here], probes.sign[here]) == (alone.validation_auc[there], alone.sign[there])
        test = [p.test_auc(torch.tensor([i]), z, y) for p, i, z in ((probes, here, x), (alone, there, x[:, units]))]
        assert torch.equal(*test)
    assert all(probes.best(candidates) == probes.best(candidates, subsets[2]) for probes in kept)  # of all features


def test_a_constant_feature_says_nothing():
    x, y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), labels(40, 1)
    x[:, 1] = 3
    probes = probe_1d(x, y, candidates=None, folds=3)
    place = probes.units.tolist().index(1)
    assert (probes.sign[place], probes.validation_auc[place]) == (0, 0.5)


def test_affine_changes_that_keep_the_order_change_nothing():
    x, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(9)).double(), labels(64, 1)
    scaled = x * torch.tensor([2.0, 0.5, 8.0, 1.0, 3.0]) + 7
    torch.testing.assert_close(aucs(scaled, y), aucs(x, y))
    torch.testing.assert_close(aucs(-x, y), 1 - aucs(x, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * torch.nan, y), "finite"),
        (lambda x, y: (x, y * 0), "both must occur"),
        (lambda x, y: (x, y + 1), "0 and 1"),
        (lambda x, y: (x, torch.tensor([1] + [0] * 19)), "5 folds need"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, y = change(torch.randn(20, 3), torch.arange(20) % 2)
    with pytest.raises(InputError, match=message):
        probe_1d(x, y)


def test_values_that_standardising_makes_equal_tie():
    x = torch.tensor([[-3.0], [1e-40], [1e-30], [2e-30], [1e-3], [9.0]])
    y = torch.tensor([0, 1, 0, 0, 1, 1])
    scaler = Scaler.of(x)
    assert aucs(x, y).item() == pytest.approx(7 / 9)  # of the three near zero, class 1 comes before class 0 twice
    assert aucs(x, y, scaler).item() == pytest.approx(8 / 9)
    torch.testing.assert_close(aucs(x, y, scaler), reference(scaler(x), y))
    generator = torch.Generator().manual_seed(0)
    gated = (
        torch.randn(300, 40, generator=generator)
        * torch.rand(300, 40, generator=generator).pow(-40).clamp(max=1e30).reciprocal()
    )
    labels_ = labels(300, 1)
    scaler = Scaler.of(gated)
    torch.testing.assert_close(aucs(gated, labels_, scaler), reference(scaler(gated), labels_), rtol=0, atol=1e-12)
    assert not torch.equal(aucs(gated, labels_), aucs(gated, labels_, scaler))
