"""A uniform sample of documents: examples at quantiles of their peaks, and correlations between units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from latentprior.neurons.statistics import UnitStatistics
from latentprior.neurons.stream import DocumentBatch, UnitReader

_ROWS = 4096  # tokens that pass through the prior together
_TILE = 2048  # units whose correlations with as many others are held together


class Reservoir:
    """`size` documents drawn uniformly without replacement from a stream, with their activations.

    Which ones depends on the seed and the documents' numbers alone, not on their order or batches. Their units are
    computed once, in the end: only activations are held while documents stream by.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._kept: list[tuple[int, DocumentBatch]] = []

    def update(self, batch: DocumentBatch) -> None:
        """Take note of further documents."""
        keys = random_keys(batch.doc.numpy(), self._seed)
        limit = self._kept[-1][0] if len(self._kept) == self._size else 2**64
        for i in keys.argsort()[: self._size].tolist():
            if int(keys[i]) < limit:
                self._kept.append((int(keys[i]), batch.document(i)))
        self._kept = sorted(self._kept, key=lambda item: item[0])[: self._size]

    def documents(self) -> DocumentBatch:
        """The sample, in order of the documents' numbers."""
        return DocumentBatch.cat(sorted((part for _, part in self._kept), key=lambda part: int(part.doc[0])))


def random_keys(doc: np.ndarray, seed: int) -> np.ndarray:
    """A random 64-bit number for each document, a function of its number and the seed (SplitMix64's mixing)."""
    start = np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0]
    z = start + (doc.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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


def at_quantiles(
    units: BFloat16[Tensor, "n m"], sample: DocumentBatch, quantiles: Sequence[float]
) -> tuple[Float[Tensor, "m q"], Int64[Tensor, "m q"], BFloat16[Tensor, "m q T"]]:
    """For each unit, the documents at quantiles of its largest magnitude in a document.

    Returns:
        the activation of largest magnitude, with its sign; document numbers; activations by position, 0 where a token
        does not count. On the CPU.
    """
    filled = sample.filled().to(units.device)
    grid = units[filled.flatten()].reshape(*filled.shape, -1)
    magnitudes = torch.maximum(grid.amax(dim=1), -grid.amin(dim=1))  # [documents, units]
    order = magnitudes.argsort(dim=0, stable=True)
    chosen = order[[round(q * (len(order) - 1)) for q in quantiles]].T  # [units, quantiles]
    row = sample.row.to(units.device)[chosen]
    unit = torch.arange(units.shape[1], device=units.device)[:, None, None]
    values = units[row.clamp(min=0), unit].masked_fill_(row < 0, 0)
    peak = values.abs().argmax(dim=2, keepdim=True)
    value = values.gather(2, peak).squeeze(2).float()
    return value.cpu(), sample.doc[chosen.cpu()], values.cpu()


def nearest_units(
    units: BFloat16[Tensor, "n m"], count: int
) -> tuple[Int64[Tensor, "m count"], Float[Tensor, "m count"]]:
    """The units with the largest absolute Pearson correlation over the sample's tokens, itself excluded.

    A unit that does not vary correlates with none: correlation 0. Memory: the standardised units in bfloat16 and two
    tiles in float32; ``2 n m^2`` operations.

    Returns:
        numbers of units and their correlations, strongest first, on the CPU; fewer than `count` if there are fewer.
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
