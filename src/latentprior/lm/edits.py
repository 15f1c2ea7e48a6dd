"""Changing chosen positions of a running model, whether a pass holds a prompt, a new token or, without a cache, all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.lm import hooks
from latentprior.lm.positions import GenerationTracker, Prompt, token_positions
from latentprior.utils.errors import InputError, unknown

NamedPositions = Literal["all", "last", "prompt", "generated"]
POSITIONS: tuple[NamedPositions, ...] = ("all", "last", "prompt", "generated")
Positions = NamedPositions | int | Tensor
"""Which positions are edited.

- "all"; "prompt"; "generated"; "last", the prompt's last one and every one after it.
- A number n: from position n on. Padding does not count, and 0 is the first token.
- A mask, bool [B, columns], over at least the whole prompt with its padding, as in `attention_mask`; columns after the
  mask are left alone, so a wider one reaches generated tokens too.
"""


@dataclass(frozen=True)
class EditedPositions:
    """Where the activations of one call come from."""

    layer: int
    row: Tensor  # [N] int64, in the batch
    position: Tensor  # [N] int64, in its sequence; padding does not count, 0 is the first token
    batch: int  # rows in it
    prompts: Sequence[int] | None = None  # [batch], equal for equal prompts; None where not known


EditFunction = Callable[[Tensor, EditedPositions], Tensor]  # [N, d] -> [N, d]


class EditCounts:
    """What a context has done so far: one count for every position of every edited layer in every forward pass."""

    REASONS = ("first", "padding", "sink", "not asked for")

    def __init__(self, parts: Sequence[EditCounts] = ()) -> None:
        self._parts = parts  # what contexts of their own count
        self._totals: dict[torch.device, Tensor] = {}  # where the layers are, so that counting makes no host wait

    def add(self, edited: Tensor, first: Tensor, padding: Tensor, sink: Tensor, not_asked_for: Tensor) -> None:
        """Count the positions of one layer in one pass; masks [B, T] that exclude one another."""
        counts = torch.stack([edited, first, padding, sink, not_asked_for]).sum(dim=(1, 2))
        before = self._totals.get(counts.device)
        # A new tensor, as those of inference mode cannot be changed later.
        self._totals[counts.device] = counts if before is None else before + counts

    def _count(self, index: int) -> int:
        own = sum(int(total[index]) for total in self._totals.values())
        return own + sum(part._count(index) for part in self._parts)

    @property
    def edited(self) -> int:
        return self._count(0)

    @property
    def passed_over(self) -> dict[str, int]:
        """Positions that were left alone, by reason."""
        return {reason: self._count(i) for i, reason in enumerate(self.REASONS, 1)}

    @property
    def seen(self) -> int:
        """All positions that passed through the edited layers."""
        return self.edited + sum(self.passed_over.values())

    def __str__(self) -> str:
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.passed_over.items())
        return f"{self.seen:,} positions seen, {self.edited:,} edited; passed over: {left}"

    def __repr__(self) -> str:
        return f"EditCounts({self})"


@contextmanager
def edit_positions(
    model: nn.Module,
    edits: Mapping[int, EditFunction],
    *,
    positions: Positions = "all",
    side: Side = "output",
    sinks: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[EditCounts]:
    """Replace the activations of `model` at given layers and positions while the context is open.

    The first position of a sequence, padding and `sinks`, bool [B, T] of hidden states [B, T, d] and their layer, are
    never touched. Every ``generate()`` starts a new prompt. Between passes of the caller's own, a pass continues the
    one before if it adds one token: to the key-value cache, or, without one, to the same beginning.

    Raises:
        InputError: a forward pass whose positions cannot be told or that the mask does not fit; in ``generate()``, a
            paged cache, and, unless positions are "all" or a number, what hides where the prompt ends (assisted
            decoding, guidance, chunked prompts). On leaving, a layer that never ran, or nothing edited.
    """
    check_positions(positions)
    counts, tracker = EditCounts(), GenerationTracker()
    reached: set[int] = set()

    with hooks.forward_inputs(model) as inputs:

        def apply(layer: int, edit: EditFunction, hidden: Tensor) -> Tensor:
            reached.add(layer)
            real, position = token_positions(hidden, inputs)
            prompt = tracker.prompt_of(inputs, hidden, real)
            column = inputs.past_length + torch.arange(hidden.shape[1], device=hidden.device)
            first = real & (position <= 0)
            ordinary = real & ~first
            asked = ordinary & _wanted(positions, prompt, column, position)
            sink = torch.zeros_like(asked) if sinks is None else asked & sinks(hidden, layer)
            edited = asked & ~sink
            counts.add(edited, first, ~real, sink, ordinary & ~asked)
            row, column = edited.nonzero(as_tuple=True)
            if len(row):
                at = EditedPositions(layer, row, position[row, column], hidden.shape[0], tracker.keys(hidden.shape[0]))
                hidden[row, column] = edit(hidden[row, column], at).to(hidden.dtype)  # `hidden` is a copy
            return hidden

        functions = {layer: partial(apply, layer, edit) for layer, edit in edits.items()}
        named_by_prompt = isinstance(positions, Tensor) or positions in ("last", "prompt", "generated")
        with hooks.edit(model, functions, side=side), tracker.generations(model, needs_prompt=named_by_prompt):
            yield counts
        if inputs.completed and (missed := [layer for layer in edits if layer not in reached]):
            raise InputError(f"the model ran {inputs.completed} times, but never through layers {missed}")
        if inputs.completed and edits and not counts.edited:
            _refuse_untouched(positions, counts)


def _refuse_untouched(positions: Positions, counts: EditCounts) -> None:
    if sinks := counts.passed_over["sink"]:
        raise InputError(f"nothing was edited: all {sinks:,} positions asked for are attention sinks ({counts})")
    if isinstance(positions, Tensor):
        raise InputError(f"nothing was edited: the mask names first positions and padding at most ({counts})")
    if isinstance(positions, int) and positions > 1:
        raise InputError(f"nothing was edited: no sequence reached position {positions} ({counts})")


def for_batch(values: Tensor, batch: int, name: str) -> Tensor:
    """`values` [b, ...] for `batch` rows: ``generate()`` puts the copies of a row, such as its beams, side by side."""
    if batch % len(values):
        raise InputError(f"{name} has {len(values)} rows, which does not fit a batch of {batch}")
    return values.repeat_interleave(batch // len(values), dim=0)


def check_positions(positions: Positions) -> None:
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2 or not positions.numel():
            found = f"{positions.dtype} {list(positions.shape)}"
            raise InputError(f"a mask of positions must be bool [batch, columns of the prompt], got {found}")
    elif isinstance(positions, int) and not isinstance(positions, bool):
        if positions < 0:
            raise InputError(f"the position to start from counts from 0, got {positions}")
    elif positions not in POSITIONS:
        raise unknown("positions", positions, (*POSITIONS, "a position to start from", "a boolean mask"))


def _wanted(positions: Positions, prompt: Prompt, column: Tensor, position: Tensor) -> Tensor:
    """Mask, of a shape that broadcasts to [B, T], of what `positions` names among `column` [T], `position` [B, T]."""
    if isinstance(positions, Tensor):
        if positions.shape[1] < prompt.begun:
            raise InputError(f"the mask of positions has {positions.shape[1]} columns, the prompt {prompt.begun}")
        mask = for_batch(positions, len(position), "the mask of positions").to(column.device)
        width = mask.shape[1]
        return mask[:, column.clamp(max=width - 1)] & (column < width)
    if isinstance(positions, int):
        return position >= positions
    last = prompt.last.to(column.device)[:, None]
    if positions == "prompt":
        return column <= last
    if positions == "last":
        return column >= last
    if positions == "generated":
        return column > last
    return torch.ones_like(position, dtype=torch.bool)
