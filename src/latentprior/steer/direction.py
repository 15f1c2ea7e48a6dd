"""`Direction`: a unit vector along which to steer, where it belongs, and how it was made; its file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_bytes

Kind = Literal["difference_of_means", "pca", "probe", "sae", "persona", "random", "shuffled", "file"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMAT = 1
_KEY = "latentprior.direction"  # all metadata under one key: safetensors keeps several in no fixed order
_TENSOR = "direction"


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector of activation space. `from_texts` makes one of texts, `of` of a vector of any length.

    Examples:
        >>> happy = lp.Direction.from_texts(model, tokenizer, ["I love it."], ["I hate it."], layer=1)
        >>> happy.hookpoint.layer, round(float(happy.vector.norm()), 3)
        (1, 1.0)
    """

    vector: Tensor  # [d] float32, of norm 1, on the CPU
    hookpoint: Hookpoint
    name: str  # shown to people, such as "sentiment (SST-2)"
    kind: str  # how it was made, one of `KINDS`
    norm: float = 1.0  # before it was scaled to 1, in raw activation units; 1 where it had none
    provenance: dict[str, Any] = field(default_factory=dict)  # data, counts, seed, options; JSON-ready
    mean_norm: float | None = None  # of the activations that it was made from, the unit of strength

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of direction", self.kind, KINDS)
        _check_shape(self.vector, self.hookpoint)
        if self.vector.dtype != torch.float32:
            raise InputError(f"a direction is a float32 vector, got {self.vector.dtype}: use Direction.of")
        length = float(self.vector.double().norm())
        if not abs(length - 1) < 1e-3:  # also NaN
            raise InputError(f"a direction has norm 1, got {length:.4g}: use Direction.of")
        for name, value in (("norm", self.norm), ("mean norm", 1.0 if self.mean_norm is None else self.mean_norm)):
            if not 0 < value < math.inf:
                raise InputError(f"the {name} of a direction must be positive and finite, got {value}")
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the provenance of a direction must be JSON-ready: {error}") from error

    def __repr__(self) -> str:
        return f"Direction({self.name!r}, {self.kind}, {self.hookpoint}, norm {self.norm:.4g})"

    @classmethod
    def of(
        cls,
        vector: Tensor,
        hookpoint: Hookpoint,
        name: str,
        kind: str,
        *,
        mean_norm: float | None = None,
        **provenance: Any,
    ) -> Direction:
        """The direction of `vector` [d], of any length and precision; its length is kept as `norm`."""
        _check_shape(vector, hookpoint)
        exact = vector.detach().to("cpu", torch.float64)
        if not exact.isfinite().all():
            raise InputError(f"the direction {name!r} has entries that are infinite or NaN")
        norm = float(exact.norm())
        if norm == 0:
            raise InputError(f"the direction {name!r} is zero")
        return cls((exact / norm).float(), hookpoint, name, kind, norm, provenance, mean_norm)

    @classmethod
    def from_texts(
        cls,
        model: Any,
        tokenizer: Any,
        positive: Sequence[str],
        negative: Sequence[str],
        *,
        layer: int = 15,
        side: Side = "output",
        kind: Literal["difference_of_means", "probe"] = "difference_of_means",
        read: Literal["last", "mean"] = "last",
        name: str = "from texts",
        **options: Any,
    ) -> Direction:
        """The direction from `negative` to `positive` texts, of any numbers; it knows its mean norm.

        The first position is never read, nor are attention sinks but where they are a text's last token.

        Args:
            layer: index of the block, whose `side` is read.
            kind: difference of the mean activations, or normal of a logistic probe.
            read: a text's last token, or the mean over its tokens.
            options: see `latentprior.steer.labelled_direction`.
        """
        from latentprior.steer.from_texts import labelled_direction  # which itself makes directions

        if isinstance(positive, str) or isinstance(negative, str):
            raise InputError("positive and negative texts must be lists of strings")
        labels = [1] * len(positive) + [0] * len(negative)
        hookpoint, texts = Hookpoint.of(model, layer, side=side), [*positive, *negative]
        options |= {"kind": kind, "read": read, "name": name}
        return labelled_direction(model, tokenizer, texts, labels, hookpoint, **options)

    def check(self, model: nn.Module, *, check_model: bool = True) -> None:
        """Refuse a model of another name (unless `check_model` is false), without the layer, or of another width."""
        self.hookpoint.check(model, check_model=check_model)


def _check_shape(vector: Tensor, hookpoint: Hookpoint) -> None:
    if vector.shape != (hookpoint.width,):
        place = f"layer {hookpoint.layer} of {hookpoint.model or 'this model'}"
        raise InputError(f"a direction at {place} has shape [{hookpoint.width}], got {list(vector.shape)}")


def write_direction(direction: Direction, path: str | Path) -> Path:
    """Write `direction` as one safetensors file, whole or not at all; all but the vector is JSON in the metadata."""
    path = Path(path)
    values: dict[str, Any] = {"format": FORMAT, "name": direction.name, "kind": direction.kind, "norm": direction.norm}
    values |= {"hookpoint": direction.hookpoint.to_dict(), "provenance": direction.provenance}
    if direction.mean_norm is not None:
        values["mean_norm"] = direction.mean_norm
    content = save({_TENSOR: direction.vector.contiguous()}, metadata={_KEY: json.dumps(values)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def is_direction(path: str | Path) -> bool:
    """Whether a file says that `write_direction` wrote it."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_direction(path: str | Path) -> Direction:
    """The direction in a file of `write_direction`. Nothing in the file is executed."""
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            vector = file.get_tensor(_TENSOR).clone() if text is not None else None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} holds no readable direction: {' '.join(str(error).split())[:300]}") from error
    if text is None or vector is None:
        raise InputError(f"{path} is a safetensors file, but not one of a direction")
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise InputError(f"it has direction format {values['format']}, this version reads {FORMAT}")
        hookpoint, norm = Hookpoint.from_dict(values["hookpoint"]), float(values["norm"])
        name, kind, provenance = str(values["name"]), str(values["kind"]), dict(values["provenance"])
        return Direction(vector, hookpoint, name, kind, norm, provenance, values.get("mean_norm"))
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no valid direction: {error}") from error
