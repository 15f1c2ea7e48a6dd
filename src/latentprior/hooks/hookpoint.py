"""Where activations come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from latentprior import config
from latentprior.config import Side
from latentprior.errors import InputError
from latentprior.hooks.blocks import check_side, find_blocks_at, language_model, select_blocks, width_of


@dataclass(frozen=True)
class Hookpoint:
    """Where activations come from: one side of one block of one model."""

    model: str
    """Hugging Face id or folder; empty if unknown."""
    layer: int
    """Index of the block, from 0."""
    width: int
    """Size of the residual stream, or of the MLP's hidden units."""
    side: Side = "output"
    """The block's output (`hidden_states[layer + 1]` of transformers), its input, or the hidden units of its MLP."""
    path: str = ""
    """The block's name in the model, such as "model.layers.15"."""
    revision: str | None = None
    """Commit of the model on the Hub, where known."""

    def __post_init__(self) -> None:
        check_side(self.side)
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
        block = select_blocks(model, [layer])[layer]
        source = getattr(language_model(model), "config", None)
        return cls(
            model=getattr(source, "_name_or_path", ""),
            layer=layer,
            width=width_of(model, block, side),
            side=side,
            path=f"{find_blocks_at(model)[0]}.{layer}".lstrip("."),
            revision=getattr(source, "_commit_hash", None),
        )

    def __str__(self) -> str:
        return f"{self.model or 'some model'} layer {self.layer} {self.side} (width {self.width})"

    def same_place(self, other: Hookpoint, *, check_model: bool = True) -> bool:
        """Whether two hookpoints are the same side of the same block; model names are compared as in `check`."""
        if check_model and not _same_model(self.model, other.model):
            return False
        return (self.layer, self.side, self.width) == (other.layer, other.side, other.width)

    def check(self, model: nn.Module, *, check_model: bool = True) -> nn.Module:
        """The block of `model` that this hookpoint names.

        Args:
            check_model: refuse a model of another name. Two names are the same if their last path components are (a
                local copy); an empty name is unknown and matches everything.

        Raises:
            InputError: another model, a layer that it does not have, or another width.
        """
        name = getattr(getattr(language_model(model), "config", None), "_name_or_path", "")
        if check_model and not _same_model(self.model, name):
            raise InputError(
                f"this hookpoint belongs to model {self.model!r}, not {name!r} (check_model=False allows it on purpose)"
            )
        block = select_blocks(model, [self.layer])[self.layer]
        width = width_of(model, block, self.side)
        if width != self.width:
            what = "MLP" if self.side == "mlp" else "hidden size"
            raise InputError(f"this hookpoint has width {self.width}, but the model's {what} is {width}")
        return block

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values."""
        return config.to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Hookpoint:
        """The inverse of `to_dict`; an unknown key is an `InputError`."""
        return config.from_dict(cls, values)


def _same_model(name: str, other: str) -> bool:
    """A local copy has the same last component; an empty name is unknown and matches everything."""
    return not name or not other or _last_component(name) == _last_component(other)


def _last_component(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
