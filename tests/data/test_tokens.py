from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build_tokenizer
from latentprior.data.text import Document
from latentprior.data.tokens import TokenBatch, tokenize
from latentprior.utils.errors import InputError

TOKENIZER = build_tokenizer()
BOS, EOS, PAD = 0, 1, 2


def docs(*texts: str) -> list[Document]:
    return [Document(10 + 3 * i, text) for i, text in enumerate(texts)]


def rows(batches: Iterator[TokenBatch]) -> dict[int, list[int]]:
    """The real tokens of every document, by document index."""
    found = {}
    for batch in batches:
        for doc, ids, mask in zip(batch.doc.tolist(), batch.ids, batch.mask, strict=True):
            assert doc not in found, "a document appears twice"
            found[doc] = ids[mask].tolist()
    return found


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=25)


@given(texts, st.integers(2, 30), st.integers(1, 80), st.integers(1, 10), st.sampled_from(["left", "right"]))
@settings(deadline=None, max_examples=60)
def test_every_token_comes_once_and_no_document_is_split(texts, max_length, batch_tokens, window, side):
    batches = list(
        tokenize(
            docs(*texts),
            TOKENIZER,
            max_length=max_length,
            batch_tokens=batch_tokens,
            window=window,
            padding_side=side,
        )
    )
    expected = {d.index: ([BOS] + TOKENIZER.encode(d.text))[:max_length] for d in docs(*texts)}
    assert rows(iter(batches)) == {doc: ids for doc, ids in expected.items() if len(ids) > 1}
    assert [batch.index for batch in batches] == list(range(len(batches)))
    for batch in batches:
        assert batch.ids.numel() <= batch_tokens or len(batch.doc) == 1
        assert batch.mask.any(dim=0).all(), "a column is all padding"
        assert (batch.ids[~batch.mask] == PAD).all()
        lengths = batch.mask.sum(dim=1)
        assert (lengths.diff() >= 0).all()
        for position, mask, length in zip(batch.position, batch.mask, lengths.tolist(), strict=True):
            assert position[mask].tolist() == list(range(length)) and (position[~mask] == -1).all()
            edge = mask[-length:] if side == "left" else mask[:length]
            assert edge.all()


@given(texts, st.integers(1, 80))
@settings(deadline=None, max_examples=30)
def test_padding_sides_hold_the_same(texts, batch_tokens):
    left, right = (
        list(tokenize(docs(*texts), TOKENIZER, batch_tokens=batch_tokens, padding_side=side))
        for side in ("left", "right")
    )
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.doc, b.doc) and a.ids.shape == b.ids.shape
        assert torch.equal(a.ids[a.mask], b.ids[b.mask])
        assert torch.equal(a.position[a.mask], b.position[b.mask])


def test_left_padding_by_hand(tiny_tokenizer):
    long, short = tiny_tokenizer.encode("abcd"), tiny_tokenizer.encode("xy")
    (batch,) = tokenize(docs("abcd", "xy"), tiny_tokenizer, padding_side="left")
    gap = len(long) - len(short)
    assert batch.ids.tolist() == [[PAD] * gap + [BOS, *short], [BOS, *long]]
    assert batch.position.tolist() == [[-1] * gap + list(range(len(short) + 1)), list(range(len(long) + 1))]
    assert batch.doc.tolist() == [13, 10]


@pytest.mark.parametrize(("bos", "adds_bos"), [(True, True), (True, False), (False, False)])
def test_bos_comes_once_if_there_is_one(bos, adds_bos):
    tokenizer = build_tokenizer(bos=bos, adds_bos=adds_bos)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    start = [BOS] if bos else []
    assert rows(tokenize(docs("hello", "<bos>hello"), tokenizer)) == {
        10: start + plain,
        13: [BOS, BOS, *plain] if adds_bos else [BOS, *plain],  # what a document says itself is its own
    }


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_beginning_and_counts_bos(adds_bos, side):
    tokenizer = build_tokenizer(adds_bos=adds_bos)
    tokenizer.truncation_side = side
    plain = tokenizer.encode("zzzzyyyyxxxx", add_special_tokens=False)
    assert rows(tokenize(docs("zzzzyyyyxxxx"), tokenizer, max_length=5))[10] == [BOS, *plain[:4]]


def test_documents_without_anything_to_record_are_dropped():
    without_bos = build_tokenizer(bos=False)
    assert rows(tokenize(docs("a", "", "ab"), without_bos)) == {16: without_bos.encode("ab")}
    assert list(tokenize(docs("", ""), TOKENIZER)) == []
    assert list(tokenize([], TOKENIZER)) == []


def test_without_a_pad_token_eos_pads():
    (batch,) = tokenize(docs("a", "a longer text"), build_tokenizer(pad=False))
    assert (batch.ids[~batch.mask] == EOS).all() and not batch.mask.all()


def test_chat(tiny_tokenizer):
    text = "hello there"
    (ids,) = rows(tokenize(docs(text), tiny_tokenizer, chat=True)).values()
    assert tiny_tokenizer.decode(ids) == f"<bos>user: {text}<eos>"  # the template's own BOS, not a second one
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (ids,) = rows(tokenize(docs(text), tiny_tokenizer, chat=True, max_length=3)).values()
    assert ids == [BOS, *tiny_tokenizer.encode(text)[:2]]


