"""Probes that are fitted by scikit-learn: the 1-D reference, and L2 logistic regression on some or all features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import Tensor

from latentprior.stats.auc import (
    OneD,
    aucs,
    check_features,
    class_difference,
    mean_differences,
    screened,
    stratified_folds,
)
from latentprior.stats.scaler import Scaler, columns
from latentprior.utils.errors import InputError

CS_1D = tuple(float(c) for c in np.logspace(-5, 0, 10))
"""Inverse strengths of the penalty that the paper's 1-D probes choose from."""
CS = tuple(float(c) for c in np.logspace(-5, 0, 6))


@dataclass(frozen=True)
class FittedOneD(OneD):
    """1-D probes of one task, fitted; `sign` is the coefficient's, and the test AUC that of the decision function."""

    C: Float[Tensor, " m"]
    """The chosen inverse strength of the penalty."""
    coefficient: Float[Tensor, " m"]
    intercept: Float[Tensor, " m"]

    def test_auc(self, indices: Int[Tensor, " p"], x: Float[Tensor, "n f"], y: Int[Tensor, " n"]) -> Tensor:
        z = self.scaler.select(indices)(x[:, self.units[indices]])
        return aucs(z * self.coefficient[indices] + self.intercept[indices], y)


def logistic_1d(
    x: Float[Tensor, "n f"],
    y: Int[Tensor, " n"],
    *,
    candidates: int | None = 512,
    folds: int = 5,
    Cs: Sequence[float] = CS_1D,
    subsets: Bool[Tensor, "s f"] | None = None,
) -> FittedOneD:
    """What `probe_1d` computes, by fitting (paper, 1-D probing): scikit-learn's LogisticRegressionCV on each candidate.

    Folds choose C by AUC, the smallest on ties. Takes about 0.1 s a feature. Where a class difference is zero up to
    rounding, so is the coefficient, and the solver's tolerance decides its sign.
    """
    check_features(x, y)
    stratified_folds(y, folds)
    units = screened(class_difference(x, y), candidates, subsets)
    scaler = Scaler.of(x[:, units])
    z, labels = scaler(x[:, units]).cpu().numpy(), y.cpu().numpy()
    with threadpool_limits(limits=1), warnings.catch_warnings():  # threads only cost time on one column
        warnings.simplefilter("ignore", ConvergenceWarning)  # so near the minimum rounding may end the line search
        rows = [_fit_column(column[:, None], labels, folds, Cs) for column in z.T]
    validation, C, coefficient, intercept = torch.tensor(rows, dtype=torch.float64, device=x.device).unbind(dim=1)
    return FittedOneD(units, coefficient.sign(), validation, scaler, C, coefficient, intercept)


def _fit_column(z: np.ndarray, labels: np.ndarray, folds: int, Cs: Sequence[float]) -> tuple[float, ...]:
    """Validation AUC, C, coefficient and intercept of the probe on a standardised feature [n, 1]."""
    penalty: Any = {"Cs": Cs, "l1_ratios": (0.0,), "use_legacy_attributes": False}  # L2
    solver: Any = {"solver": "lbfgs", "tol": 1e-10, "max_iter": 10_000}
    probe: Any = LogisticRegressionCV(cv=StratifiedKFold(folds), scoring="roc_auc", **solver, **penalty)
    probe.fit(z, labels)
    validation = probe.scores_.mean(axis=0).max()
    return float(validation), float(probe.C_), float(probe.coef_[0, 0]), float(probe.intercept_[0])


@dataclass(frozen=True)
class SparseResult:
    """A probe on several features of one task."""

    test_auc: float
    validation_auc: float
    """Mean over the folds at the chosen C."""
    C: float
    units: Int[Tensor, " k"]
    """The largest class-mean difference first; all that vary, in order, for a dense probe."""


