"""Which position a column of a forward pass has, and where its prompt ends: `token_positions`, `GenerationTracker`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from latentprior.lm import hooks
from latentprior.lm.hooks.passes import replaced_attribute
from latentprior.utils.errors import InputError

# What `generate()` does under these options cannot be told from its forward passes alone.
_HIDES_THE_PROMPT = {
    "assistant_model": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "use_mtp": "assisted decoding",
    "guidance_scale": "classifier-free guidance",
    "prefill_chunk_size": "a prompt in chunks",
}


def token_positions(hidden: Tensor, inputs: hooks.ForwardInputs) -> tuple[Tensor, Tensor]:
    """Which columns of a forward pass are real tokens, bool [B, T], and every column's position, int64 [B, T]."""
    batch, width = hidden.shape[:2]
    attention, ids, past = inputs.attention_mask, inputs.position_ids, inputs.past_length
    if attention is None:
        real = torch.ones(batch, width, dtype=torch.bool, device=hidden.device)
        position = past + torch.arange(width, device=hidden.device).expand(batch, width)
    elif not isinstance(attention, Tensor) or attention.ndim not in (2, 4):
        raise InputError("this model's attention mask is neither [batch, keys] nor [batch, 1, queries, keys]")
    elif attention.ndim == 4:
        real, position = _from_causal_mask(attention, inputs, width)
    elif attention.shape[1] >= past + width:
        known = attention[:, : past + width].bool()
        real, position = known[:, -width:], known.long().cumsum(1)[:, -width:] - 1
    elif attention.shape[1] == width and ids is not None:  # of this pass alone
        real, position = attention.bool(), past + attention.bool().long().cumsum(1) - 1
    else:
        raise InputError(
            f"the attention mask has {attention.shape[1]} columns, cache and tokens {past + width}: give all of them"
        )
    real, position = real.to(hidden.device).expand(batch, -1), position.to(hidden.device).expand(batch, -1)
    if ids is not None:
        # A mask does not know where packed sequences begin, and position ids may count padding: the smaller is right.
        position = torch.minimum(position, ids.to(position))
    return real, position


def _from_causal_mask(attention: Tensor, inputs: hooks.ForwardInputs, width: int) -> tuple[Tensor, Tensor]:
    """`token_positions` of a mask [B, 1, queries, keys], as static caches come with: a real token sees itself."""
    sees = attention[:, 0] if attention.dtype == torch.bool else attention[:, 0] == 0
    total = inputs.past_length + width
    if sees.shape[-1] >= total:
        known = sees.any(dim=1)[:, :total]
        return known[:, -width:], known.long().cumsum(1)[:, -width:] - 1
    if inputs.position_ids is None:  # a sliding window has dropped its oldest keys
        raise InputError("this model's cache drops keys, and without `position_ids` positions cannot be told")
    return sees.any(dim=2)[:, -width:], inputs.position_ids


@dataclass
class Prompt:
    """The first forward pass of the sequence being generated, to tell prompt from generated columns."""

    ids: Tensor | None
    last: Tensor  # [B] column of each row's last prompt token
    begun: int  # columns of the prompt, those from a cache included
    width: int  # columns seen so far
    keys: Sequence[int] | None  # of the rows that were given, see `prompt_keys`
    call: int  # the forward pass that was seen last
    cached: bool = False  # whether a key-value cache has continued it


@dataclass
class _Generation:
    columns: int  # that are known to exist
    keys: Sequence[int] | None
    passes: int = 0


