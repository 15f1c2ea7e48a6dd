"""What the checks look at: a language model, perhaps a prior, and what the model writes with and without edits.

Generated texts are compared by their logits, in standard deviations of the logits and up to the first different token.
So a tie that rounding decides is no difference, while an activation that is read or edited at a wrong position is one
even if the texts are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior.data.activations import model_inputs
from latentprior.data.text import Document
from latentprior.data.tokens import TokenBatch, encode, pad, padding_id, tokenize
from latentprior.lm.edits import EditedPositions, edit_positions
from latentprior.lm.hooks import Hookpoint, find_blocks, run_cut
from latentprior.prior.glp import GLP
from latentprior.utils.chips import device_memory
from latentprior.utils.errors import InputError
from latentprior.utils.random import normal

Generated = tuple[Tensor, Tensor]  # new tokens [B, NEW] and their logits [B, NEW, V] in float32

TEXTS = (
    "The river had been low all summer, and by September the children could walk across it without getting their knees "
    "wet, which no one in the village remembered ever having seen before.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "Paris is the capital of France, Ottawa that of Canada, and Canberra, to the surprise of many, that of Australia.",
    "Dear Dr. Okafor, thank you for your letter of 3 March; we are glad to accept your offer and shall be there.",
    "La mer était calme ce matin-là, et le bateau rentrait au port sans que personne ne parle.",
    "In 1905 he published four papers, each of which would have been enough for a career.",
)
LENGTHS = (24, 13, 7)  # tokens of the prompts: different, so that a batch of them is padded
LONGEST = 64  # tokens of a text that is recorded
NEW = 8  # tokens to generate
PUSH = 2.0  # norm of the edit under which texts are compared, in median norms of the layer
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}  # between logits of equal generations


class Skipped(Exception):
    """There is nothing to check."""


@dataclass
class Subject:
    """A model, perhaps a prior, and what several checks need of them; made when first asked for."""

    device: str  # as it was named; the model's own is `model.device`
    load_llm: Callable[[], tuple[Any, Any]]
    load_prior: Callable[[], GLP]
    wanted_layer: int | None
    prior: GLP | None = None  # once it is loaded

    @cached_property
    def llm(self) -> tuple[Any, Any]:
        return self.load_llm()

    @property
    def model(self) -> Any:
        return self.llm[0]

    @property
    def tokenizer(self) -> Any:
        return self.llm[1]

    @cached_property
    def layer(self) -> int:
        """The layer asked for, else the prior's if the model has it, else the middle one."""
        if self.wanted_layer is not None:
            return self.wanted_layer
        depth = len(find_blocks(self.model))
        known = [h.layer for h in self.prior.hookpoints if h.layer < depth] if self.prior else []
        return known[0] if known else depth // 2

    @cached_property
    def hookpoint(self) -> Hookpoint:
        return Hookpoint.of(self.model, self.layer)

    @cached_property
    def batch(self) -> TokenBatch:
        documents = (Document(index, text) for index, text in enumerate(TEXTS))
        (batch,) = tokenize(documents, self.tokenizer, max_length=LONGEST, batch_tokens=LONGEST * len(TEXTS))
        return batch

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [row[:length] for row, length in zip(encode([*TEXTS], self.tokenizer), LENGTHS, strict=False)]

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Norms at the layer of the texts' positions, those that are recorded [N] and the first ones [B]."""
        inputs: dict[str, Any] = {**model_inputs(self.model, self.batch)}
        hidden = run_cut(self.model, [self.layer], **inputs)[self.layer]
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32).cpu()
        if broken := int((self.batch.mask & ~norms.isfinite()).sum()):
            where = f"at layer {self.layer} in {dtype_name(self.model.dtype)}"
            raise InputError(f"{broken} of {int(self.batch.mask.sum())} activations {where} are infinite or NaN")
        return norms[self.batch.position > 0], norms[self.batch.position == 0]

    def generate(self, rows: Sequence[list[int]], *, cache: bool = True) -> Generated:
        """Greedy continuations of `rows`, padded on the left."""
        filler = padding_id(self.tokenizer)
        ids, mask, _ = pad([*rows], filler, "left")
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.long().to(self.model.device),
            use_cache=cache,
            do_sample=False,
            num_beams=1,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            pad_token_id=filler,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(out.logits, dim=1).float().cpu()
        if not logits.isfinite().all():
            raise InputError("the logits of generated tokens are infinite or NaN")
        return out.sequences[:, ids.shape[1] :].cpu(), logits

    def generate_pushed(self, rows: Sequence[list[int]], *, cache: bool = True) -> Generated:
        """`generate` with a large edit at every position but the first, in a direction of its own at each."""
        directions = F.normalize(normal(NEW, self.hookpoint.width, seed=0), dim=-1)
        directions = PUSH * float(self.norms[0].median()) * directions
        count = 0

        def push(x: Tensor, at: EditedPositions) -> Tensor:
            nonlocal count
            count += len(x)
            return x + directions.to(x)[at.position % NEW]

        with edit_positions(self.model, {self.layer: push}):
            found = self.generate(rows, cache=cache)
        require_edits(count, rows, cache=cache)
        return found


