"""Prompts as tokens, and their key-value cache, shared by all that continues them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import DynamicCache

from latentprior.data.chat import prompt_ids
from latentprior.data.tokens import encode, pad, padding_id
from latentprior.lm import hooks
from latentprior.utils.errors import InputError
from latentprior.utils.reprs import ShortRepr


@dataclass(frozen=True, repr=False)
class Prompts(ShortRepr):
    """P prompts, padded on the left, BOS first."""

    texts: list[str]
    ids: Int64[Tensor, "P T"]
    mask: Bool[Tensor, "P T"]

    def __len__(self) -> int:
        return len(self.texts)

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask.long()}

    def select(self, rows: slice) -> Prompts:
        return Prompts(self.texts[rows], self.ids[rows], self.mask[rows])


def tokenized(tokenizer: Any, texts: Sequence[str], *, chat: bool = False) -> Prompts:
    """Prompts to continue; with `chat` each is a user's message that the model answers, under its chat template."""
    if not texts:
        raise InputError("there are no prompts to continue")
    shown = list(texts)
    if chat:
        rows = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    else:
        rows = encode(shown, tokenizer)
    if empty := sum(not row for row in rows):
        raise InputError(f"{empty} prompts have no tokens")
    ids, mask, _ = pad(rows, padding_id(tokenizer), "left")
    return Prompts(shown, ids, mask)


@torch.no_grad()
def prefilled(model: Any, ids: Int64[Tensor, "P T"], mask: Bool[Tensor, "P T"], copies: int) -> DynamicCache:
    """The key-value cache of all but the last token of each prompt, padded left, `copies` rows each (prompt-major)."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        known = mask[:, :-1].long().to(model.device)
        arguments: dict[str, Any] = {"input_ids": ids[:, :-1].to(model.device), "attention_mask": known}
        parameters = hooks.forward_parameters(model)
        if "position_ids" in parameters:
            arguments["position_ids"] = (known.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in parameters:
            arguments["logits_to_keep"] = 1
        model(**arguments, **{hooks.cache_argument(model): cache}, use_cache=True)
    cache.batch_repeat_interleave(copies)
    return cache
