"""Reading and changing the hidden states of a language model: the only module that registers hooks.

A *layer* is the index of a decoder block; its "output" side is `hidden_states[layer + 1]` of transformers, its "input"
side `hidden_states[layer]`. Blocks are found from the model itself, so any decoder-only architecture works.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from latentprior import config
from latentprior.config import Side
from latentprior.errors import InputError, unknown


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in order.

    They are the `ModuleList` below the model's decoder that has as many members, mostly of one class, as the text
    config has layers; the one with most parameters if there are several. Without a transformers config they are the
    largest list of members of one class. Wrappers (PEFT, DDP, `torch.compile`) are looked through.

    Raises:
        InputError: an encoder-decoder model, or no list that fits.
    """
    return _find_blocks(model)[1]


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks and their path below `model`."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    fitting = {name: m for name, m in lists.items() if _mostly_one_class(m)}
    language_model = _language_model(model)
    if language_model is not None and language_model.config.is_encoder_decoder:
        raise InputError(f"{type(language_model).__name__} is an encoder-decoder model: only decoder-only ones work")
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if language_model is not None and depth is not None:
        fitting = {name: m for name, m in fitting.items() if len(m) == depth}
        below = set(language_model.get_decoder().modules())  # not a vision or audio tower
        fitting = {name: m for name, m in fitting.items() if m in below}
    if not fitting:
        found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        wanted = f" with {depth} members" if depth is not None else ""
        raise InputError(f"no decoder blocks in {type(model).__name__}: no ModuleList{wanted} fits (found: {found})")
    return max(fitting.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _mostly_one_class(blocks: nn.ModuleList) -> bool:
    """Hybrid models mix in a few blocks of a second class."""
    return 2 * Counter(map(type, blocks)).most_common(1)[0][1] > len(blocks)


def _language_model(model: nn.Module) -> Any | None:
    """The outermost transformers model in `model`, whatever wraps it."""
    from transformers import PreTrainedModel  # slow to import, and not needed to import this package

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def drop_blocks_after(model: nn.Module, layer: int) -> int:
    """Free the blocks after `layer`, for a model that only runs up to there (`run_cut`); returns how many it had."""
    blocks = find_blocks(model)
    count = len(blocks)
    del blocks[layer + 1 :]
    config = text_config(model)
    if config is not None:
        config.num_hidden_layers = len(blocks)
    return count


def text_config(model: nn.Module) -> Any | None:
    """The transformers config of the model's text decoder; None if there is no transformers model in `model`."""
    language_model = _language_model(model)
    return None if language_model is None else language_model.get_decoder().config.get_text_config(decoder=True)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model, or the transformers model that it wraps, takes."""
    return frozenset(inspect.signature((_language_model(model) or model).forward).parameters)


def _width(model: nn.Module, block: nn.Module) -> int:
    """Size of the residual stream."""
    known = getattr(text_config(model), "hidden_size", None)
    # Everything in a block reads from or writes to the residual stream, so its width is the commonest dimension.
    return known or Counter(size for p in block.parameters() for size in p.shape).most_common(1)[0][0]


def _select_blocks(model: nn.Module, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The blocks of `layers`, checked; repeated layers count once."""
    path, blocks = _find_blocks(model)
    selected = {}
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise InputError(f"layer {layer} is out of range: {type(model).__name__} has layers 0 to {len(blocks) - 1}")
        _refuse_compiled(model, f"{path}.{layer}".lstrip("."))
        selected[layer] = blocks[layer]
    return selected


def _refuse_compiled(model: nn.Module, path: str) -> None:
    """Compiled code ignores hooks that were added after it was compiled, so the edit would silently not happen."""
    module = model
    for name in ["", *path.split(".")]:
        module = module if name == "" else getattr(module, name)
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise InputError(
                f"{type(module).__name__} was compiled, and compiled modules ignore hooks: "
                "use the model as it was before torch.compile (model._orig_mod)"
            )


def _check_side(side: str) -> None:
    if side not in get_args(Side):
        raise unknown("side", side, get_args(Side))


@dataclass(frozen=True)
class Hookpoint:
    """Where activations come from: one side of one block of one model."""

    model: str
    """Hugging Face id or folder; empty if unknown."""
    layer: int
    """Index of the block, from 0."""
    width: int
    """Size of the residual stream."""
    side: Side = "output"
    """The block's output (`hidden_states[layer + 1]` of transformers) or its input."""
    path: str = ""
    """The block's name in the model, such as "model.layers.15"."""
    revision: str | None = None
    """Commit of the model on the Hub, where known."""

    def __post_init__(self) -> None:
        _check_side(self.side)
        if self.layer < 0:
            raise InputError(f"layers are counted from 0, got {self.layer}")
        if self.width < 1:
            raise InputError(f"Hookpoint.width must be positive, got {self.width}")

    @classmethod
    def of(cls, model: nn.Module, layer: int, side: Side = "output") -> Hookpoint:
        """The hookpoint of a loaded model.

        Raises:
            InputError: a layer that the model does not have, an unknown side, or no blocks found.
        """
        block = _select_blocks(model, [layer])[layer]
        source = getattr(_language_model(model), "config", None)
        return cls(
            model=getattr(source, "_name_or_path", ""),
            layer=layer,
            width=_width(model, block),
            side=side,
            path=f"{_find_blocks(model)[0]}.{layer}".lstrip("."),
            revision=getattr(source, "_commit_hash", None),
        )

    def check(self, model: nn.Module, *, check_model: bool = True) -> nn.Module:
        """The block of `model` that this hookpoint names.

        Args:
            check_model: refuse a model of another name. Two names are the same if their last path components are (a
                local copy); an empty name is unknown and matches everything.

        Raises:
            InputError: another model, a layer that it does not have, or another width.
        """
        name = getattr(getattr(_language_model(model), "config", None), "_name_or_path", "")
        if check_model and self.model and name and _last_component(self.model) != _last_component(name):
            raise InputError(
                f"this hookpoint belongs to model {self.model!r}, not {name!r} (check_model=False allows it on purpose)"
            )
        block = _select_blocks(model, [self.layer])[self.layer]
        width = _width(model, block)
        if width != self.width:
            raise InputError(f"this hookpoint has width {self.width}, but the model's hidden size is {width}")
        return block

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values."""
        return config.to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Hookpoint:
        """The inverse of `to_dict`; an unknown key is an `InputError`."""
        return config.from_dict(cls, values)


def _last_component(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


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
    _check_side(side)
    blocks = _select_blocks(model, visitors)
    with ExitStack() as stack:
        stack.enter_context(_eager_generation(model))
        for layer, visit in visitors.items():
            register = _on_output if side == "output" else _on_input
            stack.callback(register(blocks[layer], visit).remove)
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
    settings = getattr(_language_model(model), "generation_config", None)
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
    entries = {model, _language_model(model) or model}
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
