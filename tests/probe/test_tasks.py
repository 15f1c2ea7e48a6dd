from __future__ import annotations

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentprior.data import corpus
from latentprior.probe.names import family
from latentprior.probe.tasks import UnsuitableTask, find_task, labelled_texts
from latentprior.utils.errors import InputError

COLUMNS = {"text": "prompt", "label": "target"}


def write(path, rows, header="prompt,target"):
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def two_classes(positive: int, negative: int) -> list[list[str]]:
    rows = [[f"text {i} good", "yes"] for i in range(positive)] + [[f"text {i} bad", "no"] for i in range(negative)]
    return rows


def test_a_csv_is_balanced_and_split_as_the_protocol_says(tmp_path):
    task = find_task(write(tmp_path / "mine.csv", two_classes(150, 90)), **COLUMNS)
    assert (task.name, task.family, len(task.texts)) == ("mine", "own", 180)
    assert np.bincount(task.labels).tolist() == [90, 90]
    assert (len(task.train), len(task.test)) == (80, 99)
    assert not set(task.train) & set(task.test)
    assert all(("good" in text) == label for text, label in zip(task.texts, task.labels, strict=True))  # no < yes
    assert task.used() == [task.texts[i] for i in (*task.train, *task.test)]
    assert find_task(str(tmp_path / "mine.csv"), max_test=10, **COLUMNS).test.tolist() == task.test[:10].tolist()


@pytest.mark.parametrize("header", ["prompt,target", "text,label", "sentence,class", "content,verdict", "one,target"])
def test_columns_are_found(tmp_path, header):
    task = find_task(write(tmp_path / "mine.csv", two_classes(70, 70), header))
    assert (len(task.texts), np.bincount(task.labels).tolist()) == (140, [70, 70])
    assert all("good" in text or "bad" in text for text in task.texts)


def test_numbers_are_no_texts(tmp_path):
    rows = [[str(i), f"text {i}", str(i % 2)] for i in range(130)]
    assert find_task(write(tmp_path / "mine.csv", rows, "id,sentence,label")).texts[0] == "text 0"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("question,answer,target", "columns question, answer, target, and none of texts is .*with --text_column"),
        ("text,first,second", "columns text, first, second, and none of labels is .*with --label_column"),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(tmp_path, header, message):
    rows = [["a", "b", "c"], ["d", "e", "f"]]
    with pytest.raises(InputError, match=message) as error:
        find_task(write(tmp_path / "mine.csv", rows, header))
    assert not isinstance(error.value, UnsuitableTask) and "\n" not in str(error.value)


def test_targets_sort_as_numbers_where_they_are(tmp_path):
    path = write(tmp_path / "t.csv", [["a", "10"], ["b", "9"], ["", "9"], ["c", ""]])
    assert labelled_texts(path) == (["a", "b"], pytest.approx([1, 0]))


@pytest.mark.parametrize("ending", ["tsv", "parquet", "csv.gz", "CSV"])
def test_tables_of_other_kinds_are_the_same_task(tmp_path, ending):
    rows = two_classes(70, 60)
    expected = find_task(write(tmp_path / "mine.csv", rows), **COLUMNS)
    path = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"prompt": [row[0] for row in rows], "target": [row[1] for row in rows]}), path)
    else:
        content = (tmp_path / "mine.csv").read_bytes()
        content = content.replace(b",", b"\t") if ending == "tsv" else content
        path.write_bytes(gzip.compress(content) if ending == "csv.gz" else content)
    task = find_task(str(path), **COLUMNS)
    assert (task.name, task.texts, task.train.tolist()) == ("mine", expected.texts, expected.train.tolist())


def test_rows_without_the_recorded_ones_keep_both_classes(tmp_path):
    task = find_task(write(tmp_path / "t.csv", two_classes(70, 70)), **COLUMNS)
    missing = np.zeros(len(task.texts), bool)
    missing[task.train[:3]] = True
    assert len(task.without(missing).train) == len(task.train) - 3
    with pytest.raises(InputError, match="only one class"):
        task.without(task.labels == 1)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (two_classes(80, 80), "prompt,answer", "unknown label column of t.csv 'target'.*answer"),
        (two_classes(80, 80), "words,target", "unknown text column of t.csv 'prompt'"),
        (two_classes(150, 0), "prompt,target", "two distinct targets, got 1: 'yes'"),
        ([*two_classes(80, 80), ["x", "maybe"]], "prompt,target", "two distinct targets, got 3"),
        (two_classes(59, 200), "prompt,target", "has 118 rows in two equal classes, fewer than 120"),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(tmp_path, rows, header, message):
    with pytest.raises(InputError, match=message) as error:
        find_task(write(tmp_path / "t.csv", rows, header), **COLUMNS)
    assert "\n" not in str(error.value)


def test_missing_files_and_tasks_are_named(tmp_path):
    with pytest.raises(InputError, match="none.csv"):
        find_task(str(tmp_path / "none.csv"), **COLUMNS)
    (tmp_path / "binary.csv").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(InputError, match="binary.csv"):
        find_task(str(tmp_path / "binary.csv"), **COLUMNS)


@pytest.mark.assets
def test_every_embedded_task_has_a_family_and_unknown_ones_are_named():
    assert {family(name) for name in corpus.binary_tasks()} <= {
        "people", "places", "headlines and news", "compound words", "question answering", "ethics",
        "sentence understanding", "sentiment and emotion", "toxicity and spam", "written by a model", "medicine",
        "other topics", "code",
    }  # fmt: skip
    task = find_task("92_glue_sst2", max_test=100, **COLUMNS)
    assert (task.family, len(task.train), len(task.test)) == ("sentiment and emotion", 1024, 100)
    with pytest.raises(InputError, match="92_glue_sst2"):
        find_task("92_glue_sst", **COLUMNS)
