"""Reading and changing hidden states while the model runs: the only module that registers hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from latentprior.config import Side
from latentprior.lm.hooks.blocks import check_side, down_projection, forward_parameters, language_model, select_blocks
from latentprior.utils.errors import InputError


@contextmanager
def capture(model: nn.Module, layers: Iterable[int], *, side: Side = "output") -> Iterator[dict[int, Tensor]]:
    """A dict that every forward pass fills with the hidden states [B, T, d] of `layers`.

    They are the model's own, not copies, and part of the autograd graph if there is one. Edits entered before are seen,
    later ones are not. A compiled model is an `InputError`, here and below: it ignores hooks.
    """
    hidden_states: dict[int, Tensor] = {}
    with _visiting(model, {layer: partial(hidden_states.__setitem__, layer) for layer in layers}, side):
        yield hidden_states


class _Reached(Exception):
    pass


def run_cut(model: nn.Module, layers: Iterable[int], *, side: Side = "output", **inputs: Any) -> dict[int, Tensor]:
    """The hidden states [B, T, d] of `layers`, without gradients, cache or dropout: no later block and no head runs."""
    layers = list(dict.fromkeys(layers))
    if not layers:
        raise InputError("name at least one layer")
    hidden_states: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        hidden_states[layer] = hidden
        if layer == max(layers):
            raise _Reached

    if "use_cache" in forward_parameters(model):
        inputs.setdefault("use_cache", False)
    # Not inference mode: its tensors could not be trained on.
    with torch.no_grad(), ExitStack() as stack, suppress(_Reached):
        stack.enter_context(_visiting(model, {layer: partial(keep, layer) for layer in layers}, side))
        for module in model.modules():
            if module.training:
                stack.enter_context(replaced_attribute(module, "training", False))
        model(**inputs)
    if lost := [layer for layer in layers if layer not in hidden_states]:
        raise InputError(f"the hooks of layers {lost} did not run: they cannot be read")
    return {layer: hidden_states[layer] for layer in layers}


@contextmanager
def edit(model: nn.Module, edits: Mapping[int, Callable[[Tensor], Tensor]], *, side: Side = "output") -> Iterator[None]:
    """Replace hidden states while the context is open, also under `generate()`.

    Each function gets a copy of the hidden state [B, T, d]; what it returns is cast back to the model's dtype and
    device. Edits of nested contexts apply in the order in which they were entered.
    """
    with _visiting(model, {layer: partial(_edited, layer, function) for layer, function in edits.items()}, side):
        yield


def _edited(layer: int, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    edited = function(hidden.clone())  # a copy, as `h[:, -1] += v` must not reach what others hold
    if not isinstance(edited, Tensor) or edited.shape != hidden.shape:
        got = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise InputError(f"the edit of layer {layer} must return a tensor {list(hidden.shape)}, got {got}")
    return edited.to(hidden.device, hidden.dtype)


@contextmanager
def _visiting(model: nn.Module, visitors: Mapping[int, Callable[[Tensor], Tensor | None]], side: str) -> Iterator[None]:
    """Call each visitor with the hidden state of its layer; one that returns a tensor replaces it."""
    check_side(side)
    blocks = select_blocks(model, visitors)
    with ExitStack() as stack:
        if (settings := getattr(language_model(model), "generation_config", None)) is not None:
            # `generate()` compiles the model for static caches: it would run past the hooks.
            stack.enter_context(replaced_attribute(settings, "disable_compile", True))
        for layer, visit in visitors.items():
            register = _on_output if side == "output" else _on_input
            place = down_projection(model, blocks[layer]) if side == "mlp" else blocks[layer]
            stack.callback(register(place, visit).remove)
        yield


def _on_output(block: nn.Module, visit: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nested = isinstance(output, (tuple, list))
        replacement = visit(_hidden_state(output[0] if nested else output))
        if replacement is None or not nested:
            return replacement
        return type(output)((replacement, *output[1:]))

    return block.register_forward_hook(hook)


def _on_input(block: nn.Module, visit: Callable[[Tensor], Tensor | None]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replacement = visit(_hidden_state(args[0] if args else kwargs.get("hidden_states")))
        if replacement is None:
            return None
        return ((replacement, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": replacement})

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _hidden_state(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 3:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"unsupported architecture: a block passes on {got}, not a tensor [batch, tokens, width]")
    return value


@contextmanager
def replaced_attribute(owner: object, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one object is `value` while the context is open; one of its own comes back."""
    before = {key: own for key, own in vars(owner).items() if key == name}
    setattr(owner, name, value)
    try:
        yield
    finally:
        vars(owner).pop(name, None)
        vars(owner).update(before)


