"""Labelled texts and their split: the binary tasks of SAE-Probes, or one's own in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from latentprior.data import corpus
from latentprior.data.text_files import DEFAULT_COLUMNS, TABLES, kind, read_table
from latentprior.probe.names import OWN, family
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.reprs import ShortRepr

LEAST = 120  # rows: the protocol keeps 100 of them from training
LABELS = ("target", "label", "class")


class UnsuitableTask(InputError):
    """A task that does not fulfil the protocol: skipped where others can be probed."""


@dataclass(frozen=True, eq=False, repr=False)
class Task(ShortRepr):
    """A binary classification of texts: which of them train a probe and which test it."""

    name: str
    family: str
    texts: list[str]
    labels: np.ndarray
    """[N] int64, 0 or 1: the rank of each text's target among the two, sorted."""
    train: np.ndarray
    """Rows, in random order."""
    test: np.ndarray

    def used(self) -> list[str]:
        """The texts of the training rows, then those of the test rows."""
        return [self.texts[row] for row in (*self.train, *self.test)]

    def without(self, missing: np.ndarray) -> Task:
        """The task without the rows [N] bool that were not recorded."""
        train, test = (rows[~missing[rows]] for rows in (self.train, self.test))
        for rows in (train, test):
            if len(np.unique(self.labels[rows])) < 2:
                raise InputError(f"of task {self.name!r} only one class was recorded")
        return Task(self.name, self.family, self.texts, self.labels, train, test)


def find_task(
    name: str, *, seed: int = 42, max_test: int | None = None, text: str | None = None, label: str | None = None
) -> Task:
    """A task of SAE-Probes by its name, or of a table by its path, with the protocol's split.

    Args:
        name: one of `corpus.binary_tasks()`, or the path of a CSV, TSV or parquet file.
        max_test: most test rows, the first ones of the protocol's random order; None: all.
        text, label: columns of a table; None: see `labelled_texts`.

    Raises:
        UnsuitableTask: not two classes, or fewer than 120 rows once the classes are balanced.
    """
    if kind(Path(name)) in TABLES:
        file = Path(name).name
        title, group = file[: file.lower().index(kind(Path(name)))], OWN
        texts, labels = labelled_texts(name, text=text, label=label)
        texts, labels = _balanced(texts, labels, seed)
    else:
        if name not in (names := corpus.binary_tasks()):
            raise unknown("task", name, names)
        title, group = name, family(name)
        texts, codes = corpus.labelled(name)
        labels = np.asarray(codes)
    if len(texts) < LEAST:
        raise UnsuitableTask(f"task {title!r} has {len(texts)} rows in two equal classes, fewer than {LEAST}")
    train, test = corpus.probing_split(labels, seed=seed)
    return Task(title, group, texts, labels, train, test[:max_test])


def labelled_texts(
    path: str | Path, *, text: str | None = None, label: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Texts and labels (0 or 1) of a table; rows that lack either are left out.

    Args:
        text: column of the texts; None: "text", "prompt" or "content", or the only text column beside the labels.
        label: column of the labels; None: "target", "label" or "class", or the only one beside the texts.
    """
    name = Path(path).name
    text, label = _columns(read_table(path, nulls=True), name, text=text, label=label)
    table = read_table(path, {text: pa.string(), label: pa.string()}, nulls=True).select([text, label]).drop_null()
    targets = table[label].to_pylist()
    classes = _ordered(set(targets))
    if len(classes) != 2:
        shown = ", ".join(map(repr, classes[:5])) or "none"
        raise UnsuitableTask(f"task {name!r} needs two distinct targets, got {len(classes)}: {shown}")
    return table[text].to_pylist(), np.array([classes.index(target) for target in targets])


def _columns(table: pa.Table, name: str, *, text: str | None, label: str | None) -> tuple[str, str]:
    """The columns of texts and labels; those that are None are found as `labelled_texts` says."""
    for option, column in (("text", text), ("label", label)):
        if column is not None and column not in table.column_names:
            raise unknown(f"{option} column of {name}", column, table.column_names)
    if label is None:
        label = next((column for column in LABELS if column in table.column_names and column != text), None)
    if text is None:
        texts = [f.name for f in table.schema if pa.types.is_string(f.type) and f.name != label]
        named = [column for column in DEFAULT_COLUMNS if column in texts]
        if not named and len(texts) != 1:
            raise InputError(_untold(name, table, "texts", DEFAULT_COLUMNS, "--text_column"))
        text = (named or texts)[0]
    others = [column for column in table.column_names if column != text]
    if label is None and len(others) != 1:
        raise InputError(_untold(name, table, "labels", LABELS, "--label_column"))
    return text, label or others[0]


def _untold(name: str, table: pa.Table, what: str, usual: Sequence[str], option: str) -> str:
    columns = ", ".join(table.column_names)
    return f"{name} has the columns {columns}, and none of {what} is called {' or '.join(usual)}: name it with {option}"


def _ordered(targets: set[str]) -> list[str]:
    """Sorted as numbers where all are, as scikit-learn's label encoder would have them."""
    try:
        return sorted(targets, key=float)
    except ValueError:
        return sorted(targets)


def _balanced(texts: list[str], labels: np.ndarray, seed: int) -> tuple[list[str], np.ndarray]:
    """As many rows of each class, in their order: of the larger one some are drawn."""
    fewest = np.bincount(labels, minlength=2).min()
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == c))[:fewest] for c in (0, 1)]
    rows = np.sort(np.concatenate(kept))
    return [texts[row] for row in rows], labels[rows]
