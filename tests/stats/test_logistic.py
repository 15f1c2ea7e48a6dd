"""Fitted probes: rank statistics equal scikit-learn's 1-D probes, and k-sparse and dense ones equal plain fits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from latentprior import InputError
from latentprior.stats import scaler
from latentprior.stats.auc import probe_1d
from latentprior.stats.logistic import CS, logistic_1d, sparse_probe

CONSTANT = 5  # place of the constant feature of `kinds_of_features`


def labels(rows: int, generator: torch.Generator) -> Tensor:
    return (torch.arange(rows) % 2)[torch.randperm(rows, generator=generator)]


def kinds_of_features(rows: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features of every kind, and labels: Gaussian, with ties, heavy tails, constant, from 1e-40 to 5, ..."""
    generator = torch.Generator().manual_seed(seed)
    y = labels(rows, generator)
    noise = torch.randn(rows, 10, generator=generator)
    columns = [
        noise[:, 0] + y,
        noise[:, 1] - 0.3 * y,
        noise[:, 2],
        (noise[:, 3] + 0.4 * y).round(),  # ties
        (noise[:, 4] + 0.3 * y > 1).float(),  # two values
        torch.full((rows,), 0.1),
        (3 * noise[:, 5] + 0.5 * y).exp(),  # heavy tails
        noise[:, 6] / noise[:, 7] + 0.2 * y,  # heavier ones, on both sides
        (noise[:, 8] - 0.2 * y).relu(),  # sparse, ties at zero
        1e4 + noise[:, 9] + 0.2 * y,
        30.0 * y,  # separable
        noise[:, 0].relu() * (-60 * noise[:, 2].abs()).exp() + 5 * noise[:, 4].sign() * (noise[:, 1] > 1),  # a gate
    ]
    return torch.stack(columns, dim=1).to(dtype), y


