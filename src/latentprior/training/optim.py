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
from jaxtyping import Float
from torch import Tensor, nn

from latentprior.config import Recipe
from latentprior.data.moments import Covariance, ordered_directions
from latentprior.prior.denoiser import Block, Denoiser
from latentprior.utils.errors import InputError
from latentprior.utils.random import normal

SMALL = 0.3  # size of the initial blocks of "principal" (docs/recipes.md)
FIRST_SHARE = 0.01  # of the peak rate, where the warm-up starts (paper, training)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    Fused AdamW (paper: torch's defaults but the rate), in one group for each rate. With ``optimizer="muon"`` the
    matrices of the blocks go to `torch.optim.Muon` instead: Nesterov momentum 0.95, orthogonalised by five
    Newton-Schulz iterations in bfloat16, scaled by ``sqrt(max(1, out / in))``. The spectral norm of its updates does
    not depend on the width, so `matrix_rate` holds at every width. `cost.muon_flops_per_step` says what it costs.

    `set_rates` sets the rates from each group's "peak", which for what depends on time or layer alone is `time_rate`
    times the others': one such weight moves all rows at once. `model` may be wrapped or sharded; of one that holds no
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
    of_time = {id(p) for p in _time_path(denoiser)} if denoiser is not None else set[int]()
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        if id(p) not in taken:
            share = (transfer if id(p) in wide else 1.0) * (recipe.time_rate if id(p) in of_time else 1.0)
            by_rate.setdefault(recipe.learning_rate * share, []).append(p)
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
def initialise(
    model: Denoiser, recipe: Recipe, generator: torch.Generator, directions: Float[Tensor, "d d"] | None = None
) -> None:
    """Set the initial weights in place, as ``recipe.init`` says; "default" leaves those that torch drew.

    "scaled" draws every matrix from a normal law of variance one over its fan-in, which keeps activations of size one
    at any width (muP); biases are zero, but for the ones below. Then:

    - `out_proj` is zero: the first prediction is the mean velocity, and no random function has to be unlearnt (in muP
      its variance must vanish with the width).
    - `down_proj` is divided by ``sqrt(2 n_layers)``: the blocks' sum starts below the stream it is added to.
    - The bias of `time_proj` is one. Time multiplies the gate inside the SiLU. With torch's weights that factor starts
      at about 0.08, so all gates start at the SiLU's zero, where the block passes next to nothing, in either
      direction. Around one, a block starts as a SwiGLU of unit size, and each unit differs in how time bends it.

    "principal" takes `directions`, the columns along which standardised activations vary, most first
    (`principal_directions`): the stream starts as the activation's coordinates along them, and the output leads back.
    There AdamW's rate of each weight fits one direction, and norms and time act on each by itself.

    - The blocks' matrices are `SMALL` times those of "scaled": near zero a SiLU unit is a product of two linear maps,
      from which training builds faster than from one that saturates.
    - Modulated norms start with a scale of one and a shift of zero, the last one with a scale of zero; without them
      `out_proj` starts at `SMALL` times its transpose.
    """
    match recipe.init:
        case "scaled":
            _initialise_scaled(model, generator)
        case "principal":
            if directions is None:
                raise InputError("Recipe.init 'principal' needs the principal directions of the activations")
            _initialise_principal(model, generator, directions)


def principal_directions(z: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Principal directions of standardised activations, as columns, by descending variance; the largest entry of each
    is positive.

    Every one keeps its length: a direction of no variance is a coordinate of the stream like the others.
    """
    total = Covariance([0], z.shape[1])
    total.update(z)
    return ordered_directions(total.covariance())[1][0].float()


def _initialise_scaled(model: Denoiser, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _draw_by_fan_in(module, generator)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for block in _blocks(model):
        block.down_proj.weight /= math.sqrt(2 * model.config.n_layers)
        block.time_proj.bias.fill_(1.0)
        if model.time_proj is not None:  # a norm's scale is one already
            block.time_proj.bias.zero_()
    model.out_proj.weight.zero_()


def _initialise_principal(model: Denoiser, generator: torch.Generator, directions: Tensor) -> None:
    known = directions[:, : model.config.d_model].T.to(model.in_proj.weight)
    for linear in (model.in_proj, model.out_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    model.in_proj.weight[: len(known)] = known
    model.out_proj.weight[:, : len(known)] = known.T
    for block in _blocks(model):
        for linear in (block.up_proj, block.gate_proj, block.down_proj):
            _draw_by_fan_in(linear, generator, SMALL)
    if model.time_proj is None:
        model.out_proj.weight *= SMALL
        return
    for linear in (*(block.time_proj for block in _blocks(model)), model.time_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    model.time_proj.bias[: model.config.d_model] = -1.0  # a norm's scale is one plus this


def _draw_by_fan_in(linear: nn.Linear, generator: torch.Generator, size: float = 1.0) -> None:
    draw = normal(*linear.weight.shape, seed=generator, device=linear.weight.device)
    linear.weight.copy_(draw * (size / math.sqrt(linear.in_features)))
    linear.bias.zero_()


def _time_path(denoiser: Denoiser) -> Iterator[nn.Parameter]:
    """The parameters that time and layer alone pass through."""
    for name, p in denoiser.named_parameters():
        if {"time_embed", "layer_embed", "time_proj"} & set(name.split(".")):
            yield p


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
