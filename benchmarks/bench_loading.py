"""Loading shuffled activations for training: `ActivationStore.batches` against one memory-mapped row at a time.

The baseline is a map-style `Dataset` as the official activation folders suggest it: one raw file of bfloat16 bits as
int16, a uint64 index of element ranges, a slice and a tensor for each row, batches by a DataLoader's default collate.
Both read the same rows from the same disk in the same run, warm, in batches of 4096.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint

WIDTH = 576
BATCH = 4096
REPEATS = 3


class PerRowDataset(Dataset):
    """One memory-map slice and one tensor for each row."""

    def __init__(self, folder: Path) -> None:
        self.data = np.memmap(folder / "data_0000.npy", dtype=np.int16, mode="r")
        self.ranges = np.load(folder / "data_indices.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> Tensor:
        _, start, end = self.ranges[index]
        return torch.tensor(self.data[start:end]).view(torch.bfloat16)


def write_both(folder: Path, rows: int) -> None:
    """The same random rows as a store and as a flat file with its index."""
    generator = torch.Generator().manual_seed(0)
    hookpoint = Hookpoint(model="random", layer=15, width=WIDTH)
    with (
        StoreWriter(folder / "store", [hookpoint], source={}) as writer,
        open(folder / "data_0000.npy", "wb") as flat,
    ):
        for number, start in enumerate(range(0, rows, BATCH)):
            n = min(BATCH, rows - start)
            x = torch.randn(n, WIDTH, generator=generator).bfloat16()
            index = torch.arange(start, start + n)
            batch = ActivationBatch(x=x, layer=torch.full((n,), 15), doc=index, position=index, token=index)
            writer.append(batch, next_batch=number + 1, left_out={})
            flat.write(x.view(torch.int16).numpy().data)
    ends = np.arange(1, rows + 1, dtype=np.uint64) * WIDTH
    np.save(folder / "data_indices.npy", np.stack([np.zeros_like(ends), ends - np.uint64(WIDTH), ends], axis=1))


def rows_per_second(make: Callable[[], Iterable[Tensor]], rows: int, repeats: int = REPEATS) -> float:
    """Best rate of several epochs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        seen = sum(len(x) for x in make())
        best = min(best, time.perf_counter() - start)
        if seen != rows:
            raise RuntimeError(f"an epoch gave {seen} rows instead of {rows}")
    return rows / best


def measure(rows: int = 200_000) -> dict[str, Any]:
    """Rows per second of both loaders over one epoch of `rows` shuffled rows, best of three, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_both(folder, rows)
        store = ActivationStore(folder / "store")
        loader = DataLoader(
            PerRowDataset(folder), BATCH, shuffle=True, num_workers=0, generator=torch.Generator().manual_seed(0)
        )
        batches = -(-rows // BATCH)
        ours = rows_per_second(
            lambda: (x for x, _ in itertools.islice(store.batches(BATCH, drop_last=False), batches)), rows
        )
        per_row = rows_per_second(lambda: loader, rows)
    return {
        "benchmark": "loading",
        "rows": rows,
        "width": WIDTH,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "store_rows_per_second": round(ours),
        "per_row_rows_per_second": round(per_row),
        "ratio": round(ours / per_row, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows to load (default: %(default)s)")
    print(json.dumps(measure(parser.parse_args().rows)))


if __name__ == "__main__":
    main()
