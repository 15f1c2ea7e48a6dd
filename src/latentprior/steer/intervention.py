"""Editing the activations of a running model along directions: `Edit` says how, `steering` does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.data.sinks import sinks_in
from latentprior.lm.edits import (
    EditCounts,
    EditedPositions,
    EditFunction,
    Positions,
    check_positions,
    edit_positions,
    for_batch,
)
from latentprior.steer.direction import Direction
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.reprs import ShortRepr

EditKind = Literal["add", "clamp", "ablate", "rotate"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)


@dataclass(frozen=True, eq=False, repr=False)
class Edit(ShortRepr):
    """A change of activations a [d] along a unit direction w, of strength r in units of the mean norm m.

    - "add": ``a + r m w`` (paper, on-manifold steering).
    - "clamp": the component along w becomes ``r m``, the rest stays.
    - "ablate": the component along w becomes 0; the strength must be 0.
    - "rotate": a turns towards w by the angle ``atan(r)``, in the plane of both, and keeps its norm; a negative
      strength turns it away. It stops at w or -w. One that lies along w stays as it is, as no plane is given.

    A strength is one number, or [B] with one for each row of the batch; beams and returned sequences take their row's.
    """

    direction: Direction
    strength: float | Tensor = 0.0
    kind: EditKind = "add"

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            how = 'make one with Direction.of(vector, Hookpoint.of(model, layer), "a name", "file")'
            raise InputError(f"an edit goes along a Direction, got {type(self.direction).__name__}: {how}")
        if self.kind not in EDIT_KINDS:
            raise unknown("kind of edit", self.kind, EDIT_KINDS)
        strength = torch.as_tensor(self.strength)
        if strength.ndim > 1 or not strength.numel() or strength.is_complex() or strength.dtype == torch.bool:
            shape = list(strength.shape)
            raise InputError(f"a strength is a number or one for each row [B], got {strength.dtype} {shape}")
        if not strength.isfinite().all():
            raise InputError(f"the strength along {self.direction.name!r} is infinite or NaN")
        if self.kind == "ablate" and strength.any():
            raise InputError("an ablation has no strength: leave it at 0, or use 'clamp' to set the component")


@runtime_checkable
class Repair(Protocol):
    """Brings edited activations back to where activations live."""

    def __call__(
        self, clean: Float[Tensor, "n d"], edited: Float[Tensor, "n d"], at: EditedPositions, push: Tensor, /
    ) -> Float[Tensor, "n d"]:
        """The activations [N, d] to go on with, raw like `clean` and `edited`; `push` is ``edited - clean``."""
        ...


@contextmanager
def steering(
    model: nn.Module,
    edits: Edit | Sequence[Edit],
    *,
    mean_norm: float | Mapping[int, float] | None = None,
    positions: Positions = "all",
    repair: Repair | None = None,
    check_model: bool = True,
) -> Iterator[EditCounts]:
    """Steer `model` while the context is open, also under ``generate()``.

    Works with and without a key-value cache, static ones too, with padding on either side, beams, sampling and
    streaming. The first position, padding and attention sinks (a norm over 10 times the mean) are never touched. Rows
    without an edit, and edits of strength 0 without repair, leave the model's text as it is, bit for bit.

    Args:
        edits: those of one hookpoint apply in the given order, those of several layers in the model's order.
        mean_norm: the mean norm of an activation, the unit of strength; one number, or one for each edited layer. By
            default that of the layer's directions (`Direction.mean_norm`), the first that knows it.
        positions: see `latentprior.lm.edits.Positions`.
        repair: called once for each edited layer and forward pass, after all edits of the layer, with the activations
            at the edited positions; also with those of strength 0. One that is a context manager is open meanwhile.
        check_model: refuse directions of a model of another name. Layer and width are always checked.

    Yields:
        counts of what was done so far: positions ``seen``, ``edited`` (on leaving, none is an error) and
        ``passed_over``, by reason.

    Examples:
        >>> with lp.steering(model, lp.Edit(direction, 0.8), mean_norm=5.0) as counts:
        ...     ids = model.generate(**tokenizer("The weather", return_tensors="pt"), max_new_tokens=3)
        >>> counts.edited > 0
        True
    """
    check_positions(positions)
    by_place: dict[tuple[Side, int], list[Edit]] = {}
    for edit in edits if isinstance(edits, Sequence) else [edits]:
        if not isinstance(edit, Edit):
            raise InputError(f"steering takes edits, got {type(edit).__name__}: use Edit(direction, strength)")
        edit.direction.check(model, check_model=check_model)
        by_place.setdefault((edit.direction.hookpoint.side, edit.direction.hookpoint.layer), []).append(edit)
    units = {layer: _unit(mean_norm, layer, here) for (_, layer), here in by_place.items()}
    by_side: dict[Side, dict[int, EditFunction]] = {}
    for (side, layer), here in by_place.items():
        by_side.setdefault(side, {})[layer] = _edits_then_repair([_prepared(e, units[layer]) for e in here], repair)

    def sinks(hidden: Tensor, layer: int) -> Tensor:
        return sinks_in(hidden, units[layer])

    with ExitStack() as stack:
        if isinstance(repair, AbstractContextManager):
            stack.enter_context(repair)
        counts = [
            stack.enter_context(edit_positions(model, of_layers, positions=positions, side=side, sinks=sinks))
            for side, of_layers in by_side.items()
        ]
        yield EditCounts(counts)


def _unit(mean_norm: float | Mapping[int, float] | None, layer: int, edits: Sequence[Edit]) -> float:
    if mean_norm is None:
        mean_norm = next((norm for edit in edits if (norm := edit.direction.mean_norm) is not None), None)
        if mean_norm is None:
            raise InputError(f"no direction at layer {layer} knows its mean norm, the unit of strength: give mean_norm")
    if isinstance(mean_norm, Mapping):
        if layer not in mean_norm:
            raise unknown("layer of mean_norm", layer, mean_norm)
        mean_norm = mean_norm[layer]
    if not 0 < mean_norm < math.inf:  # also NaN
        raise InputError(f"mean_norm of layer {layer} must be positive and finite, got {mean_norm}")
    return float(mean_norm)


def _prepared(edit: Edit, unit: float) -> EditFunction:
    vector, strengths = edit.direction.vector, torch.as_tensor(edit.strength, dtype=torch.float64).reshape(-1)

    def apply(x: Tensor, at: EditedPositions) -> Tensor:
        nonlocal vector, strengths
        vector, strengths = vector.to(x), strengths.to(x)  # they move once: the layer stays where it is
        strength = for_batch(strengths, at.batch, f"the strength along {edit.direction.name!r}")[at.row, None]
        edited = _APPLY[edit.kind](x, vector, strength, unit)
        # Rows with nothing to do come back bit for bit.
        return torch.where(strength == 0, x, edited) if edit.kind in ("add", "rotate") else edited

    return apply


def _edits_then_repair(edits: Sequence[EditFunction], repair: Repair | None) -> EditFunction:
    def apply(x: Tensor, at: EditedPositions) -> Tensor:
        clean = x if x.dtype == torch.float64 else x.float()
        edited = clean
        for edit in edits:
            edited = edit(edited, at)
        if repair is None:
            return edited.to(x.dtype)
        result = repair(clean, edited, at, edited - clean)
        if result.shape != edited.shape:
            raise InputError(f"a repair must return activations {list(edited.shape)}, got {list(result.shape)}")
        return result.to(x)

    return apply


def _component(x: Tensor, w: Tensor) -> Tensor:
    """[N, 1], how far x goes along w. Not a matrix product, which autocast would round to bfloat16."""
    return (x * w).sum(dim=-1, keepdim=True)


def _add(x: Tensor, w: Tensor, strength: Tensor, unit: float) -> Tensor:
    return x + strength * unit * w


def _clamp(x: Tensor, w: Tensor, strength: Tensor, unit: float) -> Tensor:
    return x + (strength * unit - _component(x, w)) * w


def _rotate(x: Tensor, w: Tensor, strength: Tensor, unit: float) -> Tensor:
    along = _component(x, w)
    across = x - along * w
    height = across.norm(dim=-1, keepdim=True)
    angle = (torch.atan2(height, along) - strength.atan()).clamp(0, math.pi)  # 0 is along w
    turned = x.norm(dim=-1, keepdim=True) * (angle.cos() * w + angle.sin() * F.normalize(across, dim=-1))
    return torch.where(height > 0, turned, x)


_APPLY: dict[EditKind, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "add": _add,
    "clamp": _clamp,
    "ablate": _clamp,  # at strength 0
    "rotate": _rotate,
}
