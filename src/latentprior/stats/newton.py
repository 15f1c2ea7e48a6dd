"""L2 logistic regression by Newton's method in float64, with scikit-learn's objective.

``C * sum(log-loss) + |w|^2 / 2``, the intercept free. Few features are solved for as they are (`Primal`), many
problems at once; many features through the products of the rows with one another (`Kernel`): the solution is a
combination of the n rows, so n numbers are sought, however many features there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentprior.utils.errors import InputError

TOLERANCE = 1e-8  # of the gradient's norm
ROUNDING = 1e-13  # of the first gradient's norm: nearer to zero float64 does not get
MOST_STEPS, MOST_HALVINGS = 100, 40


def fit_logistic(x: Float[Tensor, "n k"], y: Tensor, C: float) -> tuple[Float[Tensor, " k"], Float[Tensor, ""]]:
    """Coefficients and intercept that minimise ``C * sum(log-loss) + |w|^2 / 2``, float64, on the device of `x`.

    Agrees with scikit-learn's LogisticRegression. A step takes 2 n k^2 or n^3 / 3 operations, whichever are fewer.

    Args:
        x: features, used as they are.
        y: [n] labels 0 or 1.
        C: inverse strength of the penalty.

    Raises:
        InputError: labels that are not 0 and 1, only one of them, or a `C` that is not positive and finite.
    """
    if not ((y == 0) | (y == 1)).all() or not 0 < int(y.sum()) < len(y):
        raise InputError("logistic regression needs labels 0 and 1, and both must occur")
    x = x.double()
    if prefers_kernel(*x.shape):
        theta = fit_path(Kernel(x @ x.T), y, [C])[0]
        return x.T @ theta[:-1], theta[-1]
    theta = fit_path(Primal(x), y, [C])[0]
    return theta[:-1], theta[-1]


def prefers_kernel(rows: int, features: int) -> bool:
    """Whether a step of `Kernel`, n^3 / 3 operations, is cheaper than one of `Primal`, 2 n k^2 + k^3 / 3."""
    return 6 * rows * features**2 + features**3 > rows**3


def fit_path(problem: Primal | Kernel, y: Tensor, Cs: Sequence[float]) -> Float[Tensor, "c m"]:
    """Parameters for several inverse strengths of the penalty, in their order.

    Raises:
        InputError: none of them, or one that is not positive and finite.
    """
    if not Cs or not all(0 < C < float("inf") for C in Cs):
        raise InputError(f"C must be positive and finite, got {', '.join(map(str, Cs)) or 'none'}")
    weight = torch.tensor(Cs, dtype=torch.float64, device=y.device)[:, None].repeat(1, len(y))
    if isinstance(problem, Primal):
        return newton(problem, y, weight)
    found: dict[float, Tensor] = {}
    theta = None
    for C in sorted(set(Cs)):  # from the strongest penalty on, each starts where the last one ended
        theta = found[C] = newton(problem, y, weight[list(Cs).index(C)], theta)
    return torch.stack([found[C] for C in Cs])


@runtime_checkable
class Problem(Protocol):
    """What `newton` needs to know of a way to write the solution: parameters [*b, m], the intercept last."""

    def start(self, weight: Tensor) -> Tensor:
        """Parameters [*b, m] of zeros for weights [*b, n]."""
        ...

    def margin(self, theta: Tensor) -> Tensor:
        """Log-odds of each row, [*b, n]; linear in `theta`."""
        ...

    def penalty(self, theta: Tensor, margin: Tensor) -> Tensor:
        """Half the squared norm of the coefficients, [*b]."""
        ...

    def gradient(self, theta: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """What `step` needs [*b, m], and the gradient's norm [*b], from the loss's slope by each row's log-odds."""
        ...

    def step(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Newton's step [*b, m], from the loss's curvature by each row's log-odds."""
        ...


def newton(problem: Problem, y: Tensor, weight: Float[Tensor, "*b n"], theta: Tensor | None = None) -> Tensor:
    """Parameters of the minimum, for a batch of weights at once; steps are halved until the objective does not grow.

    Args:
        y: [n] labels 0 or 1.
        weight: of each row's loss: `C`, or 0 for rows that take no part.
        theta: where to start, such as the solution of a similar problem.
    """
    sign = 2 * y.to(weight.dtype) - 1

    def objective(theta: Tensor, margin: Tensor) -> Tensor:
        return problem.penalty(theta, margin) - (weight * F.logsigmoid(sign * margin)).sum(-1)

    theta = problem.start(weight) if theta is None else theta
    margin = problem.margin(theta)
    enough = None
    for _ in range(MOST_STEPS):
        wrong = torch.sigmoid(-sign * margin)
        gradient, norm = problem.gradient(theta, -weight * sign * wrong)
        enough = (ROUNDING * norm).clamp(min=TOLERANCE) if enough is None else enough
        if (norm <= enough).all():
            break
        step = problem.step(gradient, weight * wrong * (1 - wrong))
        change = problem.margin(step)
        size = _step_size(objective, theta, margin, step, change)
        theta, margin = theta + size * step, margin + size * change
    return theta


def _step_size(
    objective: Callable[[Tensor, Tensor], Tensor], theta: Tensor, margin: Tensor, step: Tensor, change: Tensor
) -> Float[Tensor, "*b 1"]:
    """The first of 1, 1/2, 1/4, ... that does not make the objective grow by more than rounding."""
    value = objective(theta, margin)
    most = value + 1e-14 * value.abs()
    size = torch.ones_like(value)[..., None]
    for _ in range(MOST_HALVINGS):
        grows = objective(theta + size * step, margin + size * change) > most
        if not grows.any():
            break
        size = torch.where(grows[..., None], size / 2, size)
    return size


class Primal:
    """Parameters are the k coefficients: features [*b, n, k]."""

    def __init__(self, x: Float[Tensor, "*b n k"]) -> None:
        self.x = F.pad(x, (0, 1), value=1.0)
        self.penalised = torch.ones(self.x.shape[-1], dtype=x.dtype, device=x.device)
        self.penalised[-1] = 0

    def start(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(*weight.shape[:-1], self.x.shape[-1])

    def margin(self, theta: Tensor) -> Tensor:
        return (self.x @ theta[..., None]).squeeze(-1)

    def penalty(self, theta: Tensor, margin: Tensor) -> Tensor:
        return theta[..., :-1].square().sum(-1) / 2

    def gradient(self, theta: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.penalised * theta + (self.x.mT @ slope[..., None]).squeeze(-1)
        return gradient, torch.linalg.vector_norm(gradient, dim=-1)

    def step(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        hessian = torch.diag(self.penalised) + (self.x * curvature[..., None]).mT @ self.x
        return -torch.linalg.solve(hessian, gradient)


class Kernel:
    """Parameters are the shares a of the n rows in the coefficients ``w = x' a``; K is the rows' products [n, n].

    One problem at a time. With slope s and curvature h the step solves ``(1 + h K) da = -(a + s) - h db``, which is
    Newton's for w; ``sum(a + da) = 0``, as at every minimum with a free intercept, gives db.
    """

    def __init__(self, products: Float[Tensor, "n n"]) -> None:
        self.products = products

    def start(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(len(weight) + 1)

    def margin(self, theta: Tensor) -> Tensor:
        return self.products @ theta[:-1] + theta[-1]

    def penalty(self, theta: Tensor, margin: Tensor) -> Tensor:
        return theta[:-1] @ (margin - theta[-1]) / 2

    def gradient(self, theta: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        excess, intercept = theta[:-1] + slope, slope.sum()
        norm = (excess @ self.products @ excess + intercept.square()).clamp(min=0).sqrt()
        return torch.cat([excess, intercept[None]]), norm

    def step(self, gradient: Tensor, curvature: Tensor) -> Tensor:
        excess, root = gradient[:-1], curvature.sqrt()
        inner = root[:, None] * self.products * root  # 1 + this is symmetric and well conditioned, 1 + h K is not
        inner.diagonal().add_(1)
        right = torch.stack([root * (self.products @ excess), root], dim=1)
        solved = root[:, None] * torch.cholesky_solve(right, torch.linalg.cholesky(inner))
        direct, through = excess - solved[:, 0], solved[:, 1]
        intercept = (excess.sum() - gradient[-1] - direct.sum()) / through.sum()
        return torch.cat([-direct - intercept * through, intercept[None]])
