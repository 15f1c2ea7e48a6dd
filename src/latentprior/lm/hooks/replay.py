"""Running a model again without its first blocks: what they gave the last time is handed out in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from latentprior.config import Side
from latentprior.lm.hooks.blocks import check_side, select_blocks

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
    return: one that leaves keys and values in a cache for later blocks does not. Compare an unedited pass with a whole
    one.
    """
    with ExitStack() as stack:
        for layer, block in select_blocks(model, outputs).items():

            def forward(*_args: Any, layer: int = layer, **_kwargs: Any) -> Any:
                return _copied(outputs[layer])

            stack.callback(_restore, block, vars(block).get("forward"))
            block.forward = forward
        yield


def _copied(output: Any) -> Any:
    """A copy that no later block can change in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, output)


def _restore(block: nn.Module, own: Any) -> None:
    """Undo the assignment of a block's `forward`: one that it had of its own (accelerate sets some) comes back."""
    if own is None:
        del block.forward
    else:
        block.forward = own
