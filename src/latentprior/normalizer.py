"""Standardisation: raw activations to mean 0 and variance 1 in each dimension, and back, for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentprior.activations import SINK_FACTOR
from latentprior.errors import InputError, unknown
from latentprior.moments import Moments


class Normalizer(nn.Module):
    """Per-dimension standardisation with the statistics of the training data (paper, section on training).

    Raw activations are called ``x``, standardised ones ``z``. A dimension without variance maps to 0 and back to
    its mean, never to infinity. The statistics are float32 buffers, one row for each layer.

    Args:
        mean: per-layer means.
        var: per-layer variances.
        layers: the language model's layers that the rows belong to, in order.
        mean_norm: mean norm of an activation, the unit of steering strength; nan where unknown.
        median_norm: median norm, against which attention sinks are told; nan where unknown.
    """

    mean: Tensor
    var: Tensor
    layers: Tensor
    mean_norm: Tensor
    median_norm: Tensor
    scale: Tensor
    divisor: Tensor
    row_of_layer: Tensor

    def __init__(
        self,
        mean: Float[Tensor, "layers d"],
        var: Float[Tensor, "layers d"],
        layers: Sequence[int],
        *,
        mean_norm: Float[Tensor, " layers"] | None = None,
        median_norm: Float[Tensor, " layers"] | None = None,
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers) or min(layers) < 0:
            raise InputError(f"layers of statistics must be different and count from 0, got {list(layers)}")
        if len(layers) != mean.shape[0] or mean.shape != var.shape:
            raise InputError(
                f"statistics of shape {tuple(mean.shape)} and {tuple(var.shape)} do not fit layers {list(layers)}"
            )
        if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
            raise InputError("statistics must be finite, with no negative variance")
        missing = torch.full((len(layers),), float("nan"))
        lookup = torch.full((max(layers) + 1,), -1, dtype=torch.int64)
        lookup[list(layers)] = torch.arange(len(layers))
        self.register_buffer("mean", mean.float())
        self.register_buffer("var", var.float())
        self.register_buffer("layers", torch.tensor(layers, dtype=torch.int64))
        self.register_buffer("mean_norm", missing.clone() if mean_norm is None else mean_norm.float())
        self.register_buffer("median_norm", missing.clone() if median_norm is None else median_norm.float())
        self.register_buffer("scale", self.var.sqrt(), persistent=False)
        self.register_buffer("divisor", torch.where(self.scale > 0, self.scale, torch.inf), persistent=False)
        self.register_buffer("row_of_layer", lookup, persistent=False)

    @classmethod
    def from_moments(cls, moments: Moments) -> Normalizer:
        """The normalizer of streamed moments."""
        return cls(
            moments.mean,
            moments.variance(),
            moments.layers,
            mean_norm=moments.mean_norm(),
            median_norm=moments.median_norm,
        )

    @property
    def width(self) -> int:
        return self.mean.shape[1]

    def normalize(self, x: Float[Tensor, "*n d"], layer: Int[Tensor, ...] | int | None = None) -> Tensor:
        """Raw to standardised activations, float32 or wider: ``[..., d] -> [..., d]``.

        Raises:
            InputError: another width, a layer without statistics, or several layers and none named.
        """
        self.check_width(x)
        row = self.rows(layer)
        return (_wide(x) - self.mean[row]) / self.divisor[row]

    def denormalize(self, z: Float[Tensor, "*n d"], layer: Int[Tensor, ...] | int | None = None) -> Tensor:
        """Standardised to raw activations: ``[..., d] -> [..., d]``. Raises as `normalize`."""
        self.check_width(z)
        row = self.rows(layer)
        return _wide(z) * self.scale[row] + self.mean[row]

    def sinks(self, x: Float[Tensor, "*n d"], layer: Int[Tensor, ...] | int | None = None) -> Tensor:
        """Which activations are attention sinks: ``[..., d] -> bool [...]``; none where the median is unknown."""
        self.check_width(x)
        limit = SINK_FACTOR * self.median_norm[self.rows(layer)]
        return _wide(x).norm(dim=-1) > limit  # false against nan

    def rows(self, layer: Int[Tensor, ...] | int | None) -> Tensor | int:
        """The statistics' row of each layer."""
        if layer is None:
            if len(self.layers) > 1:
                raise InputError(f"this prior serves layers {self.layers.tolist()}: say which with `layer`")
            return 0
        layer = torch.as_tensor(layer, device=self.layers.device)
        inside = (layer >= 0) & (layer < len(self.row_of_layer))
        row = self.row_of_layer[layer.clamp(0, len(self.row_of_layer) - 1)]
        wrong = ~inside | (row < 0)
        if wrong.any():
            raise unknown("layer", int(layer[wrong].flatten()[0]), self.layers.tolist())
        return row

    def check_width(self, x: Tensor) -> None:
        """Raise `InputError` unless the activations [..., d] have this width."""
        if x.shape[-1] != self.width:
            raise InputError(f"activations have width {x.shape[-1]}, this prior was trained on width {self.width}")


def _wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 cannot hold a difference of large activations."""
    return x if x.dtype == torch.float64 else x.float()