def test_refused_at_the_call(tiny_tokenizer):
    with pytest.raises(InputError, match="has no chat template"):
        tokenize([], build_tokenizer(chat=False), chat=True)
    with pytest.raises(InputError, match="padding_side 'rigth'.*'right'"):
        tokenize([], tiny_tokenizer, padding_side="rigth")
    for name in ("max_length", "batch_tokens", "window"):
        with pytest.raises(InputError, match=f"{name} must be at least"):
            tokenize([], tiny_tokenizer, **{name: 0})


def test_length_sorting_saves_padding(tiny_tokenizer):
    lengths = np.random.default_rng(0).integers(1, 60, size=300)
    many = docs(*("x" * n for n in lengths))

    def padded(window: int) -> int:
        return sum(batch.ids.numel() for batch in tokenize(many, tiny_tokenizer, batch_tokens=512, window=window))

    real = sum(int(batch.mask.sum()) for batch in tokenize(many, tiny_tokenizer))
    assert padded(300) < 1.1 * real < padded(8)


def test_a_stream_is_repeatable_and_read_by_the_window(tiny_tokenizer):
    taken = []

    def counted() -> Iterator[Document]:
        for document in docs(*(f"text {i}" * (1 + i % 7) for i in range(40))):
            taken.append(document.index)
            yield document

    stream = tokenize(counted(), tiny_tokenizer, window=8, batch_tokens=64)
    assert not taken
    first = next(stream)
    assert len(taken) == 8
    again = list(tokenize(counted(), tiny_tokenizer, window=8, batch_tokens=64))
    for a, b in zip([first, *stream], again, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("bos", [True, False])
def test_the_last_tokens_are_kept_on_demand(bos, make_tokenizer):
    tokenizer = make_tokenizer(bos=bos)
    ids = tokenizer.encode("one two three four five six seven eight")
    start = [BOS] if bos else []
    found = rows(tokenize(docs("one two three four five six seven eight"), tokenizer, max_length=6, keep="last"))
    assert found[10] == start + ids[len(ids) - 6 + len(start) :]
    short = rows(tokenize(docs("one two"), tokenizer, max_length=60, keep="last"))
    assert short[10] == start + tokenizer.encode("one two")


# --- Long documents in chunks


@pytest.mark.parametrize("bos", [True, False])
@given(texts, st.integers(2, 12), st.integers(1, 80), st.integers(1, 10))
@settings(deadline=None, max_examples=40)
def test_chunks_hold_every_token_once_after_a_first_position(bos, texts, max_length, batch_tokens, window):
    tokenizer = TOKENIZER if bos else build_tokenizer(bos=False)
    batches = list(
        tokenize(docs(*texts), tokenizer, max_length=max_length, batch_tokens=batch_tokens, window=window, chunk=True)
    )
    found: dict[int, dict[int, int]] = {}
    for batch in batches:
        assert batch.ids.shape[1] <= max_length
        for doc, ids, position, offset in zip(batch.doc.tolist(), batch.ids, batch.position, batch.offset, strict=True):
            assert not bos or ids[position == 0].item() == BOS
            for token, place in zip(
                ids[position > 0].tolist(), (position + offset)[position > 0].tolist(), strict=True
            ):
                assert place not in found.setdefault(doc, {})
                found[doc][place] = token
        assert batch.left_out == {"cut_documents": 0, "cut_tokens": 0}
    whole = {d.index: ([BOS] if bos else []) + tokenizer.encode(d.text) for d in docs(*texts)}
    assert found == {doc: dict(enumerate(ids[1:], start=1)) for doc, ids in whole.items() if len(ids) > 1}
    assert {doc: len(whole[doc]) for doc in found} == {
        doc: length for b in batches for doc, length in zip(b.doc.tolist(), b.length.tolist(), strict=True)
    }
    assert [batch.index for batch in batches] == list(range(len(batches)))


def test_chunks_change_nothing_for_short_documents():
    plain, chunked = (list(tokenize(docs("ab", "abcd", "x"), TOKENIZER, max_length=9, chunk=c)) for c in (False, True))
    for a, b in zip(plain, chunked, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "mask", "doc", "position", "cut")
        )


def test_what_is_cut_is_counted():
    lengths = {d.index: 1 + len(TOKENIZER.encode(d.text)) for d in docs("zzzzyyyyxxxx", "zz", "yyyyzzzzxxxx zz")}
    batches = list(tokenize(docs("zzzzyyyyxxxx", "zz", "yyyyzzzzxxxx zz"), TOKENIZER, max_length=4))
    beyond = [length - 4 for length in lengths.values() if length > 4]
    assert len(beyond) == 2
    assert sum(batch.left_out["cut_documents"] for batch in batches) == len(beyond)
    assert sum(batch.left_out["cut_tokens"] for batch in batches) == sum(beyond)


def test_a_window_of_books_ends_early(monkeypatch):
    monkeypatch.setattr("latentprior.data.tokens.WINDOW_CHARACTERS", 10)
    batches = list(tokenize(docs(*["abcdefgh"] * 5), TOKENIZER, max_length=4, batch_tokens=10**6, chunk=True))
    assert [batch.doc.unique().tolist() for batch in batches] == [[10, 13], [16, 19], [22]]
    assert len(list(tokenize(docs(*["abcdefgh"] * 5), TOKENIZER, batch_tokens=10**6))) == 1


def test_the_end_of_a_text_is_not_kept_in_chunks():
    with pytest.raises(InputError, match="keep 'last'"):
        tokenize(docs("a"), TOKENIZER, keep="last", chunk=True)
