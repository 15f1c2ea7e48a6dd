"""Finding a language model's decoder blocks, and the parts of them, in any architecture."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn

from latentprior.config import Side
from latentprior.utils.errors import InputError, unknown

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in order, below any wrapper (PEFT, DDP, `torch.compile`).

    They are the `ModuleList` below the model's decoder that has as many members, mostly of one class, as the text
    config has layers; the one with most parameters if there are several. Without a transformers config, the largest
    list of one class. An encoder-decoder model is an `InputError`.
    """
    return find_blocks_at(model)[1]


def find_blocks_at(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks and their path below `model`."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    fitting = {name: m for name, m in lists.items() if _mostly_one_class(m)}
    wrapped = language_model(model)
    if wrapped is not None and wrapped.config.is_encoder_decoder:
        raise InputError(f"{type(wrapped).__name__} is an encoder-decoder model: only decoder-only ones work")
    depth = getattr(text_config(model), "num_hidden_layers", None)
    if wrapped is not None and depth is not None:
        fitting = {name: m for name, m in fitting.items() if len(m) == depth}
        below = set(wrapped.get_decoder().modules())  # not a vision or audio tower
        fitting = {name: m for name, m in fitting.items() if m in below}
    if not fitting:
        found = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        wanted = f" with {depth} members" if depth is not None else ""
        raise InputError(f"no decoder blocks in {type(model).__name__}: no ModuleList{wanted} fits (found: {found})")
    return max(fitting.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _mostly_one_class(blocks: nn.ModuleList) -> bool:
    """Hybrid models mix in a few blocks of a second class."""
    return 2 * Counter(map(type, blocks)).most_common(1)[0][1] > len(blocks)


def language_model(model: nn.Module) -> Any | None:
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
    """The transformers config of the model's text decoder, if `model` has one."""
    wrapped = language_model(model)
    return None if wrapped is None else wrapped.get_decoder().config.get_text_config(decoder=True)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model, or the transformers model that it wraps, takes."""
    return frozenset(inspect.signature((language_model(model) or model).forward).parameters)


def width_of(model: nn.Module, block: nn.Module, side: Side) -> int:
    """Size of what is read on a side of a block: of the residual stream, or of the MLP's hidden units."""
    return _sizes(down_projection(model, block))[0] if side == "mlp" else _stream_width(model, block)


def down_projection(model: nn.Module, block: nn.Module) -> nn.Module:
    """The linear layer from the hidden units of a block's MLP to the residual stream; a mixture of experts has none."""
    width = _stream_width(model, block)
    fitting = [
        module
        for name, module in block.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 2
        and _sizes(module)[1] == width
        and not _ATTENTION.search(name)
    ]
    if not fitting:
        raise InputError(f"{type(block).__name__} has no single MLP whose hidden units could be read")
    return max(fitting, key=lambda module: math.prod(_sizes(module)))  # not an adapter's


def _sizes(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; transformers' Conv1D, of GPT-2, keeps its weight transposed."""
    rows, columns = linear.weight.shape
    return (rows, columns) if type(linear).__name__ == "Conv1D" else (columns, rows)


def _stream_width(model: nn.Module, block: nn.Module) -> int:
    known = getattr(text_config(model), "hidden_size", None)
    # Everything in a block reads from or writes to the residual stream, so its width is the commonest dimension.
    return known or Counter(size for p in block.parameters() for size in p.shape).most_common(1)[0][0]


def check_in_range(layer: int, blocks: int, name: str) -> None:
    if not 0 <= layer < blocks:
        raise InputError(f"layer {layer} is out of range: {name} has layers 0 to {blocks - 1}")


def select_blocks(model: nn.Module, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The blocks of `layers`, checked; repeated layers count once."""
    path, blocks = find_blocks_at(model)
    selected = {}
    for layer in layers:
        check_in_range(layer, len(blocks), type(model).__name__)
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


def check_side(side: str) -> None:
    if side not in get_args(Side):
        raise unknown("side", side, get_args(Side))