@dataclass
class ForwardInputs:
    """What the model was last called with."""

    ids: Tensor | None = None  # [B, T]; None if the call gave embeddings
    embeds: Tensor | None = None  # [B, T, d]; None if the call gave token ids
    attention_mask: Tensor | None = None  # [B, past + T], or [B, 1, T, keys] under a static cache
    position_ids: Tensor | None = None  # [B, T] or [1, T]
    past_length: int = 0  # columns in the key-value cache, before the first of this call
    placed: bool = False  # whether anything in the call told `past_length`; else it is taken for 0
    calls: int = 0  # forward passes begun so far
    completed: int = 0  # forward passes that ran to their end


CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # newest first


def cache_argument(model: nn.Module) -> str:
    """The name of this model's argument for its key-value cache, in the installed version of transformers."""
    taken = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in taken), "past_key_values")


@contextmanager
def forward_inputs(model: nn.Module) -> Iterator[ForwardInputs]:
    """The inputs of the latest forward pass of `model`, for functions that edit its hidden states."""
    latest = ForwardInputs()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(names[module], args, strict=False)) | kwargs
        mask = inputs.get("attention_mask")
        if isinstance(mask, Mapping):  # one mask for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values())))
        latest.ids = inputs.get("input_ids")
        latest.embeds = inputs.get("inputs_embeds") if latest.ids is None else None
        given = latest.embeds if latest.ids is None else latest.ids
        width = 0 if given is None else given.shape[1]
        latest.attention_mask = mask
        latest.position_ids = _position_ids(inputs.get("position_ids"), width)
        past_length = _past_length(inputs, mask, latest.position_ids, width)
        latest.past_length, latest.placed = past_length or 0, past_length is not None
        latest.calls += 1

    def complete(*_: Any) -> None:
        latest.completed += 1

    # Both, as a PEFT wrapper may call the model's `forward` itself while `generate()` calls the model.
    entries = {model, language_model(model) or model}
    names = {entry: list(inspect.signature(entry.forward).parameters) for entry in entries}
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(entry.register_forward_hook(complete).remove)
        yield latest


def _position_ids(given: Any, width: int) -> Tensor | None:
    if not isinstance(given, Tensor):
        return None
    given = given[None] if given.ndim == 1 else given  # other shapes have one for each axis of an image
    return given if given.ndim == 2 and given.shape[1] == width else None


def _past_length(inputs: Mapping[str, Any], mask: Any, position_ids: Tensor | None, width: int) -> int | None:
    """Columns before this call's; None if nothing tells."""
    told = [int(value.get_seq_length()) for value in inputs.values() if hasattr(value, "get_seq_length")]
    cache_position = inputs.get("cache_position")
    if isinstance(cache_position, Tensor) and cache_position.numel():
        told.append(int(cache_position.flatten()[0]))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        told.append(max(mask.shape[1] - width, 0))
    elif position_ids is not None:
        told.append(max(int(position_ids[:, -1].max()) + 1 - width, 0))  # packed sequences begin again at 0
    unknown = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    if unknown is not None and not told:
        raise InputError(
            f"the cache ({type(unknown).__name__}) has no get_seq_length, and neither positions nor a mask of all "
            "columns came with it: where the tokens stand cannot be told"
        )
    # Caches without keys, as of state space models, say 0 at any time, so whatever says more is believed.
    return next((length for length in told if length), 0) if told else None


Outputs = dict[int, Any]  # what blocks returned, by layer


def blocks_before(model: nn.Module, layer: int, side: Side) -> range:
    """The layers of the blocks that run before an edit at one side of `layer` is made."""
    check_side(side)
    select_blocks(model, [layer])
    return range(layer + 1 if side == "output" else layer)


@contextmanager
def keeping(model: nn.Module, layers: range) -> Iterator[Outputs]:
    """A dict that every forward pass fills with copies of what the blocks of `layers` return, whatever that is."""
    kept: Outputs = {}
    with ExitStack() as stack:
        for layer, block in select_blocks(model, layers).items():

            def keep(_block: nn.Module, _args: Any, output: Any, layer: int = layer) -> None:
                kept[layer] = _copied(output)

            stack.callback(block.register_forward_hook(keep).remove)
        yield kept


@contextmanager
def replaying(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    """Blocks whose outputs `keeping` kept return these and do not run; hooks on them see and change them as ever.

    The result is that of a whole pass only if the inputs are the same and if blocks pass on all they found by what they
    return: one that leaves keys and values in a cache does not. Compare an unedited pass with a whole one.
    """
    with ExitStack() as stack:
        for layer, block in select_blocks(model, outputs).items():

            def forward(*_args: Any, layer: int = layer, **_kwargs: Any) -> Any:
                return _copied(outputs[layer])

            stack.enter_context(replaced_attribute(block, "forward", forward))
        yield


def _copied(output: Any) -> Any:
    """A copy that no later block can change in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)
