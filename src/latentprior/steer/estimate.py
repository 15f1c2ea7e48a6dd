"""Unit vectors from activations. All sums are in float64; rows are activations, results [d] float32 of norm 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator

Labels = Sequence[int] | np.ndarray | Tensor

_ROUNDING = 1e-12  # of the activations' size: below it a float64 difference of means is rounding
_CONSTANT = 1e-7  # of a dimension's size: below it a float32 standard deviation is rounding


def difference_of_means(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The unit vector from the mean of `negative` to that of `positive` (paper, sentiment steering)."""
    return _unit(mean_difference(positive, negative))


def mean_difference(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """`difference_of_means` before it is scaled: float64, in raw activation units."""
    if not len(positive) or not len(negative):
        raise InputError(f"a difference of means needs both sides, got {len(positive)} and {len(negative)} rows")
    _check_widths(positive, negative)
    means = [_exact(side).mean(dim=0) for side in (positive, negative)]
    difference = means[0] - means[1]
    if difference.norm() <= _ROUNDING * max(float(mean.norm()) for mean in means):
        raise InputError("both sides have the same mean: there is no direction between them")
    return difference


def paired_pca(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The first principal component of the differences ``positive[i] - negative[i]``.

    Differences are not centred: the component maximises their mean squared projection. That is repeng's "pca_center"
    and the PCA of steering-vectors; repeng's default, "pca_diff", centres the differences and so misses what all pairs
    share. The sign is such that the positive side projects higher on average (repeng: in most pairs).
    """
    if not len(positive) or len(positive) != len(negative):
        raise InputError(f"paired PCA needs pairs, got {len(positive)} positive and {len(negative)} negative rows")
    _check_widths(positive, negative)
    differences = _exact(positive) - _exact(negative)
    if not differences.any():
        raise InputError("the two sides of every pair are equal: there is no direction between them")
    differences /= differences.abs().max()
    n, d = differences.shape
    if n < d:  # the eigenvectors of the smaller of the two Gram matrices
        component = differences.T @ torch.linalg.eigh(differences @ differences.T).eigenvectors[:, -1]
    else:
        component = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    return _unit(component if (differences @ component).mean() >= 0 else -component)


def probe_normal(x: Float[Tensor, "n d"], labels: Labels, *, l2: float = 1.0) -> Float[Tensor, " d"]:
    """The normal of a logistic probe's decision boundary in raw space, pointing to label 1.

    The probe, scikit-learn's logistic regression with ``C = 1 / l2``, sees standardised activations
    ``(x - mean) / std``; its weights w there are ``w / std`` in raw space. Dimensions that are constant get 0.
    """
    if not l2 > 0:
        raise InputError(f"l2 must be positive, got {l2}")
    positive = binary_labels(labels, len(x))
    exact = _exact(x)
    mean, std = exact.mean(dim=0), exact.std(dim=0, correction=0)
    varies = std > _CONSTANT * exact.abs().amax(dim=0)
    if not varies.any():
        raise InputError("a probe needs activations that differ, all rows are equal")
    z = (exact - mean)[:, varies] / std[varies]
    probe = LogisticRegression(C=1 / l2, tol=1e-6, max_iter=10_000).fit(z.numpy(), positive.numpy())
    normal = torch.zeros_like(mean)
    normal[varies] = torch.from_numpy(probe.coef_[0]) / std[varies]
    if not normal.any():
        raise InputError("the probe found no difference between the two classes")
    return _unit(normal)


def random_direction(d: int, seed: int) -> Float[Tensor, " d"]:
    """A direction drawn uniformly from the unit sphere of `d` dimensions: a control."""
    if d < 1:
        raise InputError(f"the width of a direction must be positive, got {d}")
    return _unit(torch.randn(d, generator=keyed_generator(seed), dtype=torch.float64))


def shuffled_mean_difference(x: Float[Tensor, "n d"], labels: Labels, seed: int) -> Float[Tensor, " d"]:
    """`mean_difference` after the labels were permuted among the rows: a control that keeps data and counts."""
    positive = binary_labels(labels, len(x))
    positive = positive[torch.randperm(len(positive), generator=keyed_generator(seed))]
    return mean_difference(x[positive], x[~positive])


def binary_labels(labels: Labels, rows: int) -> Bool[Tensor, " n"]:
    """Labels as booleans on the CPU, checked to be 0 and 1, both there, and one for each of `rows` rows."""
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (rows,):
        raise InputError(f"give one label for each row: got labels of shape {list(values.shape)} for {rows} rows")
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        raise InputError(f"labels must be 0 or 1, got {list(dict.fromkeys(values.tolist()))[:5]}")
    positive = torch.from_numpy(values.astype(bool))
    if positive.all() or not positive.any():
        raise InputError(f"labels must have both classes, all {rows} are {int(positive.any())}")
    return positive


def _check_widths(positive: Tensor, negative: Tensor) -> None:
    if positive.shape[1:] != negative.shape[1:]:
        raise InputError(f"both sides must have one width, got {positive.shape[-1]} and {negative.shape[-1]}")


def _exact(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Float64 rows on the CPU."""
    exact = x.detach().to("cpu", torch.float64)
    if bad := int((~exact.isfinite().all(dim=1)).sum()):
        raise InputError(f"{bad} of {len(x)} activations are infinite or NaN: leave them out")
    return exact


def _unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    return (vector / vector.norm()).float()
