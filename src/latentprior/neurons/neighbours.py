"""The units that correlate most with each unit, over the tokens of a sample of documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from latentprior.neurons.document_batches import DocumentBatch
from latentprior.neurons.statistics import UnitStatistics
from latentprior.neurons.unit_reader import UnitReader

_ROWS = 4096  # tokens that pass through the prior together
_TILE = 2048  # units whose correlations with as many others are held together


def sampled_units(
    reader: UnitReader, sample: DocumentBatch, statistics: Sequence[UnitStatistics]
) -> BFloat16[Tensor, "n units"]:
    """All units, numbered block by block, at the sample's tokens, standardised as by each block's statistics.

    Standardised first: of a unit that varies little around a large mean, bfloat16 would keep little.
    """
    result = torch.empty(len(sample), len(reader.blocks) * reader.d_mlp, dtype=torch.bfloat16, device=sample.x.device)
    for start in range(0, len(sample), _ROWS):
        rows = slice(start, start + _ROWS)
        for block, (units, part) in enumerate(zip(reader(sample.x[rows]), statistics, strict=True)):
            columns = slice(block * reader.d_mlp, (block + 1) * reader.d_mlp)
            result[rows, columns] = ((units.float() - part.centre) / part.scale).bfloat16()
    return result


def nearest_units(
    units: BFloat16[Tensor, "n m"], count: int
) -> tuple[Int64[Tensor, "m count"], Float[Tensor, "m count"]]:
    """The units with the largest absolute Pearson correlation over the sample's tokens, itself excluded.

    A unit that does not vary correlates with none: correlation 0. Memory: the standardised units in bfloat16 and two
    tiles in float32; ``2 n m^2`` operations.
    Numbers of units and their correlations come strongest first, on the CPU; fewer than `count` if there are fewer.
    """
    standardised = _standardised(units)
    total, count = units.shape[1], min(count, units.shape[1] - 1)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, total, _TILE):
        mine = standardised[:, start : start + _TILE].float().T
        best = torch.zeros(len(mine), 0, device=units.device)
        which = torch.zeros(len(mine), 0, dtype=torch.long, device=units.device)
        for other in range(0, total, _TILE):
            correlations = mine @ standardised[:, other : other + _TILE].float()
            if other == start:
                correlations.fill_diagonal_(0)
            numbers = torch.arange(other, other + correlations.shape[1], device=units.device).expand_as(correlations)
            # Of equal strength the lower number: `sort` is stable, `topk` is not. Only the tile's best are sorted.
            strongest = correlations.abs().topk(min(count + 1, correlations.shape[1]), dim=1).indices.sort(dim=1).values
            best = torch.cat([best, correlations.gather(1, strongest)], dim=1)
            which = torch.cat([which, numbers.gather(1, strongest)], dim=1)
            own = which == torch.arange(start, start + len(mine), device=units.device)[:, None]
            strength = torch.where(own, -1.0, best.abs())
            order = strength.argsort(dim=1, descending=True, stable=True)[:, : count + 1]
            best, which = best.gather(1, order), which.gather(1, order)
        found.append((which[:, :count], best[:, :count].clamp(-1, 1)))
    return torch.cat([f[0] for f in found]).cpu(), torch.cat([f[1] for f in found]).cpu()


def _standardised(units: BFloat16[Tensor, "n m"]) -> BFloat16[Tensor, "n m"]:
    """Columns of mean 0 and norm 1; 0 for those that do not vary."""
    result = torch.empty_like(units)
    for start in range(0, units.shape[1], _TILE):
        part = units[:, start : start + _TILE].float()
        part = part - part.mean(dim=0)
        norm = part.norm(dim=0)
        result[:, start : start + _TILE] = torch.where(norm > 0, part / norm.clamp(min=1e-30), 0.0)
    return result
