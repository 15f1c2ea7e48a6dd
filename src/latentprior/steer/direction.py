"""A direction along which to steer: a unit vector, where it belongs, and how it was made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

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
    """A unit vector of activation space. `Direction.of` makes one from a vector of any length."""

    vector: Tensor
    """[d] float32, of norm 1, on the CPU."""
    hookpoint: Hookpoint
    """The side of the block of the model whose activations it belongs to."""
    name: str
    """Shown to people, such as "sentiment (SST-2)"."""
    kind: str
    """How it was made, one of `KINDS`."""
    norm: float = 1.0
    """Its norm before it was scaled to 1, in raw activation units; 1 where it had none."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made, as JSON-ready values: data, counts, seed, options."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of direction", self.kind, KINDS)
        _check_shape(self.vector, self.hookpoint)
        if self.vector.dtype != torch.float32:
            raise InputError(f"a direction is a float32 vector, got {self.vector.dtype}: use Direction.of")
        length = float(self.vector.double().norm())
        if not abs(length - 1) < 1e-3:  # also NaN
            raise InputError(f"a direction has norm 1, got {length:.4g}: use Direction.of")
        if not 0 < self.norm < math.inf:
            raise InputError(f"the norm of a direction must be positive and finite, got {self.norm}")
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"the provenance of a direction must be JSON-ready: {error}") from error

    def __repr__(self) -> str:
        return f"Direction({self.name!r}, {self.kind}, {self.hookpoint}, norm {self.norm:.4g})"

    @classmethod
    def of(cls, vector: Tensor, hookpoint: Hookpoint, name: str, kind: str, **provenance: Any) -> Direction:
        """The direction of `vector` [d], of any length and precision; its length is kept as `norm`.

        Raises:
            InputError: a vector that is zero, not finite, or not as wide as the hookpoint; an unknown kind; a
                provenance that JSON cannot hold.
        """
        _check_shape(vector, hookpoint)
        exact = vector.detach().to("cpu", torch.float64)
        if not exact.isfinite().all():
            raise InputError(f"the direction {name!r} has entries that are infinite or NaN")
        norm = float(exact.norm())
        if norm == 0:
            raise InputError(f"the direction {name!r} is zero")
        return cls((exact / norm).float(), hookpoint, name, kind, norm, provenance)

    def check(self, model: nn.Module, *, check_model: bool = True) -> None:
        """Refuse a model that this direction was not made for.

        Args:
            check_model: refuse a model of another name; layer and width are always checked.

        Raises:
            InputError: another model, a layer that it does not have, or another width.
        """
        self.hookpoint.check(model, check_model=check_model)


def _check_shape(vector: Tensor, hookpoint: Hookpoint) -> None:
    if vector.shape != (hookpoint.width,):
        raise InputError(
            f"a direction at layer {hookpoint.layer} of {hookpoint.model or 'this model'} has shape "
            f"[{hookpoint.width}], got {list(vector.shape)}"
        )


def write_direction(direction: Direction, path: str | Path) -> Path:
    """Write `direction` as one safetensors file, whole or not at all; missing folders are made.

    Its tensor is "direction" [d]; everything else is JSON in the metadata.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    values = {
        "format": FORMAT,
        "name": direction.name,
        "kind": direction.kind,
        "norm": direction.norm,
        "hookpoint": direction.hookpoint.to_dict(),
        "provenance": direction.provenance,
    }
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
    """The direction in a file of `write_direction`. Nothing in the file is executed.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
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
        return Direction(
            vector,
            Hookpoint.from_dict(values["hookpoint"]),
            str(values["name"]),
            str(values["kind"]),
            float(values["norm"]),
            dict(values["provenance"]),
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no valid direction: {error}") from error
