"""Reading and changing hidden states while the model runs: the only module that registers hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.errors import InputError
from latentprior.hooks.blocks import check_side, down_projection, forward_parameters, language_model, select_blocks


@contextmanager
def capture(model: nn.Module, layers: Iterable[int], *, side: Side = "output") -> Iterator[dict[int, Tensor]]:
    """A dict that every forward pass fills with the hidden states [B, T, d] of `layers`.

    The tensors are the model's own, not copies, and part of the autograd graph if there is one. Edits that were
    entered before are seen, later ones are not.

    Raises:
        InputError: a layer out of range, a compiled model, an unknown side.
    """
    hidden_states: dict[int, Tensor] = {}
    with _visiting(model, {layer: _keeper(hidden_states, layer) for layer in layers}, side):
        yield hidden_states


class _Reached(Exception):
    """Every needed hidden state is there."""


def run_cut(model: nn.Module, layers: Iterable[int], *, side: Side = "output", **inputs: Any) -> dict[int, Tensor]:
    """Run the model on `inputs` up to the last block of `layers`: no later block and no head runs.

    The model runs without gradients, cache or dropout; its training mode is as before afterwards.

    Returns:
        hidden states [B, T, d] for each layer, in the order of `layers`.

    Raises:
        InputError: no layer, a layer out of range, a compiled model, an unknown side.
    """
    layers = list(dict.fromkeys(layers))
    if not layers:
        raise InputError("name at least one layer")
    hidden_states: dict[int, Tensor] = {}
    keepers = {layer: _keeper(hidden_states, layer) for layer in layers}

    def stop(hidden: Tensor) -> None:
        hidden_states[last] = hidden
        raise _Reached

    last = max(layers)
    keepers[last] = stop
    if "use_cache" in forward_parameters(model):
        inputs.setdefault("use_cache", False)
    # Not inference mode: its tensors could not be trained on.
    with torch.no_grad(), _evaluating(model), _visiting(model, keepers, side):
        try:
            model(**inputs)
        except _Reached:
            pass
    return {layer: hidden_states[layer] for layer in layers}


@contextmanager
def edit(model: nn.Module, edits: Mapping[int, Callable[[Tensor], Tensor]], *, side: Side = "output") -> Iterator[None]:
    """Replace hidden states while the context is open, also under `generate()`.

    Each function gets a copy of the hidden state [B, T, d] and returns its replacement, which is cast back to the
    model's dtype and device. Edits of nested contexts apply in the order in which they were entered.

    Raises:
        InputError: a layer out of range, a compiled model, an unknown side; in the forward pass, a function that
            returns no tensor or one of another shape.
    """
    with _visiting(model, {layer: _editor(layer, function) for layer, function in edits.items()}, side):
        yield


def _keeper(hidden_states: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def keep(hidden: Tensor) -> None:
        hidden_states[layer] = hidden

    return keep


def _editor(layer: int, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def replace(hidden: Tensor) -> Tensor:
        edited = function(hidden.clone())  # a copy, as `h[:, -1] += v` must not reach what others hold
        if not isinstance(edited, Tensor) or edited.shape != hidden.shape:
            got = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise InputError(f"the edit of layer {layer} must return a tensor {list(hidden.shape)}, got {got}")
        return edited.to(hidden.device, hidden.dtype)

    return replace


@contextmanager
def _visiting(model: nn.Module, visitors: Mapping[int, Callable[[Tensor], Tensor | None]], side: str) -> Iterator[None]:
    """Call each visitor with the hidden state of its layer; one that returns a tensor replaces it."""
    check_side(side)
    blocks = select_blocks(model, visitors)
    with ExitStack() as stack:
        stack.enter_context(_eager_generation(model))
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, each module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager_generation(model: nn.Module) -> Iterator[None]:
    """Keep `generate()` from compiling the model, as it does for static caches: it would run past the hooks."""
    settings = getattr(language_model(model), "generation_config", None)
    if settings is None:
        yield
        return
    before = settings.disable_compile
    settings.disable_compile = True
    try:
        yield
    finally:
        settings.disable_compile = before


@dataclass
class ForwardInputs:
    """What the model was last called with."""

    ids: Tensor | None = None
    """[B, T] token ids; None if the call gave embeddings."""
    attention_mask: Tensor | None = None
    """[B, past + T], or [B, 1, T, keys] under a static cache; None if the call gave none."""
    position_ids: Tensor | None = None
    """[B, T] or [1, T]; None if the call gave none."""
    past_length: int = 0
    """Columns already in the key-value cache: column t of this call is column past_length + t of the sequence."""
    calls: int = 0
    """Forward passes seen so far."""


@contextmanager
def forward_inputs(model: nn.Module) -> Iterator[ForwardInputs]:
    """The inputs of the latest forward pass of `model`, for functions that edit its hidden states."""
    latest = ForwardInputs()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        mask = inputs.get("attention_mask")
        if isinstance(mask, Mapping):  # one mask for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values())))
        latest.ids = inputs.get("input_ids")
        latest.attention_mask = mask
        latest.position_ids = inputs.get("position_ids")
        latest.past_length = _cached(inputs, mask)
        latest.calls += 1

    # Both, as a PEFT wrapper may call the model's `forward` itself while `generate()` calls the model.
    entries = {model, language_model(model) or model}
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield latest


def _cached(inputs: Mapping[str, Any], mask: Tensor | None) -> int:
    """Columns that are in the cache already."""
    cache = inputs.get("past_key_values")
    if cache is not None and hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    given = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs.get("inputs_embeds")
    return mask.shape[1] - given.shape[1] if mask is not None and mask.ndim == 2 and given is not None else 0
