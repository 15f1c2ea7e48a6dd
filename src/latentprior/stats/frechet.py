"""Fréchet distance: the squared 2-Wasserstein distance of the Gaussians fitted to two sets of activations.

Everything is float64: float32 fails from about a thousand dimensions on. With ``cov1 = R R'`` the eigenvalues of ``cov1
cov2`` are those of the symmetric ``R' cov2 R``, so no matrix square root is needed. ``R`` is a pivoted Cholesky factor:
a fifth of the cost of an eigendecomposition, exact for small variances beside large ones, and of the covariance's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from latentprior.utils.errors import InputError

Array = Tensor | np.ndarray
CHUNK_BYTES = 1 << 25  # most bytes of activations held in float64 at once


@dataclass(frozen=True)
class FrechetParts:
    """A Fréchet distance, squared units of the activations, as the sum of the means' and the covariances' terms."""

    total: float
    mean: float
    covariance: float


@dataclass(frozen=True, eq=False)
class GaussianMoments:
    """Mean [d] and covariance [d, d], float64. Keep one to compare many sets with the same reference."""

    mean: np.ndarray
    cov: np.ndarray

    @classmethod
    def of(cls, x: Array) -> GaussianMoments:
        """The sample mean and unbiased sample covariance of ``x: [N, d]``, of any floating dtype and device."""
        x = rows(x, least=2)
        chunks = x.split(max(1, CHUNK_BYTES // (8 * x.shape[1])))
        mean = torch.stack([chunk.sum(0, dtype=torch.float64) for chunk in chunks]).sum(0) / len(x)
        cov = reduce(np.add, (_gram(chunk.to(torch.float64, copy=True).sub_(mean)) for chunk in chunks))
        cov /= len(x) - 1
        return cls(mean.cpu().numpy(), cov)

    @property
    def width(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> tuple[np.ndarray, np.ndarray, int]:
        """``R: [d, d]`` (only its lower triangle counts), order and rank: ``R R' = cov[order][:, order]``."""
        (pstrf,) = get_lapack_funcs(("pstrf",), (self.cov,))
        factor, pivots, rank, _ = pstrf(self.cov, lower=1)
        factor[rank:, rank:] = 0
        return factor, pivots - 1, rank


def frechet_distance(a: Array | GaussianMoments, b: Array | GaussianMoments) -> float:
    """Fréchet distance of two sets of activations, the "FD" of the paper (its evaluation 1).

    ``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, in squared units of the activations, unbiased
    covariances. Also defined for fewer rows than dimensions and for dimensions without variance.

    Args:
        a: [N, d] activations, or their `GaussianMoments`, which cache a factor: give the set that many others are
            compared with first, as ``real = GaussianMoments.of(x)``, ``frechet_distance(real, y)``.
        b: [M, d] activations, or their `GaussianMoments`.
    """
    return frechet_parts(a, b).total


def frechet_parts(a: Array | GaussianMoments, b: Array | GaussianMoments) -> FrechetParts:
    """`frechet_distance` with its two terms: how far the means lie apart, and how much the covariances differ."""
    first, second = (x if isinstance(x, GaussianMoments) else GaussianMoments.of(x) for x in (a, b))
    if first.width != second.width:
        raise InputError(f"both sets need the same width, got {first.width} and {second.width}")
    mean = float(np.square(first.mean - second.mean).sum())
    cross = _cross_variances(first, second)
    covariance = float(np.trace(first.cov) + np.trace(second.cov) - 2 * np.sqrt(cross).sum())
    covariance = max(covariance, 0.0)  # equal covariances leave round-off of either sign
    return FrechetParts(mean + covariance, mean, covariance)


def frechet_from_moments(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Fréchet distance of two Gaussians given by their means [d] and covariances [d, d]."""
    return frechet_distance(_moments(mean1, cov1), _moments(mean2, cov2))


def rows(x: Array, *, least: int = 1) -> Tensor:
    """``x: [N, d]``, checked, as a tensor without gradient."""
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise InputError(f"activations must be floating [N, d], got {x.dtype} {list(x.shape)}")
    if len(x) < least:
        raise InputError(f"at least {least} activations are needed, got {len(x)}")
    if not torch.isfinite(torch.stack(torch.aminmax(x))).all():
        raise InputError("activations have NaN or infinite entries")
    return x


def _cross_variances(first: GaussianMoments, second: GaussianMoments) -> np.ndarray:
    """Eigenvalues of ``first.cov second.cov``, without those that are 0 by the rank of the first."""
    factor, order, rank = first.factor
    (sygst,) = get_lapack_funcs(("sygst",), (factor,))
    # R' C R through the triangle of R, at less than half the cost of two products; .T is LAPACK's memory order.
    product, _ = sygst(second.cov[order][:, order].T, factor, itype=2, lower=1, overwrite_a=1)
    return np.linalg.eigvalsh(product[:rank, :rank], UPLO="L").clip(min=0)


def _moments(mean: np.ndarray, cov: np.ndarray) -> GaussianMoments:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise InputError(f"mean and covariance must be [d] and [d, d], got {mean.shape} and {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError("mean or covariance has NaN or infinite entries")
    if not np.allclose(cov, cov.T, rtol=0, atol=1e-6 * np.abs(cov).max(initial=0)):
        raise InputError("covariance must be symmetric")
    return GaussianMoments(mean, cov)


def _gram(x: Tensor) -> np.ndarray:
    """``x' x`` [d, d]. On the CPU through numpy, which sees that it is symmetric and does half the work."""
    if x.device.type == "cpu":
        array = x.numpy()
        return array.T @ array
    return (x.T @ x).cpu().numpy()