@pytest.mark.parametrize(
    ("seed", "rows", "dtype"), [(0, 300, torch.float32), (1, 401, torch.bfloat16), (2, 600, torch.float64)]
)
def test_rank_statistics_equal_fitted_probes(seed, rows, dtype):
    x, y = kinds_of_features(2 * rows, seed, dtype)
    train, test = slice(rows), slice(rows, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranked, fitted = (method(x[train], y[train]) for method in (probe_1d, logistic_1d))
    assert ranked.units.tolist() == fitted.units.tolist()
    # With equal class means the coefficient is zero up to rounding, whose sign the tolerance decides: not compared.
    varying = ranked.units != CONSTANT
    assert ranked.sign[varying].tolist() == fitted.sign[varying].tolist()
    torch.testing.assert_close(ranked.validation_auc, fitted.validation_auc, rtol=0, atol=1e-9)
    assert ranked.best() == fitted.best()
    places = torch.arange(len(ranked.units))
    auc = fitted.test_auc(places, x[test], y[test])
    torch.testing.assert_close(ranked.test_auc(places, x[test], y[test]), auc, rtol=0, atol=1e-9)
    assert float(auc[~varying]) == 0.5 and float(auc.max()) == 1


def test_fitted_probes_choose_from_a_subset_what_they_choose_from_it_alone():
    x, y = kinds_of_features(200, 5, torch.float32)
    subsets = torch.zeros(2, x.shape[1], dtype=torch.bool)
    subsets[0, [0, 1, 2, 8]] = subsets[1, [2, 3, 4, 9, 11]] = True
    fitted = logistic_1d(x, y, candidates=2, folds=3, Cs=[1e-2], subsets=subsets)
    assert len(fitted.units) == 6  # the candidates of all features and of each subset, not more
    for subset in subsets:
        units = subset.nonzero().squeeze(1)
        alone = logistic_1d(x[:, units], y, candidates=2, folds=3, Cs=[1e-2])
        here, there = fitted.best(2, subset), alone.best()
        assert fitted.units[here] == units[alone.units[there]]
        assert fitted.validation_auc[here] == alone.validation_auc[there]


def test_fitted_probes_keep_the_candidates_of_the_largest_difference():
    x, y = kinds_of_features(200, 3, torch.float32)
    fitted = logistic_1d(x, y, candidates=3, folds=4, Cs=[1e-3, 1.0])
    means = [x[y == label].double().mean(dim=0) for label in (0, 1)]
    assert fitted.units.tolist() == (means[1] - means[0]).abs().argsort(descending=True)[:3].tolist()
    assert fitted.units.tolist() == probe_1d(x, y, candidates=3, folds=4).units.tolist()
    assert set(fitted.C.tolist()) <= {1e-3, 1.0}
    place = fitted.units.tolist().index(6)
    column = x[:, 6:7].double().numpy()
    z = StandardScaler().fit_transform(column)
    probe = LogisticRegression(C=float(fitted.C[place]), tol=1e-10).fit(z, y.numpy())
    assert float(fitted.coefficient[place]) == pytest.approx(float(probe.coef_[0, 0]), rel=1e-4)
    assert float(fitted.intercept[place]) == pytest.approx(float(probe.intercept_[0]), abs=1e-5)


def mixed_features(rows: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of unequal size, each fifth with a little signal, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = labels(rows, generator)
    x = torch.randn(rows, features, generator=generator)
    x[:, ::5] += 0.3 * y[:, None]
    return x * torch.logspace(-2, 2, features) + 3, y


def plain_sparse_probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, k: int | None):
    """The same probe written plainly: test and validation AUC, C, and the features."""
    standard = StandardScaler().fit(x)
    z, z_test = standard.transform(x), standard.transform(x_test)

    def selected(rows: np.ndarray) -> np.ndarray:
        if k is None:
            return np.arange(z.shape[1])
        gap = z[rows][y[rows] == 1].mean(0) - z[rows][y[rows] == 0].mean(0)
        return np.argsort(-np.abs(gap))[:k]

    def auc(C: float, train: np.ndarray, units: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> float:
        probe = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10).fit(z[train][:, units], y[train])
        return float(roc_auc_score(held_y, probe.decision_function(held[:, units])))

    folds = list(StratifiedKFold(5).split(z, y))
    validation = [np.mean([auc(C, a, selected(a), z[b], y[b]) for a, b in folds]) for C in CS]
    C = CS[int(np.argmax(validation))]
    every = np.arange(len(z))
    units = selected(every)
    return auc(C, every, units, z_test, y_test), max(validation), C, units.tolist()


@pytest.mark.parametrize("k", [1, 4, 30, None])
@pytest.mark.parametrize("features", [7, 40, 200])
def test_sparse_and_dense_probes_equal_plain_ones(features, k):
    if k is not None and k > features:
        return
    x, y = mixed_features(300, features, seed=features)
    arrays = [t.numpy() for t in (x[:120].double(), y[:120], x[120:].double(), y[120:])]
    test, validation, C, units = plain_sparse_probe(*arrays, k)
    found = sparse_probe(x[:120], y[:120], x[120:], y[120:], k=k)
    assert found.units.tolist() == units
    assert found.C == C
    assert found.validation_auc == pytest.approx(validation, abs=1e-9)
    assert found.test_auc == pytest.approx(test, abs=1e-9)


@pytest.mark.parametrize("k", [3, 50, None])
def test_features_are_taken_in_parts_and_constant_ones_say_nothing(k, monkeypatch):
    x, y = mixed_features(150, 60, seed=1)
    constant = torch.full((150, 1), 0.1)
    wider = torch.cat([constant, x, 1e6 * constant], dim=1)
    wider[100:, 0] = 7.0  # only among the test rows
    whole = sparse_probe(x[:100], y[:100], x[100:], y[100:], k=k)
    monkeypatch.setattr(scaler, "CHUNK", 700)
    before = wider.clone()
    parts = sparse_probe(wider[:100], y[:100], wider[100:], y[100:], k=k)
    assert torch.equal(wider, before)
    assert (parts.units - 1).tolist() == whole.units.tolist()
    assert (parts.C, parts.test_auc) == (whole.C, pytest.approx(whole.test_auc, abs=1e-12))
    assert parts.validation_auc == pytest.approx(whole.validation_auc, abs=1e-12)


def test_features_are_chosen_within_the_folds():
    generator = torch.Generator().manual_seed(2)
    y = labels(200, generator)
    x = torch.randn(400, 3000, generator=generator)
    found = sparse_probe(x[:200], y, x[200:], y, k=5)
    assert found.validation_auc < 0.6  # chosen with the labels of all rows, noise would reach 0.8


def test_only_constant_features_tell_nothing():
    y = torch.arange(40) % 2
    x = torch.full((40, 3), 0.1)
    dense = sparse_probe(x, y, x, y, k=None)
    assert (dense.test_auc, dense.validation_auc, dense.units.tolist()) == (0.5, 0.5, [])
    assert sparse_probe(x, y, x, y, k=2).test_auc == 0.5


def test_bad_input_is_refused():
    x, y = mixed_features(40, 6, seed=3)
    for k in (0, -1, 7):
        with pytest.raises(InputError, match="k must .* 6, got"):
            sparse_probe(x, y, x, y, k=k)
    with pytest.raises(InputError, match="C must be positive"):
        sparse_probe(x, y, x, y, k=2, Cs=[0.0, 1.0])
    with pytest.raises(InputError, match="folds"):
        sparse_probe(x, torch.zeros_like(y), x, y, k=2)
    holed = x.clone()
    holed[3, 4] = torch.nan
    for call in (
        lambda: logistic_1d(holed, y),
        lambda: sparse_probe(holed, y, x, y, k=None),
        lambda: sparse_probe(x, y, holed, y, k=None),
    ):
        with pytest.raises(InputError, match="finite"):
            call()
    with pytest.raises(InputError, match="both must occur"):
        logistic_1d(x, torch.zeros_like(y))
