from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from latentprior.stats import frechet as module
from latentprior.stats.frechet import GaussianMoments, frechet_distance, frechet_from_moments, frechet_parts
from latentprior.utils.errors import InputError


def correlated(n: int, d: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale @ basis.T


def covariance(d: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((d, d))
    return factor @ factor.T / d


def with_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    cov1, cov2 = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(cov1 + cov2) - 2 * np.trace(linalg.sqrtm(cov1 @ cov2)).real)


def test_of_commuting_gaussians_is_the_distance_of_means_and_deviations():
    basis = linalg.qr(covariance(8, 0))[0]
    std1, std2 = np.linspace(0.1, 3, 8), np.linspace(2, 0.5, 8)
    mean1, mean2 = np.arange(8.0), np.ones(8)
    distance = frechet_from_moments(mean1, basis * std1**2 @ basis.T, mean2, basis * std2**2 @ basis.T)
    assert distance == pytest.approx(np.square(mean1 - mean2).sum() + np.square(std1 - std2).sum(), rel=1e-12)


def test_of_two_by_two_gaussians_that_do_not_commute():
    """For 2 x 2 matrices ``tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M))``."""
    cov1, cov2 = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = cov1 @ cov2
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(cov1) + np.trace(cov2) - 2 * root_trace
    assert frechet_from_moments(np.zeros(2), cov1, np.zeros(2), cov2) == pytest.approx(expected, rel=1e-12)


def test_of_linear_image_under_the_optimal_map():
    """A positive definite map A is optimal: the distance to the image of N(0, S) is ``tr((I - A) S (I - A))``."""
    cov, transport = covariance(16, 1), covariance(16, 2) + np.eye(16)
    rest = np.eye(16) - transport
    distance = frechet_from_moments(np.zeros(16), cov, np.zeros(16), transport @ cov @ transport)
    assert distance == pytest.approx(np.trace(rest @ cov @ rest), rel=1e-10)


@pytest.mark.parametrize("d", [1, 3, 32])
def test_agrees_with_the_matrix_square_root(d: int):
    a, b = correlated(400, d, 0), 1.2 * correlated(300, d, 1) + 0.1
    assert frechet_distance(a, b) == pytest.approx(with_sqrtm(a, b), rel=1e-9)


@pytest.mark.slow
def test_agrees_with_the_matrix_square_root_at_width_1024():
    a, b = correlated(2048, 1024, 0), correlated(2048, 1024, 1)
    assert frechet_distance(a, b) == pytest.approx(with_sqrtm(a, b), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20), st.floats(0, 5), st.integers(0, 2**31))
def test_is_a_squared_distance(n: int, m: int, d: int, decay: float, seed: int):
    """Symmetric, zero for equal sets, quadratic in the scale, blind to a joint rotation and shift; also for N < d."""
    a, b = correlated(n, d, seed, decay), correlated(m, d, seed + 1, decay)
    scale = float(a.square().sum() / n + b.square().sum() / m)
    distance = frechet_distance(a, b)
    rotation = torch.linalg.qr(correlated(d, d, seed + 2))[0]
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * scale)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, abs=1e-5 * scale)
    assert frechet_distance(a @ rotation + 2, b @ rotation + 2) == pytest.approx(distance, abs=1e-5 * scale)


def test_parts_separate_a_shift_from_a_change_of_covariance():
    a = correlated(100, 5, 0)
    shifted, widened = frechet_parts(a, a + 2), frechet_parts(a, a.mean(0) + 3 * (a - a.mean(0)))
    assert (shifted.mean, shifted.covariance) == pytest.approx((20, 0), abs=1e-9)
    assert widened.mean == pytest.approx(0, abs=1e-9)
    assert widened.covariance == pytest.approx(4 * float(a.var(0).sum()), rel=1e-9)
    assert shifted.total == shifted.mean + shifted.covariance


def test_fewer_rows_than_dimensions_equals_the_data_on_its_support():
    """Rows within a subspace: embedding into more dimensions must not change the distance."""
    a, b = correlated(30, 10, 0), correlated(30, 10, 1)
    wide = torch.linalg.qr(correlated(200, 10, 2))[0].T
    assert frechet_distance(a @ wide, b @ wide) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_small_variances_survive_next_to_a_huge_one():
    """A residual stream has dimensions whose variance is millions of times the median."""
    a, b = correlated(500, 20, 0), 1.5 * correlated(500, 20, 1)
    huge = 1e4 * correlated(500, 1, 2)
    parts = frechet_parts(torch.cat([huge, a], 1), torch.cat([huge, a], 1))
    assert parts.total == pytest.approx(0, abs=1e-6)
    mean = np.zeros(21)
    cov1, cov2 = (linalg.block_diag([[1e8]], np.cov(x.T)) for x in (a, b))
    alone = frechet_from_moments(mean[1:], np.cov(a.T), mean[1:], np.cov(b.T))
    assert frechet_from_moments(mean, cov1, mean, cov2) == pytest.approx(alone, rel=1e-5)


def test_dimensions_without_variance():
    a, b = correlated(50, 4, 0), correlated(50, 4, 1)
    constant = torch.full((50, 1), 7.0, dtype=torch.float64)
    distance = frechet_distance(torch.cat([a, constant], 1), torch.cat([b, constant + 2], 1))
    assert distance == pytest.approx(frechet_distance(a, b) + 4, rel=1e-9)
    assert frechet_distance(constant, constant) == 0


def test_one_moments_object_serves_many_comparisons():
    real = correlated(60, 12, 0)
    moments = GaussianMoments.of(real)
    for seed in (1, 2):
        sample = correlated(50, 12, seed)
        assert frechet_distance(moments, sample) == frechet_distance(real, sample)
    assert moments.factor is moments.factor


@pytest.mark.parametrize(("n", "d", "rank"), [(50, 6, 6), (4, 6, 3)])
def test_factor_is_a_root_of_the_permuted_covariance(n: int, d: int, rank: int):
    moments = GaussianMoments.of(correlated(n, d, 0))
    factor, order, found = moments.factor
    root = np.tril(factor)
    assert found == rank
    assert not root[:, rank:].any()
    np.testing.assert_allclose(root @ root.T, moments.cov[order][:, order], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_moments_are_those_of_numpy_in_chunks_far_from_the_origin(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 8 * 6 * 7)  # chunks of seven rows
    x = (correlated(50, 6, 0) + 100).to(dtype)
    moments = GaussianMoments.of(x)
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_takes_numpy_and_leaves_its_input_alone():
    a, b = correlated(20, 3, 0), correlated(20, 3, 1)
    before = a.clone()
    assert frechet_distance(a.numpy(), b.numpy()) == frechet_distance(a.requires_grad_(), b)
    assert torch.equal(a, before)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least 2 activations"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "same width"),
        (torch.zeros(4), torch.zeros(4), r"\[N, d\]"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3), "floating"),
        (torch.zeros(4, 3), torch.zeros(4, 3).index_fill(0, torch.tensor([1]), float("nan")), "NaN"),
        (torch.zeros(4, 3), torch.zeros(4, 3).index_fill(0, torch.tensor([1]), -float("inf")), "infinite"),
    ],
)
def test_refuses_what_has_no_distance(a: torch.Tensor, b: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize(
    ("cov", "message"),
    [(np.eye(3), "must be"), (np.array([[1.0, 1.0], [0.0, 1.0]]), "symmetric"), (np.full((2, 2), np.nan), "NaN")],
)
def test_refuses_moments_that_are_none(cov: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        frechet_from_moments(np.zeros(2), np.eye(2), np.zeros(2), cov)
