"""Path, times and solvers against closed forms: for a Gaussian the velocity and the exact flow are known."""

from __future__ import annotations

import math
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentprior.config import GRIDS, SOLVERS
from latentprior.prior import flow
from latentprior.stats.gaussian import GaussianPrior
from latentprior.utils.errors import InputError

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2}
MEAN = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)


def width(t: float) -> Tensor:
    """Standard deviation of z_t for data N(MEAN, STD^2)."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def velocity(z: Tensor, t: float) -> Tensor:
    """E[eps - z_0 | z_t] = -mean + Cov(eps - z_0, z_t) / Var(z_t) (z_t - E z_t)."""
    return -MEAN + (t - (1 - t) * STD**2) / width(t) ** 2 * (z - (1 - t) * MEAN)


def exact(z: Tensor, t: float) -> Tensor:
    """Where the flow takes z at time t: quantiles are kept."""
    return MEAN + STD * (z - (1 - t) * MEAN) / width(t)


def start(t: float) -> Tensor:
    """Points at the same quantiles at every time."""
    return (1 - t) * MEAN + width(t) * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


# path


def test_path_ends_at_data_and_noise():
    z_0, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.interpolate(z_0, noise, 0.0), z_0)
    torch.testing.assert_close(flow.interpolate(z_0, noise, 1.0), noise)
    torch.testing.assert_close(flow.interpolate(z_0, noise, 0.25), 0.75 * z_0 + 0.25 * noise)
    t = torch.linspace(0, 1, 5)
    expected = (1 - t[:, None]) * z_0 + t[:, None] * noise
    torch.testing.assert_close(flow.interpolate(z_0, noise, t), expected)


def test_target_is_the_derivative_of_the_path():
    z_0, noise = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((2, 4), 0.3, dtype=torch.float64)
    difference = flow.interpolate(z_0, noise, t + 1e-6) - flow.interpolate(z_0, noise, t)
    torch.testing.assert_close(flow.target(z_0, noise), difference / 1e-6, atol=1e-8, rtol=1e-8)


def test_training_times_are_the_official_grid():
    grid = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
    u = torch.rand(7, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        flow.training_times(u).double(), grid[(u.double() * 1000).floor().long()], atol=1e-7, rtol=0
    )
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24])
    torch.testing.assert_close(flow.training_times(edges), torch.tensor([1.0, 0.5, 0.001]), atol=1e-6, rtol=0)


# times


def counted(schedule: flow.Schedule) -> list[float]:
    """Times at which `integrate` really evaluates."""
    times = []
    flow.integrate(lambda z, t: times.append(t) or z, torch.zeros(2, 3), schedule)
    return times


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.sampled_from(SOLVERS), st.floats(0.01, 1.0))
def test_steps_are_evaluations(steps, solver, t_start):
    schedule = flow.schedule(steps, t_start=t_start, solver=solver)
    times = counted(schedule)
    assert len(times) == schedule.nfe == steps
    assert times == schedule.times()
    assert times[0] == schedule.knots[0] == t_start and schedule.knots[-1] == 0.0
    widths = -np.diff(schedule.knots)
    assert (widths > 0).all()
    # Two-stage solvers take whole intervals of two evaluations, and one half as wide if the number is odd.
    whole = widths[:-1] if solver in flow.TWO_STAGE and steps % 2 else widths
    two = solver in flow.TWO_STAGE
    np.testing.assert_allclose(whole, t_start / steps * (2 if two else 1), rtol=1e-9)
    assert len(whole) == (steps // 2 if two else steps)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.sampled_from(SOLVERS), st.floats(0.01, 1.0))
def test_evaluations_on_the_official_grid_are_reported(steps, solver, t_start):
    schedule = flow.schedule(steps, t_start=t_start, solver=solver, grid="official")
    assert len(counted(schedule)) == schedule.nfe
    intervals = len(schedule.knots) - 1
    assert schedule.nfe == (2 * intervals - 1 if solver in flow.TWO_STAGE else intervals)


def diffusers_sigmas(steps: int) -> list[float]:
    """Times of FlowMatchEulerDiscreteScheduler with its defaults, written from its documentation."""
    trained = torch.from_numpy(np.linspace(1, 1000, 1000, dtype=np.float32)[::-1].copy()) / 1000
    timesteps = np.linspace(trained[0].item() * 1000, trained[-1].item() * 1000, steps)
    return [*torch.from_numpy(timesteps / 1000).to(torch.float32).tolist(), 0.0]


@pytest.mark.parametrize("t_start", ["1.0", "0.95", "0.9", "0.75", "0.7", "0.5", "0.3", "0.25", "0.1", "0.05"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 20, 50, 100, 1000])
def test_official_times_bit_for_bit(steps, t_start):
    first = math.floor(steps * (1 - Fraction(t_start)))
    knots = flow.schedule(steps, t_start=float(t_start), grid="official").knots
    assert knots == diffusers_sigmas(steps)[first:]


def test_official_projection_starts_where_the_paper_says():
    schedule = flow.schedule(20, t_start=0.5, grid="official")
    assert schedule.knots[0] == pytest.approx(0.4742, abs=5e-5) and schedule.nfe == 10


# solvers


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("t_start", [1.0, 0.6])
def test_order_of_convergence_to_the_exact_flow(solver, t_start):
    z = start(t_start)
    coarse, fine = (
        (flow.integrate(velocity, z, flow.schedule(steps, t_start=t_start, solver=solver)) - exact(z, t_start))
        .abs()
        .max()
        for steps in (256, 512)
    )
    order = 3 if solver == "midpoint" else ORDER[solver]  # its error of order 2 cancels where the variance is quadratic
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence_in_general(solver):
    """dz/dt = e^t cos^2 z, solved by tan z(t) = tan z(1) + e^t - e."""
    z = torch.tensor([[0.3, 0.8, -0.4]], dtype=torch.float64)
    end = (z.tan() + 1 - math.e).atan()

    def error(steps: int) -> Tensor:
        schedule = flow.schedule(steps, solver=solver)
        return (flow.integrate(lambda z, t: math.exp(t) * z.cos() ** 2, z, schedule) - end).abs()

    order = (error(256) / error(512)).log2()
    torch.testing.assert_close(order, torch.full_like(order, ORDER[solver]), atol=0.05, rtol=0)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if ORDER[s] == 2])
def test_second_order_solvers_do_better_for_the_same_evaluations(solver):
    z = start(1.0)

    def error(solver: str) -> float:
        return float((flow.integrate(velocity, z, flow.schedule(20, solver=solver)) - exact(z, 1.0)).abs().max())

    assert error(solver) < error("euler") / 3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_moments_of_a_correlated_gaussian(solver, grid):
    """The solver's map is affine here, so the moments of its samples are known without drawing any."""
    d = 4
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    variances = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    mean = torch.arange(d, dtype=torch.float64)
    prior = GaussianPrior(mean, variances, basis)
    points = torch.cat([torch.zeros(1, d), torch.eye(d)]).double()
    image = flow.integrate(prior.velocity, points, flow.schedule(1000, solver=solver, grid=grid))
    linear = image[1:] - image[0]
    tolerance = {"atol": 2e-2 if solver == "euler" else 1e-3, "rtol": 0}
    torch.testing.assert_close(image[0], mean, **tolerance)
    torch.testing.assert_close(linear.T @ linear, basis @ variances.diag() @ basis.T, **tolerance)


