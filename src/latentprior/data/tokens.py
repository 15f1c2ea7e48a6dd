"""Documents to padded batches of tokens, grouped by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from latentprior.data.text import Document
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.reprs import ShortRepr

Keep = Literal["first", "last"]
WINDOW_CHARACTERS = 2**24
"""Of a window whose documents are not cut: books would not fit into memory."""


@dataclass(frozen=True, repr=False)
class TokenBatch(ShortRepr):
    """B documents, or chunks of them, of at most T tokens."""

    ids: Int64[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    """True at real tokens, BOS included."""
    doc: Int64[Tensor, " B"]
    """`Document.index` of each row."""
    position: Int64[Tensor, "B T"]
    """Index of each token in its row, 0 for the first one (BOS); -1 at padding."""
    index: int
    """Number of the batch in its stream."""
    offset: Int64[Tensor, " B"]
    """What turns a position in the row into one in the document: 0 for a document or its first chunk."""
    length: Int64[Tensor, " B"]
    """Tokens of the document, all its chunks together."""
    cut: Int64[Tensor, " B"]
    """Tokens of the document beyond `length`, which are in no row."""

    @classmethod
    def whole(cls, ids: Tensor, mask: Tensor, doc: Tensor, position: Tensor, index: int) -> TokenBatch:
        zeros = torch.zeros_like(doc)
        return cls(ids, mask, doc, position, index, offset=zeros, length=mask.sum(dim=1), cut=zeros)

    @property
    def left_out(self) -> dict[str, int]:
        """How many documents of the batch are cut, and by how many tokens."""
        return {"cut_documents": int((self.cut > 0).sum()), "cut_tokens": int(self.cut.sum())}


class _Row(NamedTuple):
    doc: int
    ids: list[int]
    offset: int
    length: int
    cut: int


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    padding_side: str = "right",
    chat: bool = False,
    keep: Keep = "first",
    window: int = 1024,
    first_index: int = 0,
    chunk: bool = False,
) -> Iterator[TokenBatch]:
    """Tokens of all documents, each document whole in one batch, or, if asked for, long ones in chunks.

    `window` documents at a time are tokenised in one call, sorted by length and cut into batches, so that little is
    padding; the batches of a window come in a fixed random order, so that a stream that is cut short has seen short
    and long documents alike. A stream is resumed by skipping to a `TokenBatch.index`.

    Args:
        tokenizer: its BOS token, if it has one, starts every document once, whether or not it adds it by itself.
        max_length: documents are cut to this many tokens, BOS included; those with fewer than 2 are left out.
        batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.
        chat: wrap every document as a user message in the tokenizer's chat template.
        keep: which tokens of a longer document to keep; BOS always.
        first_index: number of the first batch, where `documents` begin at a later window of a longer stream.
        chunk: give longer documents in chunks of `max_length`, each with BOS first (without a BOS token: the last token
            of the chunk before), so that every token but the first is once at a position after the first of a row.
    """
    if padding_side not in ("right", "left"):
        raise unknown("padding_side", padding_side, ("right", "left"))
    if keep not in get_args(Keep):
        raise unknown("keep", keep, get_args(Keep))
    for name, value, least in (("max_length", max_length, 2), ("batch_tokens", batch_tokens, 1), ("window", window, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set chat to false")
    if chunk and keep == "last":
        raise InputError("keep 'last' means nothing for documents in chunks, which are kept whole")
    start = beginning(tokenizer)

    def rows_of(document: Document, ids: list[int]) -> Iterator[_Row]:
        if chunk and len(ids) > max_length:
            for offset in range(0, len(ids) - 1, max_length - 1):
                first = start or ids[offset : offset + 1]
                yield _Row(document.index, first + ids[offset + 1 : offset + max_length], offset, len(ids), 0)
        elif len(ids) > 1:
            kept = _shortened(ids, max_length, keep, start)
            yield _Row(document.index, kept, 0, len(kept), len(ids) - len(kept))

    def batches() -> Iterator[TokenBatch]:
        filler = padding_id(tokenizer)
        index = first_index
        stream = iter(documents)
        while block := next_window(stream, window, WINDOW_CHARACTERS if chunk else None):
            whole = encode([document.text for document in block], tokenizer, chat=chat)
            rows = [row for document, ids in zip(block, whole, strict=True) for row in rows_of(document, ids)]
            lengths = np.array([len(row.ids) for row in rows])
            order = [int(i) for i in np.argsort(lengths, kind="stable")]
            runs = list(_cut(order, lengths, batch_tokens))
            for number in np.random.default_rng(index).permutation(len(runs)):
                chosen = [rows[i] for i in runs[number]]
                doc, offset, length, cut = torch.tensor([(r.doc, r.offset, r.length, r.cut) for r in chosen]).unbind(1)
                ids, mask, position = pad([row.ids for row in chosen], filler, padding_side)
                yield TokenBatch(ids, mask, doc, position, index, offset, length, cut)
                index += 1

    return batches()


def padding_id(tokenizer: Any) -> int:
    # Masks tell padding from text, so any token will do.
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(i, int))


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that start every document: BOS, or none."""
    bos = tokenizer.bos_token_id
    return [] if bos is None else [bos]


def missing_beginning(tokenizer: Any, ids: list[int]) -> list[int]:
    """The BOS token to put before `ids`; empty if it is there or the tokenizer has none."""
    start = beginning(tokenizer)
    return [] if ids[:1] == start else start


def encode(
    texts: list[str], tokenizer: Any, max_length: int | None = None, chat: bool = False, keep: Keep = "first"
) -> list[list[int]]:
    """Token ids of each text, BOS first, cut to the first or last `max_length` (None: whole)."""
    rows: Any  # transformers' annotations cover every form of output
    if chat:
        messages = [[{"role": "user", "content": text}] for text in texts]
        rows = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    else:
        # Cut below, not by the tokenizer: it might cut the beginning, and it may or may not count BOS.
        rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    start = beginning(tokenizer)
    rows = [missing_beginning(tokenizer, row) + row for row in rows]
    return rows if max_length is None else [_shortened(row, max_length, keep, start) for row in rows]


def _shortened(row: list[int], max_length: int, keep: Keep, start: list[int]) -> list[int]:
    if keep == "first" or len(row) <= max_length:
        return row[:max_length]
    return start + row[len(row) - max_length + len(start) :]


def next_window(documents: Iterator[Document], count: int, characters: int | None) -> list[Document]:
    """The next `count` documents, fewer once they hold `characters` characters or where the text ends."""
    taken, size = [], 0
    while len(taken) < count and (characters is None or size < characters):
        if (document := next(documents, None)) is None:
            break
        taken.append(document)
        size += len(document.text)
    return taken


def _cut(order: list[int], lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """`order`, ascending in length, in runs whose padded size is at most `batch_tokens`, or of one row."""
    run: list[int] = []
    for i in order:
        if run and (len(run) + 1) * lengths[i] > batch_tokens:
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def pad(
    rows: list[list[int]], pad: int, side: str
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"], Int64[Tensor, "B T"]]:
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    width = int(lengths.max())
    start = width - lengths if side == "left" else torch.zeros_like(lengths)
    position = torch.arange(width) - start
    mask = (position >= 0) & (position < lengths)
    ids = torch.full((len(rows), width), pad)
    ids[mask] = torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum())))
    return ids, mask, position.masked_fill(~mask, -1)
