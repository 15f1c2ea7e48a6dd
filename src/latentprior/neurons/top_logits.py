"""What writing a unit does to the next token, along the direct path: no later block, no later layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentprior.lm.hooks import Hookpoint
from latentprior.lm.hooks.blocks import down_projection, find_blocks_at, language_model
from latentprior.prior.denoiser import Block
from latentprior.prior.glp import GLP
from latentprior.utils.errors import InputError
from latentprior.utils.reprs import ShortRepr

_CELLS = 2**25  # effects (units times tokens) that are held together


@dataclass(frozen=True, repr=False)
class TopLogits(ShortRepr):
    """Ids of the tokens whose logits m units raise (promote) and lower (suppress) most, the strongest first.

    Values are in standard deviations of the unit's effects over the vocabulary, whose mean is 0.
    """

    promoted: Int64[Tensor, "m k"]
    promoted_values: Float[Tensor, "m k"]
    suppressed: Int64[Tensor, "m k"]
    suppressed_values: Float[Tensor, "m k"]


def top_logits(
    glp: GLP,
    model: nn.Module,
    hookpoint: Hookpoint,
    count: int,
    *,
    layer: int | None = None,
    vocabulary: int | None = None,
) -> TopLogits:
    """The tokens whose logits each unit raises and lowers most when it grows.

    A unit's column of ``W_down`` goes through the denoiser's final LayerNorm (its centring and weight; not its
    division by the deviation, which is the same for all units) and ``W_out`` into the velocity. The velocity is
    ``eps - z_0``, so what is added to it is taken from the denoised activation; that is scaled back to raw units and
    goes through the language model's final norm (again without its division) and output embedding.

    One row a unit, block by block, on the CPU.

    Args:
        hookpoint: where; hidden units of an MLP go through the down projection of their block first.
        count: tokens to name on each side.
        vocabulary: only the first so many tokens exist, as where the embedding is padded; by default all.
    """
    embedding = output_embedding(model)[:vocabulary]
    gain, centred = final_norm(model, embedding.shape[1])
    centred_rows = embedding - embedding.mean(dim=0)  # so that every unit's effects have the mean 0
    count = min(count, len(embedding))
    chunk = max(1, _CELLS // len(embedding))
    parts: list[tuple[Tensor, ...]] = []
    for direction in written(glp, model, hookpoint, layer).split(chunk):
        direction = direction.to(embedding.device)
        if direction.shape[1] != len(gain):
            raise InputError(
                f"the residual stream has width {direction.shape[1]}, the output embedding reads {len(gain)}"
            )
        if centred:
            direction = direction - direction.mean(dim=1, keepdim=True)
        effects = (direction * gain) @ centred_rows.T
        deviation = effects.square().mean(dim=1, keepdim=True).sqrt()
        effects /= torch.where(deviation > 0, deviation, 1.0)
        up, down = effects.topk(count, dim=1), effects.topk(count, dim=1, largest=False)
        parts.append((up.indices, up.values, down.indices, down.values))
    return TopLogits(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def written(glp: GLP, model: nn.Module, hookpoint: Hookpoint, layer: int | None) -> Float[Tensor, "units width"]:
    """What each unit adds to the residual stream of the language model when it grows by one, up to one common factor.

    One row a unit, block by block, float32.
    """
    denoiser, normalizer = glp.denoiser, glp.normalizer
    columns = [block.down_proj.weight.float().T for block in denoiser.layers if isinstance(block, Block)]
    into_ln = torch.cat(columns)
    into_ln = (into_ln - into_ln.mean(dim=1, keepdim=True)) * denoiser.ln.weight.float()
    velocity = into_ln @ denoiser.out_proj.weight.float().T
    origin = normalizer.denormalize(torch.zeros(glp.width, device=glp.device), layer)
    raw = (normalizer.denormalize(-velocity, layer) - origin).float()
    if hookpoint.side != "mlp":
        return raw
    down: Any = copy.deepcopy(down_projection(model, hookpoint.check(model, check_model=False))).float()
    raw = raw.to(down.weight.device)
    return down(raw) - down(torch.zeros_like(raw[:1]))


def output_embedding(model: nn.Module) -> Float[Tensor, "vocabulary width"]:
    """The matrix that makes logits of the final norm's output, float32."""
    wrapped = language_model(model)
    head = None if wrapped is None else wrapped.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output embedding: its units promote no tokens")
    return head.weight.detach().float()


def final_norm(model: nn.Module, width: int) -> tuple[Float[Tensor, " width"], bool]:
    """The gain of each dimension in the norm before the output embedding, and whether that norm centres first.

    The norm is the last module beside the blocks with one weight a dimension (not an embedding's own norm). Both are
    found by calling it, so that it does not matter whether the model stores the gain itself or, as Gemma, the gain
    less one. Without a norm the gain is 1, not centred.
    """
    path, _ = find_blocks_at(model)
    beside = model.get_submodule(path.rpartition(".")[0]).named_children()
    norms = [
        module
        for name, module in beside
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.shape == (width,)
        and "embed" not in name
    ]
    device = output_embedding(model).device
    if not norms:
        return torch.ones(width, device=device), False
    norm: Any = copy.deepcopy(norms[-1]).float()
    probe = _probe(width).to(norm.weight.device)
    with torch.no_grad():
        plus, minus, shifted = norm(probe), norm(-probe), norm(probe + 1.0)
    gain = (plus - minus) / 2 / probe * probe.square().mean().sqrt()
    return gain.to(device), bool(torch.allclose(shifted, plus, rtol=1e-3, atol=1e-3 * float(plus.abs().max())))


def _probe(width: int) -> Float[Tensor, " width"]:
    """Numbers without a 0 whose mean is 0."""
    probe = torch.ones(width)
    probe[1::2] = -1.0
    if width % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    return probe
