"""How fluent generated text is, by the model that wrote it: likelihood without steering, and repetition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from latentprior.data.prompts import prefilled
from latentprior.lm import hooks
from latentprior.utils.errors import InputError

LARGEST_LOGITS = 2**25  # held at a time; 128 MiB in float32
LARGEST_VOCABULARY = 2**18  # of a model that does not tell its own


@torch.no_grad()
def conditional_nll(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    copies: int = 1,
    largest_logits: int = LARGEST_LOGITS,
) -> np.ndarray:
    """Mean negative log-likelihood of continuations given their prompts, in nats a token (paper, fluency).

    The likelihood is that of the model as it is now: call this outside of every steering context. A continuation
    without tokens has NaN.

    Args:
        inputs: "input_ids" of the prompts [B / copies, P] and, where they are padded on any side, "attention_mask".
        mask: True at tokens of the continuation, False after its end; None if all are as long as T.
        copies: continuations of each prompt, which come one after another; each prompt is run once.
        largest_logits: as many rows are taken at a time as have at most so many logits, but one at least.
    """
    prompts = inputs["input_ids"]
    prompt_mask = inputs.get("attention_mask", torch.ones_like(prompts)).bool()
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    if not copies * len(prompts) == copies * len(prompt_mask) == len(ids) or mask.shape != ids.shape:
        shapes = f"{list(prompts.shape)}, {list(ids.shape)} and {list(mask.shape)}"
        raise InputError(f"prompts, continuations and mask must have the same rows, got {shapes}")
    if not prompt_mask.any(dim=1).all():
        raise InputError("every prompt needs a token, if only the beginning of sequence: the first token follows it")
    # Prompts end, and continuations begin, at one column: only padding on the left keeps them together.
    order = prompt_mask.to(torch.uint8).argsort(dim=1, stable=True)
    prompts, prompt_mask = prompts.gather(1, order), prompt_mask.gather(1, order)
    vocabulary = getattr(hooks.text_config(model), "vocab_size", LARGEST_VOCABULARY)
    unread = 1 if "logits_to_keep" in hooks.forward_parameters(model) else prompts.shape[1]
    columns = ids.shape[1] + (unread if copies == 1 else 0)
    rows = max(1, largest_logits // (columns * vocabulary) // copies)
    chunks = zip(
        *(x.split(rows) for x in (prompts, prompt_mask)), *(x.split(rows * copies) for x in (ids, mask)), strict=True
    )
    nll = _nll if copies == 1 else partial(_nll_of_copies, copies=copies)
    device = next(model.parameters()).device
    parts = [nll(model, *(x.to(device) for x in chunk)) for chunk in chunks if len(chunk[0])]
    return torch.cat(parts).numpy() if parts else np.empty(0)


def _nll(model: nn.Module, prompts: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    arguments = _arguments(model, torch.cat([prompts, ids], dim=1), torch.cat([prompt_mask, mask], dim=1).long())
    keep = {"logits_to_keep": ids.shape[1] + 1} if "logits_to_keep" in hooks.forward_parameters(model) else {}
    logits = model(**arguments, **keep, use_cache=False).logits[:, -ids.shape[1] - 1 : -1]
    return _mean_loss(logits, ids, mask)


def _nll_of_copies(
    model: nn.Module, prompts: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, copies: int
) -> Tensor:
    """`_nll` of several continuations of each prompt [P]: the prompts' keys and values are computed once."""
    cache = {hooks.cache_argument(model): prefilled(model, prompts, prompt_mask, copies)}
    last, known = prompts[:, -1:].repeat_interleave(copies, 0), prompt_mask.repeat_interleave(copies, 0)
    attention = torch.cat([known, mask[:, :-1]], dim=1).long()
    arguments = _arguments(model, torch.cat([last, ids[:, :-1]], dim=1), attention)
    return _mean_loss(model(**arguments, **cache, use_cache=True).logits, ids, mask)


def _arguments(model: nn.Module, tokens: Tensor, attention: Tensor) -> dict[str, Tensor]:
    arguments = {"input_ids": tokens, "attention_mask": attention}
    if "position_ids" in hooks.forward_parameters(model):  # else a model with absolute positions counts the padding
        arguments["position_ids"] = (attention.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return arguments


def _mean_loss(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Mean loss [B] float64, on the CPU, of the tokens `ids` [B, T] where `scored`."""
    ids, scored = ids.to(logits.device), scored.to(logits.device)
    losses = torch.zeros(ids.shape, dtype=torch.float64, device=logits.device)
    losses[scored] = F.cross_entropy(logits[scored].float(), ids[scored], reduction="none").double()
    return (losses.sum(dim=1) / scored.sum(dim=1)).cpu()


def distinct_ngrams(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of a text that are distinct; 1 if it is shorter than n."""
    if n < 1:
        raise InputError(f"n-grams have at least one token, got n = {n}")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(ids: Sequence[int]) -> int:
    """Tokens in the longest n-gram that occurs at least twice, overlapping or not ("a a a" has 2); 0 if none does."""
    low, high = 0, max(len(ids) - 1, 0)
    while low < high:  # whatever repeats, its beginnings repeat: so bisect
        middle = (low + high + 1) // 2
        low, high = (middle, high) if distinct_ngrams(ids, middle) < 1 else (low, middle - 1)
    return low


def repetition(ids: Sequence[int]) -> dict[str, float | int]:
    """The figures of one text that need no model: "distinct_2", "distinct_3", "longest_repeat" and "tokens"."""
    return {
        "distinct_2": distinct_ngrams(ids, 2),
        "distinct_3": distinct_ngrams(ids, 3),
        "longest_repeat": longest_repeat(ids),
        "tokens": len(ids),
    }
