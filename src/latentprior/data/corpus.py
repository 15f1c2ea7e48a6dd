"""The embedded corpus: the probing tasks of SAE-Probes (Kantamneni et al., 2025), as tasks and as documents."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentprior.data.text_files import read_table
from latentprior.lm.assets import build_once, sae_probes_data
from latentprior.utils.errors import InputError, unknown

NAME = "sae-probes"
TRAIN_ELIGIBLE, PROBING_TEST = "train-eligible", "probing-test"
_RECIPE = 1


def tasks() -> list[str]:
    """Names of all 155 tasks, sorted, such as "92_glue_sst2"."""
    return sorted(path.name.removesuffix(".csv.zst") for path in (sae_probes_data() / "cleaned_data").glob("*.csv.zst"))


def binary_tasks() -> list[str]:
    """Names of the 113 binary tasks, in the order of their publication; the paper probes these."""
    table = read_table(sae_probes_data() / "probing_datasets_MASTER.csv.zst", {})
    rows = zip(table["Dataset save name"].to_pylist(), table["Data type"].to_pylist(), strict=True)
    return [Path(name).stem for name, kind in rows if kind == "Binary Classification"]


def labelled(task: str) -> tuple[list[str], list[int]]:
    """Texts of one of `tasks()` and their labels: the rank of the target among the task's distinct targets, sorted."""
    if task not in (names := tasks()):
        raise unknown("task", task, names)
    file = sae_probes_data() / "cleaned_data" / f"{task}.csv.zst"
    table = read_table(file, {"prompt": pa.string()})  # a prompt is text even where it looks like a number
    targets = table["target"].to_pylist()
    rank = {target: i for i, target in enumerate(sorted(set(targets)))}
    return table["prompt"].to_pylist(), [rank[target] for target in targets]


def probing_split(labels: Sequence[int] | np.ndarray, *, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of a binary task, the very ones that SAE-Probes takes (paper, section on 1-D probing).

    Both, int64 arrays of row numbers, are balanced, in random order and disjoint; the training rows number
    min(1024, N - 100), the test rows are all others but one.
    """
    labels = np.asarray(labels)
    if not np.isin(labels, (0, 1)).all():
        raise InputError("probing_split needs labels that are 0 or 1")
    n_train = min(1024, len(labels) - 100)
    n_test = len(labels) - n_train - 1
    classes = [np.flatnonzero(labels == label) for label in (1, 0)]
    halves = [((n + 1) // 2, n // 2) for n in (n_train, n_test)]
    wanted = [sum(sizes) for sizes in zip(*halves, strict=True)]
    if n_train < 1 or any(len(rows) < count for rows, count in zip(classes, wanted, strict=True)):
        counts = f"{len(classes[0])} ones and {len(classes[1])} zeros"
        raise InputError(f"probing_split needs more than 100 rows in two equal classes, got {counts}")

    # The legacy generator and this order of draws (positives first, then permutations) are what the protocol fixes.
    rng = np.random.RandomState(seed)
    train = [rng.choice(rows, size, replace=False) for rows, size in zip(classes, halves[0], strict=True)]
    rest = [np.setdiff1d(rows, taken) for rows, taken in zip(classes, train, strict=True)]
    test = [rng.choice(rows, size, replace=False) for rows, size in zip(rest, halves[1], strict=True)]
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def corpus_file() -> Path:
    """The parquet file of the corpus, one row for each distinct text of all tasks, built in seconds on first use.

    Columns: text; source, the first task that has it; split, "probing-test" if it is in the test rows of any binary
    task, else "train-eligible". The order is that of a hash of the text, so any prefix is a fair sample of the whole.
    """
    return build_once(NAME, ["sae_probes"], _RECIPE, _build) / "documents.parquet"


def _build(folder: Path) -> None:
    source: dict[str, str] = {}
    probed: set[str] = set()
    binary = set(binary_tasks())
    for task in tasks():
        texts, labels = labelled(task)
        for text in texts:
            source.setdefault(text, task)
        if task in binary:
            probed.update(texts[row] for row in probing_split(labels)[1])
    ordered = sorted(source, key=lambda text: blake2b(text.encode(), digest_size=16, person=b"order").digest())
    split = [PROBING_TEST if text in probed else TRAIN_ELIGIBLE for text in ordered]
    table = pa.table({"text": ordered, "source": [source[text] for text in ordered], "split": split})
    pq.write_table(table, folder / "documents.parquet", row_group_size=8192, compression="zstd")
