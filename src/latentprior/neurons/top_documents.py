"""The documents in which each unit is most extreme, kept while documents stream by."""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from latentprior.utils.errors import InputError

DOC_BITS = 47
_EMPTY = torch.iinfo(torch.int64).min
_COPIED = 2**16  # activations of this many documents are copied together


class TopDocuments:
    """The k documents with the largest (or smallest) peak of each of M units, with the unit at every token of them.

    Peaks are compared in bfloat16, the first document wins a tie: what is kept depends on the documents alone, not on
    their order or batches. A peak and its document make one int64 key, so that ties cost nothing. Per batch, peaks
    are compared with the smallest one kept; only units that gain a document are looked at further, and of N documents
    a unit gains about ``k ln(N / k)``.

    Memory: ``M k (2 max_length + 8)`` bytes; a gigabyte for both signs of 100,000 units, k = 20 and 128 tokens.

    Args:
        max_length: most tokens of a document.
        sign: +1 for the largest activations, -1 for the smallest.
    """

    def __init__(self, units: int, k: int, max_length: int, *, sign: int, device: torch.device | str = "cpu") -> None:
        self.k, self.sign = k, sign
        self._keys = torch.full((units, k), _EMPTY, device=device)
        self._values = torch.zeros(units, k, max_length, dtype=torch.bfloat16, device=device)
        self._least = torch.full((units,), -torch.inf, dtype=torch.bfloat16, device=device)

    def update(
        self,
        units: BFloat16[Tensor, "n M"],
        peaks: BFloat16[Tensor, "B M"],
        row: Int64[Tensor, "B T"],
        doc: Int64[Tensor, " B"],
    ) -> None:
        """Take note of B further documents, of units at all their tokens and peaks (largest or smallest) in each.

        `row` is the row of `units` of each token of a document, -1 for tokens that do not count.
        """
        signed = peaks * self.sign + 0.0  # no negative zero, which would be another key
        chosen = (signed >= self._least).any(dim=0).nonzero().squeeze(1)
        if not len(chosen):
            return
        kept = self._keys[chosen]
        candidates = _keys_of(signed[:, chosen], doc.to(kept.device)).T
        both = torch.cat([kept, candidates], dim=1)
        stays = torch.zeros_like(both, dtype=torch.bool).scatter_(1, both.topk(self.k, dim=1).indices, True)
        # Unit by unit, as many slots fall free as documents come in.
        free, new = (~stays[:, : self.k]).nonzero(), stays[:, self.k :].nonzero()
        self._keys[chosen[free[:, 0]], free[:, 1]] = candidates[new[:, 0], new[:, 1]]
        for f, n in zip(free.split(_COPIED), new.split(_COPIED), strict=True):
            self._copy(units, row[n[:, 1]], chosen[f[:, 0]], f[:, 1])
        smallest = self._keys[chosen].amin(dim=1)
        self._least[chosen] = torch.where(smallest == _EMPTY, -torch.inf, _peaks_of(smallest))

    def _copy(self, units: Tensor, row: Tensor, unit: Tensor, slot: Tensor) -> None:
        """Put the units' activations at the tokens `row` [P, T] into their slots."""
        values = units[row.clamp(min=0), unit[:, None]].masked_fill_(row < 0, 0)
        padded = torch.zeros(len(values), self._values.shape[2], dtype=values.dtype, device=values.device)
        padded[:, : values.shape[1]] = values
        self._values[unit, slot] = padded

    def best(
        self, start: int, stop: int
    ) -> tuple[Float[Tensor, "m k"], Int64[Tensor, "m k"], BFloat16[Tensor, "m k max_length"]]:
        """Peaks, document numbers and activations by position of units `start` to `stop`, the most extreme first.

        On the CPU. A number is -1 where fewer than k came by, an activation 0 where no token counts.
        """
        keys, order = self._keys[start:stop].sort(dim=1, descending=True)
        doc = torch.where(keys == _EMPTY, -1, (1 << DOC_BITS) - 1 - (keys & ((1 << DOC_BITS) - 1)))
        values = self._values[start:stop].gather(1, order[:, :, None].expand(-1, -1, self._values.shape[2]))
        peaks = _peaks_of(keys).float().masked_fill_(keys == _EMPTY, 0) * self.sign
        return peaks.cpu(), doc.cpu(), values.cpu()


def _keys_of(peaks: BFloat16[Tensor, "B m"], doc: Int64[Tensor, " B"]) -> Int64[Tensor, "B m"]:
    """Numbers in the order of the peaks, and of descending documents where these are equal."""
    if len(doc) and not 0 <= int(doc.min()) <= int(doc.max()) < 1 << DOC_BITS:
        raise InputError(f"numbers of documents must lie in 0..2^{DOC_BITS}, got {int(doc.min())} and {int(doc.max())}")
    bits = peaks.view(torch.int16).long()
    # The bits of floating-point numbers are in their order, save that negative ones are reversed.
    ordered = torch.where(bits < 0, bits ^ 0x7FFF, bits)
    return (ordered << DOC_BITS) | ((1 << DOC_BITS) - 1 - doc)[:, None]


def _peaks_of(keys: Tensor) -> Tensor:
    """The peaks of keys, bfloat16."""
    ordered = keys >> DOC_BITS
    return torch.where(ordered < 0, ordered ^ 0x7FFF, ordered).to(torch.int16).view(torch.bfloat16)
