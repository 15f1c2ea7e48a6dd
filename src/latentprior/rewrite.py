"""Changing chosen positions of a running model: which columns of which forward pass belong to which position.

Under ``generate()`` a forward pass sees a whole prompt, one new token, or (without a cache) the prompt and all
tokens so far; rows may be padded on the left; beams are reordered. `rewrite` turns all that into one thing: rows of
activations with their row and position, each position once for every time that the model computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latentprior import hooks
from latentprior.config import Side
from latentprior.errors import InputError, unknown

Positions = Literal["all", "last", "generated"]
POSITIONS: tuple[Positions, ...] = ("all", "last", "generated")


@dataclass(frozen=True)
class Site:
    """Where the activations of one call come from."""

    layer: int
    row: Tensor
    """[N] int64, row in the batch."""
    position: Tensor
    """[N] int64, index of the token in its sequence; padding does not count, 0 is the first token."""
    batch: int
    """Rows in the batch."""


Rewriter = Callable[[Tensor, Site], Tensor]  # [N, d] -> [N, d]


@dataclass
class _Prompt:
    """The first forward pass of the sequence being generated, to tell prompt from generated columns."""

    ids: Tensor | None
    last: Tensor  # [B] column of each row's last prompt token
    width: int  # columns seen so far
    cached: bool = False  # has it been continued from a key-value cache?


@contextmanager
def rewrite(
    model: nn.Module, rewriters: Mapping[int, Rewriter], *, positions: Positions = "all", side: Side = "output"
) -> Iterator[None]:
    """Replace the activations of `model` at given layers and positions while the context is open.

    The first position of a sequence and padding are never touched. "last" takes the last position of the prompt and
    every position after it (at every decoding step, the last), "generated" only the positions after the prompt.

    A forward pass continues the one before if it adds one token: to the key-value cache, or, without a cache, to the
    same beginning. Everything else is a new prompt. So without a cache, two calls of ``generate()`` of which the
    second takes the first's answer as its prompt count as one; open a context for each to tell them apart.

    Raises:
        InputError: unknown positions, a layer out of range, a compiled model; in the forward pass, an attention mask
            that does not tell which tokens are real.
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    prompt: list[_Prompt] = []  # at most one: the closures below replace it

    with hooks.forward_inputs(model) as inputs:
        seen: dict[str, Tensor | int] = {}

        def chosen(hidden: Tensor) -> tuple[Tensor, Tensor]:
            """Mask [B, T] of the columns to rewrite and position [B, T] of every column."""
            real, position = _columns(hidden, inputs)
            if seen.get("call") != inputs.calls:  # several layers see the same forward pass
                seen["call"] = inputs.calls
                _follow(prompt, inputs, hidden, real)
            column = inputs.past_length + torch.arange(hidden.shape[1], device=hidden.device)
            last = prompt[0].last.to(hidden.device)[:, None]
            mask = real & (position > 0)
            if positions == "last":
                mask = mask & (column >= last)
            elif positions == "generated":
                mask = mask & (column > last)
            return mask, position

        def editor(layer: int, rewriter: Rewriter) -> Callable[[Tensor], Tensor]:
            def edit(hidden: Tensor) -> Tensor:
                mask, position = chosen(hidden)
                row, column = mask.nonzero(as_tuple=True)
                if not len(row):
                    return hidden
                site = Site(layer, row, position[row, column], hidden.shape[0])
                hidden[row, column] = rewriter(hidden[row, column], site).to(hidden.dtype)  # `hidden` is a copy
                return hidden

            return edit

        edits = {layer: editor(layer, rewriter) for layer, rewriter in rewriters.items()}
        with hooks.edit(model, edits, side=side):
            yield


def _columns(hidden: Tensor, inputs: hooks.ForwardInputs) -> tuple[Tensor, Tensor]:
    """Which columns of this forward pass are real tokens, and every column's position: two [B, T]."""
    batch, width = hidden.shape[:2]
    attention = inputs.attention_mask
    if attention is None:
        position = inputs.past_length + torch.arange(width, device=hidden.device).expand(batch, width)
        return torch.ones(batch, width, dtype=torch.bool, device=hidden.device), position
    if not isinstance(attention, Tensor) or attention.ndim not in (2, 4):
        raise InputError("this model's attention mask is neither [batch, keys] nor [batch, 1, queries, keys]")
    if attention.ndim == 4:
        real, position = _causal_columns(attention, inputs, width)
    else:
        known = attention[:, : inputs.past_length + width].bool()
        real, position = known[:, -width:], known.long().cumsum(1)[:, -width:] - 1
    return real.to(hidden.device).expand(batch, -1), position.to(hidden.device).expand(batch, -1)


def _causal_columns(attention: Tensor, inputs: hooks.ForwardInputs, width: int) -> tuple[Tensor, Tensor]:
    """`_columns` of a mask [B, 1, queries, keys], as static caches come with: a real token sees itself."""
    sees = attention[:, 0] if attention.dtype == torch.bool else attention[:, 0] == 0
    total = inputs.past_length + width
    complete = sees.shape[-1] >= total  # else a sliding window has dropped its oldest keys
    known = sees.any(dim=1)[:, :total] if complete else sees.any(dim=2)
    if inputs.position_ids is not None and inputs.position_ids.ndim == 2:
        return known[:, -width:], inputs.position_ids
    if not complete:
        raise InputError("this model's cache drops keys, and without `position_ids` positions cannot be told")
    return known[:, -width:], known.long().cumsum(1)[:, -width:] - 1


def _follow(prompt: list[_Prompt], inputs: hooks.ForwardInputs, hidden: Tensor, real: Tensor) -> None:
    """Tell a new prompt from the continuation of the last one, cached or not."""
    width = inputs.past_length + hidden.shape[1]
    ids = inputs.ids
    if prompt and _continues(prompt[0], inputs, hidden.shape[0], width):
        prompt[0].width, prompt[0].cached = width, inputs.past_length > 0
        return
    column = torch.arange(hidden.shape[1], device=hidden.device)
    last = inputs.past_length + torch.where(real, column, -1).amax(dim=1)
    prompt[:] = [_Prompt(None if ids is None else ids.detach().clone(), last, width)]


def _continues(prompt: _Prompt, inputs: hooks.ForwardInputs, batch: int, width: int) -> bool:
    if len(prompt.last) != batch or width != prompt.width + 1:
        return False
    if inputs.past_length > 0:  # several new columns at once are a prompt: the next turn of a conversation
        return inputs.past_length == prompt.width
    if inputs.ids is None or prompt.ids is None or prompt.cached:
        return False
    # Without a cache the whole sequence comes again, one token longer. Beams may have been reordered, but only
    # among beams of one prompt, so the prompt's columns stay.
    return torch.equal(inputs.ids[:, : prompt.ids.shape[1]].to(prompt.ids.device), prompt.ids)