def sparse_probe(
    x: Float[Tensor, "n f"],
    y: Int[Tensor, " n"],
    x_test: Float[Tensor, "n_test f"],
    y_test: Int[Tensor, " n_test"],
    *,
    k: int | None,
    Cs: Sequence[float] = CS,
    folds: int = 5,
) -> SparseResult:
    """L2 logistic regression on the `k` features whose class means differ most, or, for None, on all.

    Features are chosen by the absolute difference of their class means in standard deviations of all training rows (the
    max-mean-difference selection of sparse probing, Gurnee et al. 2023), each fold by its own training part. C is that
    of the highest validation AUC, the smallest on ties.
    """
    if k is not None and not 0 < k <= x.shape[1]:
        raise InputError(f"k must lie between 1 and the number of features, {x.shape[1]}, got {k}")
    if not Cs or not all(0 < C < float("inf") for C in Cs):
        raise InputError(f"C must be positive and finite, got {', '.join(map(str, Cs)) or 'none'}")
    Cs, fold = sorted(Cs), stratified_folds(y, folds)
    parts = fold[None] != torch.arange(folds + 1, device=y.device)[:, None]  # the last part holds every row
    scaler = Scaler.of(x)
    if k is None:
        bases = [_Basis.of(x, scaler.scale.isfinite().nonzero().squeeze(1), scaler)] * (folds + 1)
    else:
        differences = (mean_differences(x, y, parts) / scaler.scale).abs()
        order = differences.argsort(dim=1, descending=True, stable=True)[:, :k]
        bases = [_Basis.of(x, units, scaler) for units in order]
    scores = torch.stack([_fold_aucs(basis.rows, y, part, Cs) for basis, part in zip(bases, parts[:-1], strict=False)])
    validation = scores.mean(dim=0)
    best = int(validation.argmax())
    decision = _decision(bases[-1], x, y, x_test, Cs[best])
    return SparseResult(float(aucs(decision[:, None], y_test)), float(validation[best]), Cs[best], bases[-1].units)


@dataclass(frozen=True)
class _Basis:
    """The standardised features, or, where they outnumber the rows, the rows in their principal axes.

    The penalty does not see a rotation, so that a fit in as many axes as rows is the fit in all features.
    """

    units: Int[Tensor, " k"]
    rows: Float[Tensor, "n m"]
    scaler: Scaler
    shares: Float[Tensor, "n m"] | None
    """The axes as sums of standardised rows; None where there was no rotation."""

    @classmethod
    def of(cls, x: Tensor, units: Tensor, scaler: Scaler) -> _Basis:
        if len(units) <= len(x):
            return cls(units, scaler.select(units)(x[:, units]), scaler, None)
        products = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        for part in units.split(columns(x)):
            z = scaler.select(part)(x[:, part])
            products.addmm_(z, z.T)
        variances, axes = torch.linalg.eigh(products)
        kept = variances > variances[-1] * len(x) * torch.finfo(torch.float64).eps
        sizes, axes = variances[kept].sqrt(), axes[:, kept]
        return cls(units, axes * sizes, scaler, axes / sizes)


def _fit(rows: Tensor, y: Tensor, C: float) -> tuple[Float[Tensor, " m"], float]:
    """Coefficients, on the device of `rows`, and intercept."""
    if not rows.shape[1]:
        return rows.new_zeros(0), 0.0
    probe = LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(rows.cpu().numpy(), y.cpu().numpy())
    return torch.from_numpy(probe.coef_[0]).to(rows.device), float(probe.intercept_[0])


def _fold_aucs(rows: Tensor, y: Tensor, inside: Tensor, Cs: Sequence[float]) -> Float[Tensor, " c"]:
    """Validation AUC of each C, of the rows that are not `inside`."""
    fits = [_fit(rows[inside], y[inside], C) for C in Cs]
    decisions = torch.stack([rows[~inside] @ coefficients + intercept for coefficients, intercept in fits], dim=1)
    return aucs(decisions, y[~inside])


def _decision(basis: _Basis, x: Tensor, y: Tensor, x_test: Tensor, C: float) -> Float[Tensor, " n_test"]:
    """Log-odds of the test rows by the probe that is fitted to all training rows."""
    coefficients, intercept = _fit(basis.rows, y, C)
    decision = coefficients.new_full((len(x_test),), intercept)
    done = 0
    for units in basis.units.split(columns(x)):
        scaled = basis.scaler.select(units)
        weights = coefficients[done : done + len(units)]
        if basis.shares is not None:
            weights = scaled(x[:, units]).T @ (basis.shares @ coefficients)
        decision += scaled(x_test[:, units]) @ weights
        done += len(units)
    return decision
