"""1-D probes without fitting (paper, 1-D probing).

A logistic probe on one standardised feature orders texts by that feature, ascending or descending as the training
class means say, so its AUC is a rank statistic of the feature. Values that are equal once standardised tie (`Scaler`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from latentprior.stats.scaler import Scaler
from latentprior.utils.errors import InputError

CHUNK = 1 << 20  # numbers that are sorted together: bounds the memory


def aucs(x: Float[Tensor, "n f"], y: Int[Tensor, " n"], scaler: Scaler | None = None) -> Float[Tensor, " f"]:
    """Area under the ROC curve of each feature, P(x of class 1 > x of class 0) + P(equal) / 2, exact, float64.

    Values that `scaler` makes equal count as equal.
    """
    check_features(x, y)
    width = max(1, CHUNK // len(x))
    parts = torch.arange(x.shape[1], device=x.device).split(width)
    return torch.cat([_aucs(x[:, p].T.contiguous(), y, scaler and scaler.select(p)) for p in parts])


def class_difference(x: Float[Tensor, "n f"], y: Int[Tensor, " n"]) -> Float[Tensor, " f"]:
    """Mean of class 1 minus mean of class 0, float64."""
    return mean_differences(x, y, torch.ones(1, len(y), device=y.device))[0]


def stratified_folds(y: Int[Tensor, " n"], k: int = 5) -> Int[Tensor, " n"]:
    """The fold of each row, as scikit-learn's StratifiedKFold without shuffling assigns them."""
    if (fewest := min(int(y.sum()), len(y) - int(y.sum()))) < max(k, 2) or k < 2:
        raise InputError(f"{k} folds need at least 2 folds and as many rows of each class, got {fewest} of one")
    fold = np.empty(len(y), np.int64)
    for number, (_, rows) in enumerate(StratifiedKFold(k).split(np.zeros(len(y)), y.cpu().numpy())):
        fold[rows] = number
    return torch.from_numpy(fold).to(y.device)


def auc_by_group(
    positive: np.ndarray, negative: np.ndarray, positive_group: np.ndarray, negative_group: np.ndarray
) -> tuple[float, float]:
    """AUC of two samples' scores and its variance: DeLong's (1988), or Obuchowski's (1997) of larger groups."""
    rank = rankdata(np.concatenate([positive, negative]))
    n, m = len(positive), len(negative)
    below = (rank[:n] - rankdata(positive)) / m
    above = 1 - (rank[n:] - rankdata(negative)) / n
    return float(below.mean()), _variance_of_mean(below, positive_group) + _variance_of_mean(above, negative_group)


@dataclass(frozen=True)
class OneD:
    """1-D probes of one task: m candidates, by descending class-mean difference on the training rows."""

    units: Int[Tensor, " m"]
    sign: Float[Tensor, " m"]
    """Of the difference of the training class means, class 1 minus class 0."""
    validation_auc: Float[Tensor, " m"]
    """Mean over the folds, each with the sign of its own training part."""
    scaler: Scaler

    def best(self, candidates: int | None = None, among: Bool[Tensor, " f"] | None = None) -> int:
        """Index of the highest validation AUC among the first `candidates` (None: all); the first on ties.

        Of the features that are true in `among`, if given: a subset that `screened` was told of, if not all were kept.
        """
        if among is None:
            return int(self.validation_auc[:candidates].argmax())
        indices = among[self.units].nonzero().squeeze(1)[:candidates]
        return int(indices[self.validation_auc[indices].argmax()])

    def test_auc(self, indices: Int[Tensor, " p"], x: Float[Tensor, "n f"], y: Int[Tensor, " n"]) -> Tensor:
        """AUC [p] of the candidates at `indices` on other rows, with the training rows' signs."""
        return _signed(aucs(x[:, self.units[indices]], y, self.scaler.select(indices)), self.sign[indices])


def screened(
    difference: Float[Tensor, " f"], candidates: int | None, subsets: Bool[Tensor, "s f"] | None = None
) -> Int[Tensor, " m"]:
    """The features of the `candidates` (None: all) largest absolute class-mean differences, the largest first.

    With `subsets`, the candidates of each of them as well: those that screening it alone would keep.
    """
    units = difference.abs().argsort(descending=True, stable=True)
    if candidates is None or subsets is None:
        return units[:candidates]
    inside = subsets[:, units]
    kept = (inside & (inside.cumsum(dim=1) <= candidates)).any(dim=0)
    kept[:candidates] = True
    return units[kept]


