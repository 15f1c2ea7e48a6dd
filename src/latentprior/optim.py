"""Optimizer, learning-rate schedule and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latentprior.config import Recipe


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW over all parameters (paper: torch's defaults but the rate)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Rate of step `step` (from 0) of `total`: linear warm-up from 1% of the peak, then a cosine (paper, training)."""
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return recipe.learning_rate * (0.01 + 0.99 * step / warm)
    done = (step - warm) / max(1, total - warm)
    share = recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * share


class AveragedWeights:
    """Exponential moving average of a model's parameters, in float32.

    Early averages would be dominated by the initial weights, so the decay rises as ``(1 + step) / (10 + step)`` up
    to its value.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = [p.detach() for p in model.parameters()]
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)