class GenerationTracker:
    """Tells prompts from their continuations, with and without a cache, in ``generate()`` and in passes by hand."""

    def __init__(self) -> None:
        self._prompt: Prompt | None = None
        self._generation: _Generation | None = None

    def prompt_of(self, inputs: hooks.ForwardInputs, hidden: Tensor, real: Tensor) -> Prompt:
        """The prompt that a forward pass begins or continues; see `token_positions` for `real`, bool [B, T]."""
        prompt = self._prompt
        if prompt is not None and prompt.call == inputs.calls:  # several layers see the same forward pass
            return prompt
        width = inputs.past_length + hidden.shape[1]
        if self._generation is not None:
            _check_placed(self._generation, inputs, width)
        if prompt is None or not _continues(prompt, inputs, hidden.shape[0], width):
            prompt = self._prompt = self._begin(inputs, hidden, real)
        else:
            prompt.width, prompt.cached = width, inputs.past_length > 0
        prompt.call = inputs.calls
        return prompt

    def _begin(self, inputs: hooks.ForwardInputs, hidden: Tensor, real: Tensor) -> Prompt:
        ids, width = inputs.ids, inputs.past_length + hidden.shape[1]
        column = torch.arange(hidden.shape[1], device=hidden.device)
        last = inputs.past_length + torch.where(real, column, -1).amax(dim=1)
        keys = None if self._generation is None else self._generation.keys
        given = inputs.embeds if ids is None else ids
        if keys is None and given is not None:
            keys = prompt_keys(given, real)
        return Prompt(None if ids is None else ids.detach().clone(), last, width, width, keys, inputs.calls)

    def keys(self, batch: int) -> list[int] | None:
        """`prompt_keys` for each of `batch` rows, where known; beams and returned sequences have their prompt's."""
        keys = None if self._prompt is None else self._prompt.keys
        if keys is None or batch % len(keys):
            return None
        return [key for key in keys for _ in range(batch // len(keys))]

    @contextmanager
    def generations(self, model: nn.Module, *, needs_prompt: bool) -> Iterator[None]:
        """Begin a new prompt with each ``model.generate()``; options that hide positions, or a needed prompt, are
        refused.
        """
        from transformers import GenerationMixin  # slow to import

        generator: Any = next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)
        if generator is None:
            yield
            return
        before = generator.generate

        @functools.wraps(before)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(before).bind(*args, **kwargs).arguments
            given = given.pop("kwargs", {}) | given
            _refuse_unfollowable(given, generator.generation_config, needs_prompt)
            self._prompt, self._generation = None, _begun(given)
            try:
                return before(*args, **kwargs)
            finally:
                self._generation = None

        with replaced_attribute(generator, "generate", generate):
            yield


def prompt_keys(given: Tensor, real: Tensor) -> list[int]:
    """A number for the real tokens [B, T] or embeddings [B, T, d] of each row, wherever it stands and is padded."""
    given = given.detach().cpu()
    values = given.float() if given.is_floating_point() else given.long()
    rows = zip(values, real.cpu(), strict=True)
    digests = (blake2b(row[kept].numpy().tobytes(), digest_size=8).digest() for row, kept in rows)
    return [int.from_bytes(digest, "little") for digest in digests]


def _begun(arguments: Mapping[str, Any]) -> _Generation:
    given = next((arguments[n] for n in ("inputs_embeds", "input_ids", "inputs") if arguments.get(n) is not None), None)
    if not isinstance(given, Tensor) or given.ndim not in (2, 3):
        return _Generation(0, None)
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != given.shape[:2]:
        mask = torch.ones(given.shape[:2])
    return _Generation(given.shape[1], prompt_keys(given, mask.bool()))


def _refuse_unfollowable(given: Mapping[str, Any], defaults: Any, needs_prompt: bool) -> None:
    configs = (given.get("generation_config"), defaults)

    def option(name: str) -> Any:
        values = (given.get(name), *(getattr(config, name, None) for config in configs))  # as `generate()` takes them
        return next((value for value in values if value is not None), None)

    if option("cache_implementation") == "paged":
        raise InputError("a paged cache packs several sequences into one row: generate with another cache")
    for name, meaning in _HIDES_THE_PROMPT.items() if needs_prompt else ():
        value = option(name)
        if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
            raise InputError(
                f"{meaning} ({name}) hides where the prompt ends: use positions 'all' or a number, or generate without"
            )


def _check_placed(running: _Generation, inputs: hooks.ForwardInputs, width: int) -> None:
    if inputs.past_length == 0 and width < running.columns and (running.passes or not inputs.placed):
        raise InputError(
            "this model's passes under generate() do not tell which positions they compute: they have neither a cache "
            "with get_seq_length nor positions nor a mask of all columns; generate with use_cache=False"
        )
    running.columns, running.passes = max(running.columns, width), running.passes + 1


def _continues(prompt: Prompt, inputs: hooks.ForwardInputs, batch: int, width: int) -> bool:
    if len(prompt.last) != batch or width != prompt.width + 1:
        return False
    if inputs.past_length > 0:  # several new columns at once are a prompt: the next turn of a conversation
        return inputs.past_length == prompt.width
    if inputs.ids is None or prompt.ids is None or prompt.cached:
        return False
    # Without a cache the whole sequence comes again, one token longer. Beams may have been reordered, but only
    # among beams of one prompt, so the prompt's columns stay.
    return torch.equal(inputs.ids[:, : prompt.ids.shape[1]].to(prompt.ids.device), prompt.ids)
