"""Reading activations from disk: a folder of shards and the manifest that lists them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from latentprior.data.activations import ActivationBatch
from latentprior.data.moments import Moments
from latentprior.data.store import manifest as files
from latentprior.lm.hooks import Hookpoint, check_recorded
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.random import keyed_generator


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Any error inside says that the file is damaged."""
    try:
        yield
    except (SafetensorError, pa.ArrowException, OSError, ValueError) as error:
        raise files.damaged(path, error) from error


class Shard:
    """One shard: its activations mapped into memory, its metadata read when they are asked for."""

    def __init__(
        self, folder: Path, entry: Mapping[str, Any], width: int, dtype: torch.dtype, *, checksum: bool = False
    ) -> None:
        self._rows, self._width, self._dtype = entry["rows"], width, dtype
        self._activations = self._open_activations(files.verified_file(folder, entry["activations"], checksum=checksum))
        self._metadata = files.verified_file(folder, entry["metadata"], checksum=checksum)
        with _reading(self._metadata):
            footer = pq.read_metadata(self._metadata)
            rows, columns = footer.num_rows, {footer.schema.column(i).name for i in range(footer.num_columns)}
        if rows != self._rows or not columns >= files.COLUMNS.keys():
            raise files.damaged(self._metadata, f"it holds {rows} rows of {sorted(columns)}")

    def __len__(self) -> int:
        return self._rows

    def _open_activations(self, path: Path) -> np.ndarray:
        with _reading(path), safe_open(path, "pt") as file:
            activations = file.get_tensor("activations")
        expected = (self._rows, self._width)
        if activations.shape != expected or activations.dtype != self._dtype:
            found = f"{activations.dtype} {list(activations.shape)}"
            raise files.damaged(path, f"it holds {found}, not {self._dtype} {list(expected)}")
        return activations.view(torch.uint8).numpy()

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy the bytes of rows, [n] int64 and within the shard, to `out` [n, bytes]."""
        # The mode "raise" would copy once more.
        self._activations.take(indices, axis=0, out=out, mode="clip")

    def rows(self, indices: Tensor) -> Tensor:
        """Activations [n, d], in the stored dtype, of rows [n] int64 that are within the shard."""
        rows = torch.empty(len(indices), self._width, dtype=self._dtype)
        self.gather(indices.numpy(), rows.view(torch.uint8).numpy())
        return rows

    def column(self, name: str) -> np.ndarray:
        """One column of the metadata, [rows]."""
        with _reading(self._metadata):
            # Not read_table: that would take a folder called "layer=15" for a column.
            column = pq.ParquetFile(self._metadata).read(columns=[name])[name].to_numpy()
        if len(column) != len(self):
            raise files.damaged(self._metadata, f"its column {name!r} holds {len(column)} rows")
        return column


class ActivationStore:
    """A recorded store, also one that is still being written: it holds what the manifest listed when it was opened.

    Shards are memory-mapped, so opening costs no memory and rows are read as they are asked for: ``store[5]`` is one
    activation [d], ``store[10:20]``, ``store[[3, 1]]`` and ``store[mask]`` are several [n, d], in the stored precision.
    Negative numbers count from the end. A loop over single rows is slow: take slices, `batches` or a `dataset`.

    Examples:
        >>> store = lp.ActivationStore("runs/acts")
        >>> store[-1].shape == (store.width,), store[10:20].shape == (10, store.width)
        (True, True)
        >>> loader = torch.utils.data.DataLoader(store.dataset(), batch_size=16, shuffle=True)
        >>> next(iter(loader)).shape == (16, store.width)
        True
    """

    def __init__(self, folder: str | Path, verify: Literal["size", "full"] = "size") -> None:
        """Open and check a store: "size" checks the files' sizes and headers, "full" reads all for their SHA-256."""
        if verify not in ("size", "full"):
            raise unknown("verify", verify, ("size", "full"))
        self.folder = Path(folder)
        self.manifest = files.read_manifest(self.folder)
        self.hookpoints = files.read_hookpoints(self.folder, self.manifest)
        self.layers = tuple(hookpoint.layer for hookpoint in self.hookpoints)
        self.width: int = self.manifest["width"]
        self.dtype = files.DTYPES[self.manifest["dtype"]]
        shards, checksum = self.manifest["shards"], verify == "full"
        files.verified_file(self.folder, self.manifest["statistics"], checksum=checksum)
        self._shards = [Shard(self.folder, shard, self.width, self.dtype, checksum=checksum) for shard in shards]
        self._starts = np.array([0, *itertools.accumulate(shard["rows"] for shard in shards)])
        self._columns: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self.manifest["rows"]

    def __repr__(self) -> str:
        place = f"{self.hookpoints[0].model or 'some model'} layers {list(self.layers)}"
        return f"ActivationStore({str(self.folder)!r}: {place}, {self.manifest['dtype']} [{len(self)}, {self.width}])"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor | np.ndarray) -> Tensor:
        if isinstance(index, slice):
            return self.rows(torch.arange(*index.indices(len(self))) if len(self) else torch.arange(0))
        rows = torch.as_tensor(index)
        if rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise IndexError(f"a mask of shape {list(rows.shape)} does not fit a store of {len(self)} rows")
            rows = rows.nonzero().squeeze(1)
        if rows.ndim > 1 or rows.is_floating_point() and rows.numel():
            raise IndexError(f"rows are an integer, a slice, or integers or a mask [n], got {rows.dtype}")
        rows = rows.long()
        found = self.rows(torch.where(rows < 0, rows + len(self), rows).reshape(-1))
        return found[0] if rows.ndim == 0 else found

    def dataset(self, layers: Sequence[int] | None = None) -> ActivationDataset:
        """A torch dataset of the store's rows, or of those of `layers`, for a `DataLoader`."""
        return ActivationDataset(self, layers)

    def moments(self) -> Moments:
        """Moments of all rows for each layer, also of those that a disk budget has removed since."""
        if self._statistics is None:  # read once: a recorder that goes on replaces the file
            path = files.verified_file(self.folder, self.manifest["statistics"], checksum=True)
            with _reading(path):
                moments = Moments.from_state_dict(load_file(path))
            rows = len(self) + self.manifest["evicted"]
            if moments.layers != self.layers or moments.width != self.width or moments.count.sum() != rows:
                raise files.damaged(path, "it does not belong to these shards")
            self._statistics = moments.state_dict()
        return Moments.from_state_dict(self._statistics)

    def rows(self, indices: Tensor) -> Tensor:
        """Activations [n, d] in the stored dtype of row numbers [n] int64, in any order."""
        self._check_indices(indices)
        wanted = indices.numpy()
        order = wanted.argsort()
        ordered = wanted[order]
        gathered = np.empty((len(wanted), self.width * self.dtype.itemsize), np.uint8)
        # NumPy, not torch: as fast on one thread, and no pool of threads to wait for where cores are shared.
        cuts = itertools.pairwise(ordered.searchsorted(self._starts).tolist())
        for shard, start, (a, b) in zip(self._shards, self._starts[:-1].tolist(), cuts, strict=True):
            if a < b:
                shard.gather(ordered[a:b] - start, out=gathered[a:b])
        rows = torch.empty(len(wanted), self.width, dtype=self.dtype)
        rows.view(torch.uint8).numpy()[order] = gathered
        return rows

    def metadata(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Layer, document, position and token, each [n] int64, of rows [n] int64."""
        self._check_indices(indices)
        names = ("layer", "doc", "position", "token")
        layer, doc, position, token = (self._column(name)[indices].long() for name in names)
        return layer, doc, position, token

    def batch(self, indices: Tensor) -> ActivationBatch:
        """Rows [n] int64 and their metadata, as recorded."""
        return ActivationBatch(self.rows(indices), *self.metadata(indices))

    def hookpoints_at(self, layers: Sequence[int]) -> tuple[Hookpoint, ...]:
        """The hookpoints of `layers`, in the store's order; all of them if none is named."""
        check_recorded(layers, self.layers)
        return tuple(hookpoint for hookpoint in self.hookpoints if not layers or hookpoint.layer in layers)

    def rows_at(self, layers: Sequence[int]) -> Tensor:
        """Numbers [n] int64 of the rows of `layers`, in the store's order."""
        check_recorded(layers, self.layers)
        if set(layers) == set(self.layers):
            return torch.arange(len(self))
        return torch.isin(self._column("layer"), torch.tensor(list(layers))).nonzero().squeeze(1)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        drop_last: bool = True,
        own: Tensor | None = None,
        layers: Sequence[int] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Shuffled batches without end, one permutation of all rows for each epoch.

        Yields x [B, d] in the stored dtype and layer [B] int64, or None for rows of one layer. The stream is a
        function of `seed` alone: `start=k` continues exactly where an iterator stopped after `k` batches, and nothing
        that is skipped is read. A permutation takes 8 bytes for each row of the store.

        Args:
            drop_last: leave out the short batch at the end of an epoch.
            own: places [b] within each batch; only these rows are read, as by one of several processes.
        """
        if batch_size < 1 or start < 0:
            raise InputError(f"batches need batch_size >= 1 and start >= 0, got {batch_size} and {start}")
        layers = self.layers if layers is None else layers
        rows = None if set(layers) == set(self.layers) else self.rows_at(layers)
        count = len(self) if rows is None else len(rows)
        per_epoch = count // batch_size if drop_last else -(-count // batch_size)
        if not per_epoch:
            of = "" if rows is None else f" of layers {list(layers)}"
            raise InputError(f"{self.folder} holds {count} rows{of}, less than one batch of {batch_size}")
        layer = self._column("layer") if len(layers) > 1 else None

        def drawn() -> Iterator[tuple[Tensor, Tensor | None]]:
            first_epoch, first = divmod(start, per_epoch)
            for epoch in itertools.count(first_epoch):
                order = torch.randperm(count, generator=keyed_generator(seed, epoch))
                order = order if rows is None else rows[order]
                for indices in order.split(batch_size)[first:per_epoch]:
                    indices = indices if own is None else indices[own]
                    yield self.rows(indices), None if layer is None else layer[indices].long()
                first = 0

        return drawn()

    def _check_indices(self, indices: Tensor) -> None:
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < len(self)):
            raise IndexError(f"row {int(indices.max())} or {int(indices.min())} is not in a store of {len(self)} rows")

    def _column(self, name: str) -> Tensor:
        if name not in self._columns:
            column = np.empty(len(self), files.COLUMNS[name])
            for shard, (a, b) in zip(self._shards, itertools.pairwise(self._starts.tolist()), strict=True):
                column[a:b] = shard.column(name)
            self._columns[name] = torch.from_numpy(column)
        return self._columns[name]


def folder_of(store: ActivationStore | str | Path) -> str:
    """The folder of a store, or of one that is named by it."""
    return str(store.folder if isinstance(store, ActivationStore) else store)


class ActivationDataset(Dataset[Any]):
    """A map-style torch dataset of a store's rows: item i is an activation [d], in the stored precision.

    Of a store of several layers, or with several of its `layers` chosen, an item is the pair of activation and layer
    number. `DataLoader` fetches each batch in one gather.
    """

    def __init__(self, store: ActivationStore, layers: Sequence[int] | None = None) -> None:
        self.store = store
        self.layers = store.layers if layers is None else tuple(layers)
        self._rows = store.rows_at(self.layers)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} is not in a dataset of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        rows = self._rows[list(indices)]
        x = self.store.rows(rows)
        return list(x) if len(self.layers) == 1 else list(zip(x, self.store.metadata(rows)[0].tolist(), strict=True))