def test_one_euler_step_is_the_papers_formula():
    z = start(0.8)
    found = flow.integrate(velocity, z, flow.schedule(1, t_start=0.8))
    torch.testing.assert_close(found, z + (0 - 0.8) * velocity(z, 0.8))


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_evaluation_is_one_euler_step(solver):
    z = start(0.8)
    euler = flow.integrate(velocity, z, flow.schedule(1, t_start=0.8))
    assert torch.equal(flow.integrate(velocity, z, flow.schedule(1, t_start=0.8, solver=solver)), euler)


# messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "eular"}, "eular.*euler"),
        ({"grid": "offical"}, "offical.*official"),
        ({"steps": 0}, "steps.*0"),
        ({"t_start": 1.2}, r"t_start.*\[0, 1\].*1.2"),
        ({"t_start": -0.1}, "t_start"),
        ({"t_start": float("nan")}, "t_start"),
    ],
)
def test_wrong_options_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests: no `Solver`
    with pytest.raises(InputError, match=message):
        flow.schedule(**{"steps": 4, **options})


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_a_held_component_is_held_and_the_rest_follows_it(solver):
    """The velocity of a correlated Gaussian is known; holding x_0 at 2 moves x_1 towards its conditional mean of 1.6.

    Not all the way: a constraint on the prediction at every step is not a draw from the conditional distribution.
    """
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        s = 1 - t
        return z @ torch.linalg.solve(s**2 * covariance + t**2 * torch.eye(2), t * torch.eye(2) - s * covariance)

    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    g = torch.tensor([[1.0, 0.0]]).expand_as(noise)
    value = torch.full((len(noise),), 2.0)
    schedule = flow.schedule(64, solver=solver)
    free = flow.integrate(velocity, noise, schedule)
    held = flow.hold(flow.integrate(flow.holding(velocity, g, value), noise, schedule), g, value)
    torch.testing.assert_close(held[:, 0], value)
    assert abs(float(free.mean())) < 0.05
    assert 0.5 < float(held[:, 1].mean()) < 1.6


def test_rows_of_zero_hold_nothing():
    z, schedule = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), flow.schedule(4)
    g = torch.zeros(3, 2)
    free = flow.integrate(lambda z, t: z, z, schedule)
    held = flow.integrate(flow.holding(lambda z, t: z, g, torch.ones(3)), z, schedule)
    assert torch.equal(held, free) and torch.equal(flow.hold(z, g, torch.ones(3)), z)