def probe_1d(
    x: Float[Tensor, "n f"],
    y: Int[Tensor, " n"],
    *,
    candidates: int | None = 512,
    folds: int = 5,
    subsets: Bool[Tensor, "s f"] | None = None,
) -> OneD:
    """Probe features on their own (paper, 1-D probing): screened by class-mean difference, validated in folds.

    Args:
        candidates: how many features with the largest absolute difference of class means to keep; None: all.
        folds: stratified, not shuffled.
        subsets: features among which `OneD.best` is to choose as well; the candidates of each are kept.
    """
    check_features(x, y)
    difference = class_difference(x, y)
    units = screened(difference, candidates, subsets)
    kept, fold = x[:, units], stratified_folds(y, folds)
    inside = fold[None] != torch.arange(folds, device=y.device)[:, None]
    signs = mean_differences(kept, y, inside).sign()
    scaler = Scaler.of(kept)
    validation = [_signed(aucs(kept[fold == k], y[fold == k], scaler), signs[k]) for k in range(folds)]
    return OneD(units, difference[units].sign(), torch.stack(validation).mean(dim=0), scaler)


def _signed(auc: Tensor, sign: Tensor) -> Tensor:
    return 0.5 + sign * (auc - 0.5)


def mean_differences(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Mean of class 1 minus mean of class 0 under each of the weights [w, n], [w, f]; exactly 0 for a constant."""
    sides = [weights.double() * y, weights.double() * (1 - y)]
    columns = max(1, CHUNK // len(x))  # no float64 copy of all of x
    means = [
        torch.cat([side @ part.double() for part in x.split(columns, dim=1)], dim=1) / side.sum(dim=1, keepdim=True)
        for side in sides
    ]
    return means[0] - means[1]


def check_features(x: Tensor, y: Tensor) -> None:
    """Raise `InputError` for features or labels that cannot be probed."""
    if not x.isfinite().all():
        raise InputError("features to be probed must be finite")
    if not ((y == 0) | (y == 1)).all() or not 0 < int(y.sum()) < len(y):
        raise InputError("labels to be probed must be 0 and 1, and both must occur")


def _aucs(x: Tensor, y: Tensor, scaler: Scaler | None) -> Tensor:
    values, label = _sorted(x, y)  # [f, n]
    if scaler is not None:  # standardising keeps the order, so that it may follow the sort
        values = scaler(values.T).T
    negatives = (1 - label).cumsum(1) - (1 - label)  # class 0 before each entry
    starts = torch.ones_like(label)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    first = _running_max(starts * torch.arange(len(y), device=x.device))  # where each entry's equal values begin
    below = negatives.gather(1, first)
    pairs = float(y.sum() * (len(y) - y.sum()))
    above, under = (label * below).sum(dim=1), ((1 - label) * (first - below)).sum(dim=1)
    return 0.5 + (above - under).double() / (2 * pairs)


def _sorted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Values of each row in ascending order, and the label of each."""
    if x.dtype == torch.float64:
        values, order = x.sort(dim=1)
        return values, y[order]
    # As integers in the order of the floats, with the label as the last bit: one sort of numbers, no indices.
    bits = (x.float() + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    ordered = _sort((_flip(bits).long() << 1) | y)
    return _flip((ordered >> 1).int()).view(torch.float32), ordered & 1


def _flip(bits: Tensor) -> Tensor:
    """The bits of floats as integers of the same order, and back."""
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)


def _sort(keys: Tensor) -> Tensor:
    """Rows in ascending order. NumPy's sort of integers is vectorised, on CPUs several times as fast as torch's."""
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values


def _running_max(x: Tensor) -> Tensor:
    if x.device.type == "cpu":  # torch also looks for where it is, which takes ten times as long
        return torch.from_numpy(np.maximum.accumulate(x.numpy(), axis=1))
    return x.cummax(dim=1).values


def _variance_of_mean(values: np.ndarray, group: np.ndarray) -> float:
    """Of the mean of `values`, those of a group being dependent; infinite for a single group."""
    _, which = np.unique(group, return_inverse=True)
    sums = np.bincount(which, values - values.mean())
    count = len(sums)
    return float(np.square(sums).sum() / len(values) ** 2 * count / (count - 1)) if count > 1 else float("inf")
