"""Newton's method for logistic regression: scikit-learn's solutions, however the solution is written."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from latentprior import InputError
from latentprior.stats.newton import Kernel, Primal, fit_logistic, fit_path, newton, prefers_kernel


def problem(rows: int, features: int, seed: int, *, ones: int | None = None, shift: float = 0.0):
    """Gaussian features, the first of which is shifted in class 1, and labels in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(rows) < (rows // 2 if ones is None else ones)).long()
    y = y[torch.randperm(rows, generator=generator)]
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x[:, 0] += shift * y
    return x, y


PROBLEMS = {
    "one feature": problem(200, 1, 0, shift=0.5),
    "no signal": problem(200, 5, 1),
    "unbalanced": problem(200, 5, 2, ones=12, shift=1),
    "separable": problem(120, 3, 3, shift=50),
    "a third as many features": problem(150, 50, 4, shift=1),
    "more features than rows": problem(60, 300, 5, shift=1),
    "nearly as many features": problem(60, 55, 6),
}


def constant(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, -1] = 2.5
    return x


PROBLEMS["a constant feature"] = (constant(problem(100, 4, 7, shift=1)[0]), problem(100, 4, 7, shift=1)[1])
PROBLEMS["a constant among many"] = (constant(problem(50, 90, 8)[0]), problem(50, 90, 8)[1])


def by_scikit_learn(x: Tensor, y: Tensor, C: float) -> tuple[Tensor, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its line search warns where rounding ends it
        found = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x.numpy(), y.numpy())
    return torch.from_numpy(found.coef_[0]), float(found.intercept_[0])


@pytest.mark.parametrize("C", [1e-5, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_solutions_are_those_of_scikit_learn(name, C):
    x, y = PROBLEMS[name]
    expected, intercept = by_scikit_learn(x, y, C)
    w, b = fit_logistic(x, y, C)
    assert w.dtype == b.dtype == torch.float64
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-6)
    assert float(b) == pytest.approx(intercept, abs=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_vanishes(name):
    x, y = PROBLEMS[name]
    w, b = (t.requires_grad_() for t in fit_logistic(x, y, 1.0))
    objective = F.binary_cross_entropy_with_logits(x @ w + b, y.double(), reduction="sum") + w.square().sum() / 2
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective, [w, b])])
    assert torch.linalg.vector_norm(gradient) < 1e-7


def test_both_ways_to_write_the_solution_agree():
    x, y = problem(80, 40, 9, shift=2)
    Cs = [1e-4, 1.0, 1e3]
    direct = fit_path(Primal(x), y, Cs)
    shares = fit_path(Kernel(x @ x.T), y, Cs)
    torch.testing.assert_close(shares[:, :-1] @ x, direct[:, :-1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(shares[:, -1], direct[:, -1], rtol=0, atol=1e-6)  # nearly flat at the smallest C
    assert not prefers_kernel(1024, 16) and prefers_kernel(1024, 3456)


def test_a_path_keeps_the_order_of_the_penalties():
    x, y = problem(40, 90, 10, shift=1)
    theta = fit_path(Kernel(x @ x.T), y, [1.0, 1e-4, 1e-1])
    norms = torch.linalg.vector_norm(theta[:, :-1] @ x, dim=1)
    assert norms[0] > norms[2] > norms[1]
    w, b = fit_logistic(x, y, 1e-4)
    torch.testing.assert_close(x.T @ theta[1, :-1], w, rtol=1e-7, atol=1e-9)
    assert float(theta[1, -1]) == pytest.approx(float(b), abs=1e-6)


def test_rows_of_weight_zero_take_no_part():
    x, y = problem(100, 3, 11, shift=1)
    weight = torch.full((2, 100), 0.5, dtype=torch.float64)
    weight[1, 60:] = 0
    whole, part = newton(Primal(x), y, weight)
    for theta, rows in ((whole, 100), (part, 60)):
        w, b = fit_logistic(x[:rows], y[:rows], 0.5)
        torch.testing.assert_close(theta, torch.cat([w, b[None]]), rtol=0, atol=1e-8)


def test_bad_input_is_refused():
    x, y = problem(20, 2, 12)
    for C in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="C must be positive and finite"):
            fit_logistic(x, y, C)
    with pytest.raises(InputError, match="C must be positive and finite, got none"):
        fit_path(Primal(x), y, [])
    for labels in (torch.ones_like(y), y + 1):
        with pytest.raises(InputError, match="labels 0 and 1"):
            fit_logistic(x, labels, 1.0)
