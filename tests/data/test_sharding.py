"""Document shards: every document once, in one order whoever reads it, and from any position on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.config import TextConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.partition import BatchPartition, shards_for
from latentprior.data.stream.sharding import SNAPSHOT, WINDOW, Cursor, DocumentShard, DocumentSharder
from latentprior.data.text import documents
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError

# --- Dividing a batch


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 60))
def test_every_place_of_a_batch_belongs_to_one_process(shards, size, per_process):
    batch = per_process * size
    if not size <= shards <= batch:
        with pytest.raises(InputError, match="document_shards"):
            BatchPartition(batch, shards, World(0, size))
        return
    partitions = [BatchPartition(batch, shards, World(rank, size)) for rank in range(size)]
    places = torch.cat([partition.positions() for partition in partitions])
    assert places.sort().values.tolist() == list(range(batch))
    assert [len(partition.positions()) for partition in partitions] == [partition.rows for partition in partitions]
    assert max(partition.rows for partition in partitions) == partitions[0].most_rows
    quotas = [partitions[0].quota(shard) for shard in range(shards)]
    assert sum(quotas) == batch and max(quotas) - min(quotas) <= 1


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match="^a batch of 1024 cannot be divided evenly over 3 processes$"):
        BatchPartition(1024, 24, World(0, 3))


@pytest.mark.parametrize(("batch", "size", "shards"), [(1024, 1, 24), (1024, 3, 24), (4096, 25, 48), (16, 2, 16)])
def test_default_shards(batch, size, shards):
    assert shards_for(batch, size) == shards


# --- Spreading documents


@pytest.fixture
def text(tmp_path: Path) -> TextConfig:
    """Some more documents than lie between two snapshots."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(SNAPSHOT + 1500)))
    return TextConfig(dataset=str(path), part="all")


def taken(sharder: DocumentSharder, shard: int, size: int = 100) -> list[str]:
    found: list[str] = []
    while some := sharder.take(shard, size):
        found += [document.text for document in some]
    return found


@pytest.fixture
def spread(text) -> list[list[str]]:
    """What each of five shards gets."""
    return [taken(DocumentSharder(text, 5, {shard: Cursor()}), shard) for shard in range(5)]


def test_every_document_goes_to_one_shard_in_order(text, spread):
    place = {document.text: i for i, document in enumerate(documents(text))}
    rounds = [[place[document] // 5 for document in shard] for shard in spread]
    assert all(one == list(range(len(one))) for one in rounds)  # one of every five documents
    assert sorted(place[document] for shard in spread for document in shard) == list(range(len(place)))
    positions = [place[document] % 5 for document in spread[0]]
    assert all(150 < positions.count(i) * 1000 / len(positions) < 250 for i in range(5))  # whatever the text's period
    several = DocumentSharder(text, 5, {1: Cursor(), 4: Cursor()})
    assert taken(several, 4, 33) == spread[4] and taken(several, 1, 7) == spread[1]


def test_a_shard_begins_at_its_cursor(text, spread):
    sharder = DocumentSharder(text, 5, {0: Cursor(documents=700), 2: Cursor(documents=3)})
    assert taken(sharder, 0) == spread[0][700:]
    assert taken(sharder, 2) == spread[2][3:]


def test_a_snapshot_is_the_last_one_that_no_shard_has_passed(text):
    sharder = DocumentSharder(text, 2, {0: Cursor(), 1: Cursor()})
    sharder.take(0, 2500), sharder.take(1, 2600)
    rest = taken(DocumentSharder(text, 2, {1: Cursor()}), 1)[2600:]
    early = sharder.snapshot([Cursor(documents=2500), Cursor(documents=2000)])
    assert early["document"] == 0
    late = sharder.snapshot([Cursor(documents=2500), Cursor(documents=2600)])
    assert late["document"] == SNAPSHOT
    again = DocumentSharder(text, 2, {1: Cursor(documents=2600)}, json.loads(json.dumps(late)))
    assert taken(again, 1) == rest


# --- A shard's rows


def shard_over(texts: list[str], cursor: Cursor, dropped: int = 0) -> DocumentShard:
    """A shard whose documents have a row for each letter; token batches hold two documents."""
    remaining = iter(texts[cursor.documents :])

    def take(count: int) -> list[str]:
        return [text for _, text in zip(range(count), remaining, strict=False)]

    def tokenize(window: list[str], first: int) -> list:
        return [(first + i, window[2 * i : 2 * i + 2]) for i in range(-(-len(window) // 2))]

    def record(batch) -> tuple[ActivationBatch, dict[str, int]]:
        letters = [ord(letter) for text in batch[1] for letter in text]
        index = torch.tensor(letters, dtype=torch.long)
        return ActivationBatch(index[:, None].float(), index, index, index, index), {"sinks": dropped}

    return DocumentShard(take, tokenize, record, cursor)  # type: ignore[arg-type]


def letters(pieces) -> str:
    return "".join(chr(int(value)) for piece in pieces for value in piece.x[:, 0])


TEXTS = ["".join(chr(97 + (7 * i + j) % 26) for j in range(i % 5)) for i in range(2 * WINDOW + 11)]
WHOLE = "".join(TEXTS)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_rows_come_in_one_order_from_any_position_on(counts):
    shard, begin = shard_over(TEXTS, Cursor()), 0
    for count in counts:
        assert letters(shard.read(count)) == WHOLE[begin : begin + count]
        begin = min(begin + count, len(WHOLE))
        again = shard_over(TEXTS, shard.cursor)
        assert letters(again.read(50)) == WHOLE[begin : begin + 50]
    assert letters(shard.read(10**6)) == WHOLE[begin:]
    assert letters(shard.read(1)) == ""


def test_left_out_rows_are_counted_once():
    shard = shard_over(TEXTS[:10], Cursor(), dropped=3)
    list(shard.read(7))
    before = shard.cursor
    list(shard.read(10**6))
    assert shard.cursor.sinks == 15
    again = shard_over(TEXTS[:10], before, dropped=3)
    list(again.read(10**6))
    assert again.cursor.sinks == 15


def test_whole_token_batches():
    shard = shard_over(["ab", "cd", "ef", "gh"], Cursor())
    assert letters(shard.read_batches(1)) == "abcd"
    assert letters(shard.read_batches(0)) == ""
    assert letters(shard.read_batches(5)) == "efgh"
