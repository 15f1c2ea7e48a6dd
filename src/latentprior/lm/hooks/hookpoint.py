"""Where activations come from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from latentprior import config
from latentprior.config import Side
from latentprior.lm.hooks.blocks import check_side, find_blocks_at, language_model, select_blocks, width_of
from latentprior.utils.errors import InputError, unknown

CHUNK = 2**18  # weights counted at a time: their bits stay in the cache
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of the Hub, unless there is such a folder
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")


@dataclass(frozen=True)
class Hookpoint:
    """Where activations come from: one side of one block of one model.

    Two models are the same if they have one id of the Hub (`org/name`), quantised or with adapters, or if the weights
    of the block are the same: a copy in another folder, of another name or in another precision is, and another
    fine-tuning in the same folder is not. Where one does not tell its weights, names decide: they are equal, or an id
    and a folder that ends in its name. An empty name is unknown and matches every model.
    """

    model: str  # Hugging Face id or folder; empty if unknown
    layer: int  # index of the block, from 0
    width: int  # of the residual stream, or of the MLP's hidden units
    side: Side = "output"  # see `latentprior.lm.hooks`
    path: str = ""  # the block's name in the model, such as "model.layers.15"
    revision: str | None = None  # commit on the Hub, where known
    weights: str | None = field(default=None, compare=False)  # digest of the block's, in bfloat16

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.layer < 0:
            raise InputError(f"layers are counted from 0, got {self.layer}")
        if self.width < 1:
            raise InputError(f"Hookpoint.width must be positive, got {self.width}")

    @classmethod
    def of(cls, model: nn.Module, layer: int, side: Side = "output") -> Hookpoint:
        """The hookpoint of a loaded model."""
        block = select_blocks(model, [layer])[layer]
        source = getattr(language_model(model), "config", None)
        return cls(
            model=getattr(source, "_name_or_path", ""),
            layer=layer,
            width=width_of(model, block, side),
            side=side,
            path=f"{find_blocks_at(model)[0]}.{layer}".lstrip("."),
            revision=getattr(source, "_commit_hash", None),
            weights=_digest_of(block),
        )

    def __str__(self) -> str:
        return f"{self.model or 'some model'} layer {self.layer} {self.side} (width {self.width})"

    def same_place(self, other: Hookpoint, *, check_model: bool = True) -> bool:
        """Whether both are the same side of the same block of the same model (any, without `check_model`)."""
        if check_model and not self._same_model(other):
            return False
        return (self.layer, self.side, self.width) == (other.layer, other.side, other.width)

    def _same_model(self, other: Hookpoint) -> bool:
        if not self.model or not other.model:
            return True
        if self.layer == other.layer and self.weights and other.weights:
            named_alike = self.model == other.model and _kind(self.model) != "folder"
            return self.weights == other.weights or named_alike
        return _same_name(self.model, other.model)

    def check(self, model: nn.Module, *, check_model: bool = True) -> nn.Module:
        """The block that this hookpoint names; another model (by `check_model`), layer or width is an `InputError`."""
        name = getattr(getattr(language_model(model), "config", None), "_name_or_path", "")
        if check_model and not _same_name(self.model, name) and not self.weights:
            raise self._refusal(repr(name))  # before a layer or width that can only be wrong
        block = select_blocks(model, [self.layer])[self.layer]
        width = width_of(model, block, self.side)
        if width != self.width:
            what = "MLP" if self.side == "mlp" else "hidden size"
            raise InputError(f"this hookpoint has width {self.width}, but the model's {what} is {width}")
        if check_model and self.weights and not self._same_model(Hookpoint.of(model, self.layer, self.side)):
            raise self._refusal("other weights of the same name" if name == self.model else repr(name))
        return block

    def _refusal(self, found: str) -> InputError:
        return InputError(
            f"this hookpoint belongs to model {self.model!r}, not {found} (check_model=False allows it on purpose)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values."""
        return config.to_dict(self)

    def place(self) -> dict[str, Any]:
        """`to_dict` without the digest of the weights, which older files lack."""
        return {key: value for key, value in self.to_dict().items() if key != "weights"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Hookpoint:
        """The inverse of `to_dict`; an unknown key is an `InputError`."""
        return config.from_dict(cls, values)


def check_recorded(layers: Iterable[int], recorded: Iterable[int]) -> None:
    """Raise `InputError` for the first of `layers` that is not among those `recorded`."""
    recorded = list(recorded)
    if wrong := [layer for layer in layers if layer not in recorded]:
        raise unknown("layer", wrong[0], recorded)


def at_layers(hookpoints: Sequence[Hookpoint], layers: Iterable[int] | None = None) -> list[Hookpoint]:
    """The hookpoints of `layers`, in that order; all of them by default."""
    by_layer = {hookpoint.layer: hookpoint for hookpoint in hookpoints}
    layers = list(by_layer if layers is None else layers)
    check_recorded(layers, by_layer)
    return [by_layer[layer] for layer in layers]


def at_layer(hookpoints: Sequence[Hookpoint], layer: int | None, owner: object) -> Hookpoint:
    """The hookpoint of `layer`, which may be None where `owner`, named in the error, has only one."""
    chosen = at_layers(hookpoints, None if layer is None else [layer])
    if len(chosen) != 1:
        raise InputError(f"{owner} has layers {[h.layer for h in chosen]}: choose one with --layer")
    return chosen[0]


def same_places(some: Sequence[Hookpoint], others: Sequence[Hookpoint]) -> bool:
    """Whether two lists of hookpoints are the same places, in order."""
    return len(some) == len(others) and all(map(Hookpoint.same_place, some, others))


def _digest_of(block: nn.Module) -> str | None:
    """SHA-256 of how often each bfloat16 value occurs, whatever precision, order and split; None where not readable."""
    counts = torch.zeros(2**16, dtype=torch.int64)
    for p in block.parameters():
        if (
            p.dtype not in (torch.float64, torch.float32, torch.bfloat16) or p.is_meta or hasattr(p, "placements")
        ):  # a `DTensor`'s
            return None
        for part in p.detach().flatten().split(CHUNK):
            bits = part.bfloat16().view(torch.int16).int() + 2**15
            counts += torch.bincount(bits, minlength=2**16).cpu()
    return hashlib.sha256(counts.numpy().tobytes()).hexdigest()[:32]


def _same_name(name: str, other: str) -> bool:
    """Whether two names mean one model, as far as they tell; an empty one is unknown."""
    name, other = _spelled_alike(name), _spelled_alike(other)
    if not name or not other or name == other:
        return True
    # Two folders, or two ids, have to be equal; an id, a folder and a bare `gpt2` only have to end alike.
    return _kind(name) != _kind(other) and name.rpartition("/")[2] == other.rpartition("/")[2]


def _kind(name: str) -> Literal["bare name", "id", "folder"]:
    if not _ID.fullmatch(name) or Path(name).is_dir():
        return "folder"
    return "id" if "/" in name else "bare name"


def _spelled_alike(name: str) -> str:
    """Without what may differ in spelling; a snapshot in the Hub's cache is its id."""
    name = name.replace("\\", "/").rstrip("/")
    cached = _SNAPSHOT.search(name)
    return f"{cached[1]}/{cached[2]}" if cached else name
