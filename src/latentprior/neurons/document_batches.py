"""Documents through a language model: which of their tokens count, their activations and their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentprior.data.activations import activations
from latentprior.data.sinks import sink_threshold
from latentprior.data.tokens import TokenBatch
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.glp import GLP


@dataclass(frozen=True)
class DocumentBatch:
    """B documents of at most T tokens, n of which count: not a document's first one, no attention sink, finite.

    Attributes:
        doc: `Document.index`.
        ids: token ids of each document, int32, the beginning-of-sequence token included.
        x: raw activations of the tokens that count, document by document.
        row: where in `x` a document's tokens are, by their position; -1 for those that do not count.
    """

    doc: Int64[Tensor, " B"]
    ids: list[np.ndarray]
    x: Float[Tensor, "n d"]
    row: Int64[Tensor, "B T"]

    def __len__(self) -> int:
        return len(self.x)

    def filled(self) -> Int64[Tensor, "B T"]:
        """`row` with the places that do not count filled by another of the document, for extremes over documents."""
        return torch.where(self.row < 0, self.row.amax(dim=1, keepdim=True), self.row)

    @classmethod
    def cat(cls, parts: list[DocumentBatch]) -> DocumentBatch:
        width = max(part.row.shape[1] for part in parts)
        rows, before = [], 0
        for part in parts:
            shifted = torch.where(part.row < 0, -1, part.row + before)
            rows.append(torch.nn.functional.pad(shifted, (0, width - shifted.shape[1]), value=-1))
            before += len(part)
        ids = [ids for part in parts for ids in part.ids]
        return cls(torch.cat([p.doc for p in parts]), ids, torch.cat([p.x for p in parts]), torch.cat(rows))

    def document(self, i: int) -> DocumentBatch:
        """One of the documents, as a batch of its own that does not keep the others in memory."""
        rows = self.row[i][self.row[i] >= 0]
        row = self.row[i : i + 1] - rows[0]
        return DocumentBatch(self.doc[i : i + 1], [self.ids[i]], self.x[rows].clone(), row.clamp(min=-1))


def distinct(batches: Iterable[TokenBatch]) -> Iterator[TokenBatch]:
    """The batches without documents whose tokens, as far as they are kept, came before; eight bytes of each are kept.

    Web text repeats itself: a unit's top documents would be copies of one.
    """
    seen: set[bytes] = set()
    for batch in batches:
        keys = [_digest(ids[mask]) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        new = torch.tensor([key not in seen and key not in keys[:i] for i, key in enumerate(keys)])
        seen.update(keys)
        if new.any():
            yield TokenBatch.whole(batch.ids[new], batch.mask[new], batch.doc[new], batch.position[new], batch.index)


def _digest(ids: Tensor) -> bytes:
    return blake2b(ids.numpy().tobytes(), digest_size=8).digest()


def document_batches(
    model: nn.Module, batches: Iterable[TokenBatch], hookpoint: Hookpoint, glp: GLP, layer: int | None
) -> Iterator[DocumentBatch]:
    """The documents of each batch that have a token that counts, with its activations, on the prior's device.

    Sinks are told by the prior's median norm; where it has none, by the first batch's.
    """
    median = float(glp.normalizer.median_norm[glp.normalizer.rows(layer)])
    limit = sink_threshold(median) if np.isfinite(median) else None
    for batch in batches:
        found = next(activations(model, [batch], [hookpoint.layer], side=hookpoint.side, device=glp.device))
        norms, finite = found.norms(), found.x.isfinite().all(dim=1)
        if limit is None and finite.any():
            limit = sink_threshold(float(norms[finite].median()))
        yield _document_batch(batch, found.x, finite & (norms <= (limit or 0.0)))


def _document_batch(batch: TokenBatch, x: Tensor, counts: Tensor) -> DocumentBatch:
    # The rows of `activations`: all tokens but the first of each document, in this order.
    which, column = (batch.mask & (batch.position > 0)).nonzero(as_tuple=True)
    kept = counts.cpu()
    row = torch.full(batch.ids.shape, -1)
    row[which[kept], batch.position[which, column][kept]] = torch.arange(int(kept.sum()))
    some = (row >= 0).any(dim=1)
    ids, mask = batch.ids.numpy().astype(np.int32), batch.mask.numpy()
    documents = [ids[i][mask[i]] for i in some.nonzero().squeeze(1).tolist()]
    return DocumentBatch(batch.doc[some], documents, x[counts], row[some].to(x.device))


class DocumentTokens:
    """Token ids of all documents that came by: 4 bytes a token and 16 a document."""

    def __init__(self) -> None:
        self._doc: list[np.ndarray] = []
        self._length: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def update(self, batch: DocumentBatch) -> None:
        if batch.ids:
            self._doc.append(batch.doc.numpy())
            self._length.append(np.array([len(ids) for ids in batch.ids]))
            self._ids.append(np.concatenate(batch.ids))

    def __len__(self) -> int:
        return sum(map(len, self._doc))

    def of(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Token ids of documents by their numbers."""
        doc, length, ids = map(np.concatenate, (self._doc, self._length, self._ids))
        end = length.cumsum()
        order = doc.argsort()
        place = order[doc[order].searchsorted(wanted)]
        return [ids[end[i] - length[i] : end[i]] for i in place.tolist()]