class Identity:
    """A prior that changes nothing, and counts the activations it gets."""

    def __init__(self, hookpoint: Hookpoint) -> None:
        self.hookpoints, self.count = (hookpoint,), 0

    def project(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        self.count += len(x)
        return x


def require_edits(count: int, rows: Sequence[list[int]], *, cache: bool = True) -> None:
    """Raise `InputError` unless every position but the first was edited whenever `generate` computed it."""
    prompt = sum(len(row) - 1 for row in rows)
    passes = range(1, NEW)  # the last new token is no input any more
    expected = prompt + sum(len(rows) if cache else prompt + step * len(rows) for step in passes)
    if count != expected:
        how = "with" if cache else "without"
        raise InputError(f"{count} positions were edited instead of {expected} in generation {how} a key-value cache")


def logit_distance(found: Generated, expected: Generated) -> float:
    """How far logits [B, NEW, V] are apart at most, up to the first different token of each row.

    Root mean square over the vocabulary, in standard deviations of the logits: 1.4 if they have nothing in common.
    """
    compared = (found[0] == expected[0]).long().cumprod(dim=1).roll(1, dims=1)
    compared[:, 0] = 1  # behind a different token the logits ought to differ
    differences = (found[1] - expected[1]).square().mean(dim=-1).sqrt()
    return float((differences * compared).max() / expected[1].std(dim=-1).mean())


def require_equal(found: Generated, expected: Generated, dtype: torch.dtype, otherwise: str) -> float:
    """The `logit_distance` of two generations; if rounding in `dtype` does not explain it, an `InputError`."""
    distance = logit_distance(found, expected)
    if distance > TOLERANCE[dtype]:
        raise InputError(f"{otherwise}: {in_words(distance, dtype)}")
    return distance


def in_words(distance: float, dtype: torch.dtype) -> str:
    return f"logits are {distance:.2g} sd apart ({dtype_name(dtype)}, tolerance {TOLERANCE[dtype]:g})"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[torch.dtype]:
    """The weights in float32 within the context, if they fit into half the memory; gives their precision."""
    whole: Any = model
    half = [t for t in chain(model.parameters(), model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    fits = sum(4 * t.numel() for t in half) < device_memory(whole.device) / 2
    only_half = "flash" in str(whole.config._attn_implementation)  # its kernels take nothing else
    if only_half or not fits or any(t.is_meta for t in half):
        yield whole.dtype
        return
    before = [t.dtype for t in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield whole.dtype
    finally:
        for tensor, dtype in zip(half, before, strict=True):
            tensor.data = tensor.data.to(dtype)
