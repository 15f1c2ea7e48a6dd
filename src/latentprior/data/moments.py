"""Streamed moments of raw activations, per layer and in float64: added batch by batch, merged across ranks.

Batches are combined by the pairwise update of Chan, Golub and LeVeque (1979), each batch summarised in two passes, so
that neither a large mean nor many batches cost precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.lm.hooks import check_recorded
from latentprior.utils.errors import InputError

_TENSORS = ("count", "mean", "m2", "norm_sum", "median_norm")
_CHUNK_ROWS = 8192  # bounds the float64 copy of what is added


class _PerLayer:
    """What `Moments` and `Covariance` share: rows are told apart by layer and added one layer at a time."""

    def __init__(self, layers: Sequence[int], width: int) -> None:
        self.layers = tuple(int(layer) for layer in layers)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise InputError(f"moments need distinct layers, got {list(self.layers)}")
        self.count = torch.zeros(len(self.layers), dtype=torch.float64)
        self.mean = torch.zeros(len(self.layers), width, dtype=torch.float64)

    @property
    def width(self) -> int:
        return self.mean.shape[1]

    def update(self, x: Tensor, layer: Tensor | None = None) -> None:
        """Add rows x [N, d], any floating dtype and device, with their layers [N]; None if there is one layer only."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InputError(f"moments expect rows of width {self.width}, got shape {list(x.shape)}")
        if layer is None and len(self.layers) > 1:
            raise InputError(f"moments of layers {list(self.layers)} need the layer of each row")
        if layer is not None and layer.shape != x.shape[:1]:
            raise InputError(f"{len(x)} rows need {len(x)} layer numbers, got shape {list(layer.shape)}")
        present = self.layers if layer is None else layer.unique().tolist()
        check_recorded(present, self.layers)
        for number in present:
            rows = x if layer is None else x[(layer == number).to(x.device)]
            for chunk in rows.split(_CHUNK_ROWS):
                if len(chunk):
                    self._add(self.layers.index(number), chunk.cpu().double())

    def _add(self, slot: int, rows: Tensor) -> None:
        raise NotImplementedError

    def _combine_means(self, slots: slice, count: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts before, the share of what is added, [l], and the difference of the means [l, d]."""
        before = self.count[slots].clone()
        share = count / (before + count).clamp(min=1)
        delta = mean - self.mean[slots]
        self.mean[slots] += delta * share[:, None]
        self.count[slots] += count
        return before, share, delta

    def _check_same(self, other: _PerLayer) -> None:
        if (self.layers, self.width) != (other.layers, other.width):
            raise InputError(
                f"cannot merge moments of layers {list(other.layers)}, width {other.width} "
                f"into layers {list(self.layers)}, width {self.width}"
            )


class Moments(_PerLayer):
    """Count, mean, sum of squared deviations and norms of the activations of each layer, all float64 on the CPU.

    Attributes:
        layers: numbers of the LLM's blocks, in the order of the leading dimension below.
        count, mean: [L] rows seen, [L, d].
        m2: [L, d], sum of squared deviations from the mean.
        norm_sum: [L], sum of the rows' Euclidean norms.
        median_norm: [L]; nan until set, as a median cannot be added up.
    """

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__(layers, width)
        self.m2 = torch.zeros_like(self.mean)
        self.norm_sum = torch.zeros_like(self.count)
        self.median_norm = torch.full_like(self.count, torch.nan)

    def _add(self, slot: int, rows: Tensor) -> None:
        mean = rows.mean(0)
        deviation = rows - mean
        # The second term takes out the rounding error of the mean, which a large offset would blow up.
        m2 = deviation.square().sum(0) - deviation.sum(0).square() / len(rows)
        norm_sum = torch.linalg.vector_norm(rows, dim=1).sum()
        one = slice(slot, slot + 1)
        self._combine(one, self.count.new_tensor([len(rows)]), mean[None], m2[None], norm_sum[None])

    def _combine(self, slots: slice, count: Tensor, mean: Tensor, m2: Tensor, norm_sum: Tensor) -> None:
        before, share, delta = self._combine_means(slots, count, mean)
        self.m2[slots] += m2 + delta.square() * share[:, None] * before[:, None]
        self.norm_sum[slots] += norm_sum

    def merge(self, other: Moments) -> Moments:
        """Add everything `other` has seen to these moments, in place; returns self."""
        self._check_same(other)
        # Medians cannot be merged: where both are set, this is their mean weighted by `count`.
        share = other.count / (self.count + other.count).clamp(min=1)
        both = torch.lerp(self.median_norm, other.median_norm, share)
        either = torch.where(self.median_norm.isnan(), other.median_norm, self.median_norm)
        self.median_norm = torch.where(both.isnan(), either, both)
        self._combine(slice(None), other.count, other.mean, other.m2, other.norm_sum)
        return self

    def at(self, layers: Sequence[int]) -> Moments:
        """The moments of some of the layers, in this order."""
        check_recorded(layers, self.layers)
        chosen = Moments(layers, self.width)
        slots = [self.layers.index(layer) for layer in layers]
        for name in _TENSORS:
            setattr(chosen, name, getattr(self, name)[slots])
        return chosen

    def variance(self) -> Tensor:
        """Population variance [L, d]; nan for a layer without rows."""
        return self.m2 / self.count[:, None]

    def mean_norm(self) -> Tensor:
        """Mean Euclidean norm of the rows, [L]: the unit of steering strength; nan for a layer without rows."""
        return self.norm_sum / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, "layers" (int64 [L]) among them: contents for a safetensors file."""
        layers = torch.tensor(self.layers, dtype=torch.int64)
        return {"layers": layers} | {name: getattr(self, name).clone() for name in _TENSORS}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """The moments that `state_dict` was called on."""
        for name in ("layers", *_TENSORS):
            if name not in tensors:
                raise InputError(f"moments lack the tensor {name!r}")
        if tensors["mean"].ndim != 2:
            raise InputError(f"moments need a mean of shape [L, d], got {list(tensors['mean'].shape)}")
        moments = cls(tensors["layers"].tolist(), tensors["mean"].shape[1])
        for name in _TENSORS:
            value, expected = tensors[name], getattr(moments, name)
            if value.shape != expected.shape or value.dtype != torch.float64:
                raise InputError(
                    f"moments need {name!r} as float64 {list(expected.shape)}, got {value.dtype} {list(value.shape)}"
                )
            setattr(moments, name, value.clone())
        return moments


class Covariance(_PerLayer):
    """Covariance of the activations of each layer, float64 on the CPU: `Moments` for pairs of dimensions.

    `comoment` [L, d, d] is the sum of products of deviations from the mean.
    """

    def __init__(self, layers: Sequence[int], width: int) -> None:
        super().__init__(layers, width)
        self.comoment = torch.zeros(len(self.layers), width, width, dtype=torch.float64)

    def _add(self, slot: int, rows: Tensor) -> None:
        mean = rows.mean(0)
        deviation = rows - mean
        self._combine(slot, self.count.new_tensor([len(rows)]), mean[None], deviation.T @ deviation)

    def _combine(self, slot: int, count: Tensor, mean: Tensor, comoment: Tensor) -> None:
        before, share, delta = self._combine_means(slice(slot, slot + 1), count, mean)
        self.comoment[slot] += comoment + torch.outer(delta[0], delta[0]) * (share * before)

    def merge(self, other: Covariance) -> Covariance:
        """Add everything `other` has seen, in place; returns self."""
        self._check_same(other)
        for slot in range(len(self.layers)):
            self._combine(slot, other.count[[slot]], other.mean[[slot]], other.comoment[slot])
        return self

    def covariance(self) -> Tensor:
        """Population covariance [L, d, d]; nan for a layer without rows."""
        return self.comoment / self.count[:, None, None]


def ordered_directions(covariance: Float[Tensor, "layers d d"]) -> tuple[Tensor, Tensor]:
    """Variances [L, d], descending and none below 0, and the principal directions that have them, as columns [L, d, d].

    The largest entry of each direction is positive.
    """
    variance, directions = torch.linalg.eigh(covariance.double())
    variance, directions = variance.flip(-1).clamp(min=0), directions.flip(-1)
    largest = directions.gather(-2, directions.abs().argmax(dim=-2, keepdim=True))
    return variance, directions * largest.sign()
