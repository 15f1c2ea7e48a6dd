"""How strongly units fire: moments, extremes and histograms of all tokens, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from latentprior.utils.errors import InputError

BINS = 40
SPAN = 5.0  # standard deviations to either side of the mean that the histogram covers
THRESHOLDS = (1.0, 2.0, 4.0)
_ROWS = 256  # activations that are summed in float32 together: they stay in a CPU's cache


class UnitStatistics:
    """Moments, extremes and histogram of M units over a stream of tokens; memory 8 (BINS + 6) M bytes.

    A first look at some tokens (`calibrated`) gives each unit a centre and a scale, about its mean and standard
    deviation. Powers are summed of standardised values, in float64, which is stable; the histogram has 40 bins of a
    quarter scale around the centre, the first and the last with all that lies beyond. The thresholds are edges of
    bins, so `share_above` is exact for the calibrated mean and deviation and needs no pass of its own.
    """

    def __init__(self, centre: Float[Tensor, " M"], scale: Float[Tensor, " M"]) -> None:
        if not (scale > 0).all():
            raise InputError("the scale of every unit must be positive")
        self.centre, self.scale = centre.float(), scale.float()
        units, device = len(centre), centre.device
        self.count = 0
        self.powers = torch.zeros(4, units, dtype=torch.float64, device=device)  # of standardised values
        self.low = torch.full((units,), torch.inf, device=device)
        self.high = torch.full((units,), -torch.inf, device=device)
        self.histogram = torch.zeros(units, BINS, dtype=torch.int64, device=device)
        self._first_bin = torch.arange(0, units * BINS, BINS, dtype=torch.int32, device=device)

    def update(self, units: Float[Tensor, "n M"]) -> None:
        flat = self.histogram.view(-1)
        for part in units.split(_ROWS):
            values = part.float()
            self.low = torch.minimum(self.low, values.amin(dim=0))
            self.high = torch.maximum(self.high, values.amax(dim=0))
            z = (values - self.centre) / self.scale
            squared = z * z
            for total, power in zip(self.powers, (z, squared, z * squared, squared * squared), strict=True):
                total += power.sum(dim=0)
            bins = (z * (BINS / (2 * SPAN)) + BINS / 2).floor_().clamp_(0, BINS - 1).int() + self._first_bin
            flat += torch.bincount(bins.view(-1), minlength=len(flat))
        self.count += len(units)

    def mean(self) -> Float64[Tensor, " M"]:
        return self.centre + self.scale * self._raw()[0]

    def variance(self) -> Float64[Tensor, " M"]:
        first, second, _, _ = self._raw()
        return self.scale.double().square() * (second - first.square()).clamp(min=0)

    def kurtosis(self) -> Float64[Tensor, " M"]:
        """Excess kurtosis: 0 for a normal distribution, and for a unit that does not vary."""
        m1, m2, m3, m4 = self._raw()
        variance = (m2 - m1.square()).clamp(min=0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1.pow(4)
        return torch.where(variance > 1e-12, fourth / variance.square().clamp(min=1e-24) - 3, 0.0)

    def share_above(self, thresholds: Sequence[float] = THRESHOLDS) -> Float64[Tensor, "M thresholds"]:
        """Share of tokens with ``|a - centre|`` above each threshold, in scales; multiples of a quarter below 5."""
        shares = []
        for threshold in thresholds:
            edge = threshold * BINS / (2 * SPAN)
            if edge != int(edge) or not 0 <= threshold < SPAN:
                raise InputError(f"thresholds must be edges of the histogram's bins, got {threshold}")
            inside = self.histogram[:, BINS // 2 - int(edge) : BINS // 2 + int(edge)].sum(dim=1)
            shares.append(1 - inside.double() / max(self.count, 1))
        return torch.stack(shares, dim=1)

    def bounds(self) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """The lower edge of the first bin and the upper edge of the last one."""
        return self.centre - SPAN * self.scale, self.centre + SPAN * self.scale

    def _raw(self) -> Float64[Tensor, "4 M"]:
        return self.powers / max(self.count, 1)


class Calibration:
    """Mean and standard deviation of units over a first few tokens, by float64 sums."""

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        self._count = 0
        self._sums: Float64[Tensor, "2 M"] = torch.zeros(2, units, dtype=torch.float64, device=device)

    def update(self, units: Float[Tensor, "n M"]) -> None:
        self._count += len(units)
        for part in units.split(_ROWS):
            values = part.double()
            self._sums += torch.stack([values.sum(dim=0), values.square().sum(dim=0)])

    def statistics(self) -> UnitStatistics:
        """Empty statistics with this centre and scale; a unit that has not varied has the scale 1."""
        mean, second = self._sums / max(self._count, 1)
        variance = second - mean.square()
        varied = variance > 1e-12 * second
        return UnitStatistics(mean.float(), torch.where(varied, variance.clamp(min=0).sqrt(), 1.0).float())
