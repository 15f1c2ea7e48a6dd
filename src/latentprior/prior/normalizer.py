"""Standardisation to mean 0 and variance 1, and back: of each dimension, or along principal directions (whitened)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentprior.data.moments import Moments, ordered_directions
from latentprior.data.sinks import sink_threshold
from latentprior.lm.hooks import check_recorded
from latentprior.utils.devices import to_device
from latentprior.utils.errors import InputError

LEAST_VARIANCE = 1e-6  # of the largest one: rounding to bfloat16 alone makes about this much


class Normalizer(nn.Module):
    """Standardisation with the statistics of the training data, per dimension (paper, section on training).

    Raw activations are called ``x``, standardised ones ``z``. A dimension without variance maps to 0 and back to its
    mean, never to infinity. The statistics are buffers that stay float32 whatever the module is cast to; `mean_norm`,
    the unit of steering strength, and `median_norm`, a tenth of what makes an attention sink, may be nan.

    With a `basis` the activations are whitened instead: ``z = S^-1 U^T (x - mean)`` and ``x = mean + U S z``, where the
    columns of the basis ``U S`` are the principal directions, each as long as the standard deviation along it.
    """

    basis: Tensor | None

    def __init__(
        self,
        mean: Float[Tensor, "layers d"],
        var: Float[Tensor, "layers d"],
        layers: Sequence[int],
        *,
        mean_norm: Float[Tensor, " layers"] | None = None,
        median_norm: Float[Tensor, " layers"] | None = None,
        basis: Float[Tensor, "layers d d"] | None = None,
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
        if basis is not None and (basis.shape != (*mean.shape, mean.shape[1]) or not basis.isfinite().all()):
            raise InputError(f"a basis of shape {tuple(basis.shape)} does not whiten statistics {tuple(mean.shape)}")
        missing = torch.full((len(layers),), float("nan"))
        lookup = torch.full((max(layers) + 1,), -1, dtype=torch.int64)
        lookup[list(layers)] = torch.arange(len(layers))
        self.mean = nn.Buffer(mean.float())
        self.var = nn.Buffer(var.float())
        self.layers = nn.Buffer(torch.tensor(layers, dtype=torch.int64))
        self.mean_norm = nn.Buffer(missing.clone() if mean_norm is None else mean_norm.float())
        self.median_norm = nn.Buffer(missing.clone() if median_norm is None else median_norm.float())
        self.register_buffer("basis", None if basis is None else basis.float().contiguous())
        scale = self.var.sqrt() if self.basis is None else self.basis.norm(dim=-2)  # of each coordinate of z
        self.scale = nn.Buffer(scale, persistent=False)
        self.divisor = nn.Buffer(torch.where(scale > 0, scale, torch.inf), persistent=False)
        self.row_of_layer = nn.Buffer(lookup, persistent=False)
        self._served, self._row_of_layer = list(layers), lookup.cpu()  # CPU: checked without a wait

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalizer:
        """Called by every move and cast: the statistics move along and keep their precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and (exact := before[name]) is not None and buffer.dtype != exact.dtype:
                self._buffers[name] = exact.to(buffer.device)
        return self

    @classmethod
    def from_moments(cls, moments: Moments, basis: Tensor | None = None) -> Normalizer:
        norms = {"mean_norm": moments.mean_norm(), "median_norm": moments.median_norm}
        return cls(moments.mean, moments.variance(), moments.layers, **norms, basis=basis)

    @classmethod
    def whitened(cls, moments: Moments, covariance: Float[Tensor, "layers d d"]) -> Normalizer:
        """The normalizer that decorrelates: z has mean 0 and covariance 1 over the data.

        Directions of less variance than `LEAST_VARIANCE` times the largest are scaled as if they had that much: noise
        is not amplified, and every activation can be restored. They are in descending order of variance, and the
        largest entry of each is positive. `covariance` is that of the rows of `moments` (`moments.Covariance`).
        """
        if covariance.shape != (*moments.mean.shape, moments.width):
            raise InputError(
                f"a covariance of shape {tuple(covariance.shape)} does not fit moments {tuple(moments.mean.shape)}"
            )
        if not covariance.isfinite().all():
            raise InputError("a covariance to whiten with must be finite, and of at least one row for each layer")
        variance, directions = ordered_directions(covariance)
        scale = variance.clamp(min=LEAST_VARIANCE * variance[:, :1]).sqrt()
        return cls.from_moments(moments, directions * scale[:, None, :])

    @property
    def width(self) -> int:
        return self.mean.shape[1]

    def normalize(self, x: Float[Tensor, "*n d"], layer: Int[Tensor, " ..."] | int | None = None) -> Tensor:
        """Raw to standardised activations, float32 or wider."""
        return self.standardised(x, self.rows(layer))

    def standardised(self, x: Float[Tensor, "*n d"], row: Int[Tensor, " ..."] | int) -> Tensor:
        """`normalize` by row of the statistics (`known_rows`); without a basis the host never waits for a GPU."""
        self.check_width(x)
        at = row if isinstance(row, int) else to_device(row, x.device)
        centred = _wide(x) - self.mean[at]
        if self.basis is None:
            return centred / self.divisor[at]
        # The columns are as long as the deviations, so their products carry each twice.
        return _multiplied(centred, self.basis, row) / self.divisor[at].square()

    def denormalize(self, z: Float[Tensor, "*n d"], layer: Int[Tensor, " ..."] | int | None = None) -> Tensor:
        """Standardised to raw activations."""
        self.check_width(z)
        row = self.rows(layer)
        if self.basis is None:
            return _wide(z) * self.scale[row] + self.mean[row]
        mean = self.mean[row]
        return _multiplied(_wide(z).expand(torch.broadcast_shapes(z.shape, mean.shape)), self.basis.mT, row) + mean

    def covector(self, w: Float[Tensor, "*n d"], layer: Int[Tensor, " ..."] | int | None = None) -> Tensor:
        """`g` such that ``g . z`` is ``w . x`` up to a constant."""
        self.check_width(w)
        row = self.rows(layer)
        return _wide(w) * self.scale[row] if self.basis is None else _multiplied(_wide(w), self.basis, row)

    def sinks(self, x: Float[Tensor, "*n d"], layer: Int[Tensor, " ..."] | int | None = None) -> Tensor:
        """Which activations are attention sinks: ``[..., d] -> bool [...]``; none where the median is unknown."""
        self.check_width(x)
        limit = sink_threshold(self.median_norm[self.rows(layer)])
        return _wide(x).norm(dim=-1) > limit  # false against nan

    def norm_unit(self, layer: int | None = None, *, otherwise: float | None = None) -> float:
        """The mean norm of the layer's activations, the unit of steering strength.

        Official checkpoints do not hold it. Then it is `otherwise`, or without that the root mean square norm
        ``sqrt(sum(mean^2 + var))``, larger by about ``1 + CV^2 / 2`` with CV the norms' coefficient of variation.
        """
        row = self.rows(layer if len(self.layers) > 1 else None)
        known = float(self.mean_norm[row])
        return known if known > 0 else otherwise or float((self.mean[row].square() + self.var[row]).sum().sqrt())

    def rows(self, layer: Int[Tensor, " ..."] | int | None) -> Tensor | int:
        """The statistics' row of each layer."""
        if layer is None:
            if len(self.layers) > 1:
                raise InputError(f"this prior serves layers {self._served}: say which with `layer`")
            return 0
        if isinstance(layer, int):
            check_recorded([layer], self._served)
            return self._served.index(layer)
        return self.known_rows(torch.as_tensor(layer).cpu()).to(self.layers.device)

    def known_rows(self, layer: Int[Tensor, " ..."]) -> Tensor:
        """`rows` on the device of `layer`; layers on a GPU are not checked, as the host would have to wait for it."""
        on_host = layer.device.type == "cpu"
        table = self._row_of_layer if on_host else self.row_of_layer
        inside = (layer >= 0) & (layer < len(table))
        row = torch.where(inside, table[layer.long().clamp(0, len(table) - 1)], -1)
        if on_host:
            check_recorded(layer[row < 0].flatten().tolist(), self._served)
        return row

    def check_width(self, x: Tensor) -> None:
        """Raise `InputError` unless the activations [..., d] have this width and are where the statistics are."""
        if x.shape[-1] != self.width:
            raise InputError(f"activations have width {x.shape[-1]}, this prior was trained on width {self.width}")
        if x.device != self.mean.device:
            raise InputError(f"activations on {x.device}, statistics on {self.mean.device}: move one with .to(device)")


def _wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 cannot hold a difference of large activations."""
    return x if x.dtype == torch.float64 else x.float()


def _multiplied(x: Tensor, matrices: Tensor, row: Tensor | int) -> Tensor:
    """``x @ matrices[row]``, one product for each row of the statistics.

    Never in autocast's precision, which cannot tell small directions from the rounding of large ones.
    """
    with torch.autocast(x.device.type, enabled=False):
        matrices = matrices.to(x.dtype)
        if isinstance(row, int) or row.ndim == 0:
            return x @ matrices[row]
        rows = row.expand(x.shape[:-1]).flatten()
        counts = rows.bincount(minlength=len(matrices)).tolist()
        order = to_device(rows.argsort(), x.device)
        sorted_parts = x.reshape(-1, x.shape[-1])[order].split(counts)
        products = torch.cat([part @ matrix for part, matrix in zip(sorted_parts, matrices, strict=True)])
        return torch.empty_like(products).index_copy(0, order, products).reshape(x.shape)
