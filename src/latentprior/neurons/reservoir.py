"""A uniform sample of documents, and examples of units at quantiles of their peaks in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from latentprior.neurons.document_batches import DocumentBatch


class Reservoir:
    """`size` documents drawn uniformly without replacement from a stream, with their activations.

    Which ones depends on the seed and the documents' numbers alone, not on their order or batches. Their units are
    computed once, in the end: only activations are held while documents stream by.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self._size, self._seed = size, seed
        self._kept: list[tuple[int, DocumentBatch]] = []

    def update(self, batch: DocumentBatch) -> None:
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


def at_quantiles(
    units: BFloat16[Tensor, "n m"], sample: DocumentBatch, quantiles: Sequence[float]
) -> tuple[Float[Tensor, "m q"], Int64[Tensor, "m q"], BFloat16[Tensor, "m q T"]]:
    """For each unit, the documents at quantiles of its largest magnitude in a document. On the CPU.

    The activation of largest magnitude; document numbers; activations by position, 0 where a token does not count.
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
