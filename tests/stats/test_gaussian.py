from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from latentprior.stats.frechet import frechet_distance
from latentprior.stats.gaussian import GaussianPrior
from latentprior.utils.errors import InputError

D = 4


def data(n: int = 400, d: int = D, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + torch.arange(d)


@pytest.fixture(params=["full", "diagonal"])
def prior(request: pytest.FixtureRequest) -> GaussianPrior:
    return GaussianPrior.fit(data(), request.param)


def covariance(prior: GaussianPrior) -> np.ndarray:
    if prior.directions is None:
        return np.diag(prior.variances.numpy())
    return (prior.directions * prior.variances @ prior.directions.T).numpy()


def test_fit_takes_mean_and_unbiased_covariance():
    x = data()
    np.testing.assert_allclose(covariance(GaussianPrior.fit(x)), np.cov(x.numpy().T), rtol=1e-10)
    np.testing.assert_allclose(covariance(GaussianPrior.fit(x, "diagonal")), np.diag(x.var(0).numpy()), rtol=1e-10)
    np.testing.assert_allclose(GaussianPrior.fit(x).mean, x.mean(0))


def test_samples_have_the_moments(prior: GaussianPrior):
    sample = prior.sample(200_000, torch.Generator().manual_seed(0))
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample.double().mean(0), prior.mean, atol=0.03, rtol=0)
    np.testing.assert_allclose(np.cov(sample.numpy().T), covariance(prior), atol=0.05)


def test_samples_of_a_full_fit_are_at_the_distance_of_sampling_noise():
    x = data(5000)
    prior = GaussianPrior.fit(x)
    near = frechet_distance(x, prior.sample(5000, torch.Generator().manual_seed(1)))
    assert near < 0.02
    independent = GaussianPrior.fit(x, "diagonal").sample(5000, torch.Generator().manual_seed(1))
    assert frechet_distance(x, independent) > 10 * near


def test_samples_repeat_with_the_generator(prior: GaussianPrior):
    before = torch.get_rng_state()
    first, second = (prior.sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_posterior_mean_and_velocity_are_conditional_means(prior: GaussianPrior, t: float):
    """Importance sampling: data drawn from the prior, weighted by how likely they lead to z_t."""
    z_0 = prior.sample(400_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    z_t = (1 - t) * (prior.mean + 0.3) + t * torch.linspace(-0.5, 0.5, D, dtype=torch.float64)
    noise = (z_t - (1 - t) * z_0) / t
    weight = torch.softmax(-0.5 * noise.square().sum(-1), 0)
    assert 1 / weight.square().sum() > 300  # enough effective draws
    tolerance = 4 / float(1 / weight.square().sum()) ** 0.5
    expected_data, expected_noise = weight @ z_0, weight @ noise
    spread = (weight @ (z_0 - expected_data).square()).sqrt().max()
    torch.testing.assert_close(prior.posterior_mean(z_t, t), expected_data, atol=tolerance * spread, rtol=0)
    spread = (weight @ (noise - z_0 - expected_noise + expected_data).square()).sqrt().max()
    torch.testing.assert_close(prior.velocity(z_t, t), expected_noise - expected_data, atol=tolerance * spread, rtol=0)


def test_posterior_mean_is_the_regression_of_data_on_the_path():
    """E[z_0 | z_t] is linear: least squares on many pairs finds it."""
    prior, t = GaussianPrior.fit(data()), 0.4
    generator = torch.Generator().manual_seed(0)
    z_0 = prior.sample(300_000, generator, dtype=torch.float64)
    z_t = (1 - t) * z_0 + t * torch.randn(z_0.shape, generator=generator, dtype=torch.float64)
    design = torch.cat([z_t, torch.ones(len(z_t), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, z_0).solution
    torch.testing.assert_close(prior.posterior_mean(z_t[:100], t), fitted[:100], atol=0.05, rtol=0)


def test_velocity_and_posterior_mean_agree_along_the_path(prior: GaussianPrior):
    """``z_t = (1 - t) E[z_0 | z_t] + t E[eps | z_t]``, so ``z_t = E[z_0 | z_t] + t velocity``."""
    z_t = data(10, seed=1)
    t = torch.linspace(0.05, 1, 10, dtype=torch.float64)
    rebuilt = prior.posterior_mean(z_t, t) + t[:, None] * prior.velocity(z_t, t)
    torch.testing.assert_close(rebuilt, z_t)


def test_ends_of_the_path(prior: GaussianPrior):
    z = data(6, seed=1)
    torch.testing.assert_close(prior.posterior_mean(z, 0.0), z)
    torch.testing.assert_close(prior.velocity(z, 0.0), -z)
    torch.testing.assert_close(prior.posterior_mean(z, 1.0), prior.mean.expand_as(z))
    torch.testing.assert_close(prior.velocity(z, 1.0), z - prior.mean)


def test_integrating_the_velocity_turns_noise_into_the_gaussian():
    """The exact flow maps eps to ``mean + sqrt(cov) eps`` (midpoint rule, fine steps)."""
    prior = GaussianPrior.fit(data())
    eps = torch.randn(50, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, steps = eps.clone(), 2000
    for i in range(steps):
        t, h = 1 - i / steps, 1 / steps
        z = z - h * prior.velocity(z - h / 2 * prior.velocity(z, t), t - h / 2)
    root = prior.directions * prior.variances.sqrt() @ prior.directions.T
    torch.testing.assert_close(z, prior.mean + eps @ root, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (0, D)])
def test_leading_dimensions_are_free(prior: GaussianPrior, shape: tuple[int, ...]):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    t = torch.full(shape[:-1], 0.3)
    torch.testing.assert_close(prior.velocity(z, t), prior.velocity(z, 0.3))
    assert prior.posterior_mean(z, torch.tensor(0.3)).shape == shape


def test_dtype_follows_the_input(prior: GaussianPrior):
    z = data(5)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float32, 1e-4)):
        velocity = prior.velocity(z.to(dtype), 0.5)
        assert velocity.dtype == dtype
        torch.testing.assert_close(velocity.double(), prior.velocity(z, 0.5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_directions_without_variance_stay_finite(kind: str):
    x = torch.cat([data(3), torch.full((3, 1), 2.0)], 1)  # rank 2 of 5, the last dimension constant
    prior = GaussianPrior.fit(x, kind)
    for t in (0.0, 0.5, 1.0):
        assert prior.velocity(x, t).isfinite().all()
        assert prior.posterior_mean(x, t).isfinite().all()
    torch.testing.assert_close(prior.sample(9, torch.Generator().manual_seed(0))[:, -1], torch.full((9,), 2.0))


def test_refuses_bad_input():
    with pytest.raises(InputError, match="did you mean 'diagonal'"):
        inspect.unwrap(GaussianPrior.fit.__func__)(GaussianPrior, data(), "diag")  # as without type checks
    with pytest.raises(InputError, match="at least 2"):
        GaussianPrior.fit(data(1))
    with pytest.raises(InputError, match="NaN"):
        GaussianPrior.fit(data() / 0)
