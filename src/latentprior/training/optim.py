"""Optimizers, initial weights, learning-rate schedule and averaged weights: what `Recipe` says of the parameters.

Width transfer follows Yang et al. (2022, "Tensor Programs V", table 3; table 8 with the output's multiplier taken into
its weight): under Adam the rate of a matrix goes with one over its fan-in if that grows with the width, as it does in
the blocks, in the embeddings of time and layer, and in the output; input weights, biases and norms keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentprior.config import Recipe
from latentprior.prior.denoiser import Block, Denoiser
from latentprior.utils.random import normal

FIRST_SHARE = 0.01  # of the peak rate, where the warm-up starts (paper, training)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    Fused AdamW (paper: torch's defaults but the rate), in one group for each rate. With ``optimizer="muon"`` the
    matrices of the blocks go to `torch.optim.Muon` instead: Nesterov momentum 0.95, orthogonalised by five
    Newton-Schulz iterations in bfloat16, scaled by ``sqrt(max(1, out / in))``. The spectral norm of its updates does
    not depend on the width, so `matrix_rate` holds at every width. `cost.muon_flops_per_step` says what it costs.

    `set_rates` sets the rates from each group's "peak". `model` may be wrapped or sharded; of one that holds no
    `Denoiser` all parameters have the same rate.
    """
    matrices: list[Tensor] = []
    if recipe.optimizer == "muon":
        matrices = [m.weight for block in _blocks(model) for m in block.children() if isinstance(m, nn.Linear)]
    taken = {id(p) for p in matrices}
    denoiser = next((m for m in model.modules() if isinstance(m, Denoiser)), None)
    wide, transfer = set[int](), 1.0
    if denoiser is not None and recipe.base_width is not None:  # the fan-in of all but `in_proj` grows with the width
        wide = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not denoiser.in_proj}
        transfer = recipe.base_width / denoiser.config.d_model
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if id(p) not in taken:
            by_rate.setdefault(recipe.learning_rate * (transfer if id(p) in wide else 1.0), []).append(p)
    groups = [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in by_rate.items()]
    adamw = torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    if not matrices:
        return [adamw]
    group = {"params": matrices, "lr": recipe.matrix_rate, "peak": recipe.matrix_rate}
    return [torch.optim.Muon([group], weight_decay=recipe.weight_decay, adjust_lr_fn="original"), adamw]


def set_rates(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def rate_share(step: int, total: int, recipe: Recipe) -> float:
    """Share of the peak rates at step `step` (from 0) of `total`: linear warm-up from 1%, then the recipe's schedule.

    "cosine" (paper, training) and "linear" fall from the warm-up's end to the run's; "constant" stays at the peak until
    the last share `cooldown` of the steps and falls linearly there. All end at `final_rate`.
    """
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return FIRST_SHARE + (1 - FIRST_SHARE) * step / warm
    left = (total - step) / max(1, total - warm)
    match recipe.schedule:
        case "cosine":
            height = 0.5 * (1 - math.cos(math.pi * left))
        case "linear":
            height = left
        case "constant":
            height = min(1.0, (total - step) / max(1, round(recipe.cooldown * total)))
    return recipe.final_rate + (1 - recipe.final_rate) * height


@torch.no_grad()
def initialise(model: Denoiser, recipe: Recipe, generator: torch.Generator) -> None:
    """Set the initial weights in place, as ``recipe.init`` says; "default" leaves those that torch drew.

    "scaled" draws every matrix from a normal law of variance one over its fan-in, which keeps activations of size one
    at any width (muP); biases are zero, but for the ones below. Then:

    - `out_proj` is zero: the first prediction is the mean velocity, and no random function has to be unlearnt (in muP
      its variance must vanish with the width).
    - `down_proj` is divided by ``sqrt(2 n_layers)``: the blocks' sum starts below the stream it is added to.
    - The bias of `time_proj` is one. Time multiplies the gate inside the SiLU. With torch's weights that factor starts
      at about 0.08, so all gates start at the SiLU's zero, where the block passes next to nothing, in either
      direction. Around one, a block starts as a SwiGLU of unit size, and each unit differs in how time bends it.
    """
    if recipe.init == "default":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw = normal(*module.weight.shape, seed=generator, device=module.weight.device)
            module.weight.copy_(draw / math.sqrt(module.in_features))
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for block in _blocks(model):
        block.down_proj.weight /= math.sqrt(2 * model.config.n_layers)
        block.time_proj.bias.fill_(1.0)
    model.out_proj.weight.zero_()


def _blocks(model: nn.Module) -> Iterator[Block]:
    return (module for module in model.modules() if isinstance(module, Block))


class AveragedWeights:
    """Exponential moving average of a model's parameters, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # initial weights would dominate early averages
        parameters = [p.detach() for p in model.parameters()]
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """While it is open, `model` has the averaged weights."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        _set(model, self.average)
        try:
            yield
        finally:
            _set(model, own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)


@torch.no_grad()
def _set(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(values[name])
