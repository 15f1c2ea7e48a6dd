"""Activations on disk: a folder of shards and a manifest, written so that no kill or full disk can damage it.

Every file is written under a temporary name, fsynced and renamed; a shard counts once the manifest, replaced last,
lists it. A shard holds whole token batches only, so an interrupted recording resumes from `next_batch` and ends in
the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from latentprior import manifest as files
from latentprior.activations import ActivationBatch
from latentprior.errors import InputError, unknown
from latentprior.hooks import Hookpoint
from latentprior.moments import Moments

_COLUMNS = {"doc": np.int64, "position": np.int32, "token": np.int32, "layer": np.int32}
_READ_ERRORS = (SafetensorError, pa.ArrowException, OSError, ValueError)


class ActivationStore:
    """A recorded store, also one that is still being written: it holds what the manifest listed when it was opened.

    Shards are memory-mapped, so opening costs no memory and rows are read as they are asked for.

    Attributes:
        folder: where it lies.
        manifest: the parsed manifest.
        hookpoints: where each layer was recorded.
        layers: their layer numbers.
        width: d, dimensions of an activation.
        dtype: storage precision.
    """

    def __init__(self, folder: str | Path, verify: Literal["size", "full"] = "size") -> None:
        """Open and check a store.

        Args:
            folder: the store.
            verify: "size" checks that all files are there, their sizes and headers; "full" their SHA-256 too,
                which reads everything.

        Raises:
            InputError: no store, a newer format, or a missing or damaged file, which is named.
        """
        if verify not in ("size", "full"):
            raise unknown("verify", verify, ("size", "full"))
        self.folder = Path(folder)
        self.manifest = files.read_manifest(self.folder)
        self.hookpoints = files.read_hookpoints(self.folder, self.manifest)
        self.layers = tuple(hookpoint.layer for hookpoint in self.hookpoints)
        self.width: int = self.manifest["width"]
        self.dtype = files.DTYPES[self.manifest["dtype"]]
        shards, checksum = self.manifest["shards"], verify == "full"
        files.check_file(self.folder, self.manifest["statistics"], checksum=checksum)
        self._activations = [self._open_activations(shard, checksum) for shard in shards]
        self._metadata = [self._open_metadata(shard, checksum) for shard in shards]
        self._starts = np.array([0, *itertools.accumulate(shard["rows"] for shard in shards)])
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Rows."""
        return self.manifest["rows"]

    def _open_activations(self, shard: dict[str, Any], checksum: bool) -> np.ndarray:
        """The bytes of each row, [rows, bytes], mapped into memory and not read yet."""
        path = files.check_file(self.folder, shard["activations"], checksum=checksum)
        try:
            with safe_open(path, "pt") as file:
                activations = file.get_tensor("activations")
        except _READ_ERRORS as error:
            raise files.damaged(path, error) from error
        expected = (shard["rows"], self.width)
        if activations.shape != expected or activations.dtype != self.dtype:
            found = f"{activations.dtype} {list(activations.shape)}"
            raise files.damaged(path, f"it holds {found}, not {self.dtype} {list(expected)}")
        return activations.view(torch.uint8).numpy()

    def _open_metadata(self, shard: dict[str, Any], checksum: bool) -> Path:
        path = files.check_file(self.folder, shard["metadata"], checksum=checksum)
        try:
            footer = pq.read_metadata(path)
            rows, columns = footer.num_rows, {footer.schema.column(i).name for i in range(footer.num_columns)}
        except _READ_ERRORS as error:
            raise files.damaged(path, error) from error
        if rows != shard["rows"] or not columns >= _COLUMNS.keys():
            raise files.damaged(path, f"it holds {rows} rows of {sorted(columns)}")
        return path

    def moments(self) -> Moments:
        """Moments of all rows, for each layer.

        Raises:
            InputError: the statistics are damaged or belong to other rows.
        """
        path = files.check_file(self.folder, self.manifest["statistics"], checksum=True)
        try:
            moments = Moments.from_state_dict(load_file(path))
        except _READ_ERRORS as error:
            raise files.damaged(path, error) from error
        if moments.layers != self.layers or moments.width != self.width or moments.count.sum() != len(self):
            raise files.damaged(path, "it does not belong to these shards")
        return moments

    def rows(self, indices: Tensor) -> Tensor:
        """Activations by row number: one gather from each shard concerned, then one to restore the order.

        Args:
            indices: [n] int64, in any order.

        Returns:
            [n, d] in the stored dtype.

        Raises:
            IndexError: an index outside the store.
        """
        self._check_indices(indices)
        wanted = indices.numpy()
        order = wanted.argsort()
        ordered = wanted[order]
        gathered = np.empty((len(wanted), self.width * self.dtype.itemsize), np.uint8)
        # NumPy, not torch: as fast on one thread, and no pool of threads to wait for where cores are shared.
        cuts = itertools.pairwise(ordered.searchsorted(self._starts).tolist())
        for shard, start, (a, b) in zip(self._activations, self._starts[:-1].tolist(), cuts, strict=True):
            if a < b:  # the indices are checked, and the mode "raise" would copy once more
                shard.take(ordered[a:b] - start, axis=0, out=gathered[a:b], mode="clip")
        rows = torch.empty(len(wanted), self.width, dtype=self.dtype)
        rows.view(torch.uint8).numpy()[order] = gathered
        return rows

    def metadata(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Layer, document, position and token of rows.

        Args:
            indices: [n] int64.

        Returns:
            four [n] int64 tensors: layer, doc, position, token.

        Raises:
            IndexError: an index outside the store.
            InputError: a damaged file.
        """
        self._check_indices(indices)
        layer, doc, position, token = (
            self._column(name)[indices].long() for name in ("layer", "doc", "position", "token")
        )
        return layer, doc, position, token

    def batch(self, indices: Tensor) -> ActivationBatch:
        """Rows and their metadata, as recorded.

        Args:
            indices: [n] int64.

        Raises:
            IndexError: an index outside the store.
            InputError: a damaged file.
        """
        layer, doc, position, token = self.metadata(indices)
        return ActivationBatch(x=self.rows(indices), layer=layer, doc=doc, position=position, token=token)

    def batches(
        self, batch_size: int, *, seed: int = 0, start: int = 0, drop_last: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Shuffled batches without end, one permutation of all rows for each epoch.

        The stream is a function of `seed` alone: `start=k` continues exactly where an iterator stopped after `k`
        batches, and nothing that is skipped is read. A permutation takes 8 bytes for each row of the store.

        Args:
            batch_size: rows in a batch, B.
            seed: of the permutations.
            start: batches to skip.
            drop_last: leave out the short batch at the end of an epoch.

        Yields:
            x [B, d] in the stored dtype and layer [B] int64, or None for a store of one layer.

        Raises:
            InputError: a store smaller than one batch, or a negative `start`.
        """
        if batch_size < 1 or start < 0:
            raise InputError(f"batches need batch_size >= 1 and start >= 0, got {batch_size} and {start}")
        per_epoch = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        if not per_epoch:
            raise InputError(f"{self.folder} holds {len(self)} rows, less than one batch of {batch_size}")
        return self._batches(batch_size, seed, start, per_epoch)

    def _batches(
        self, batch_size: int, seed: int, start: int, per_epoch: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        layer = self._column("layer") if len(self.layers) > 1 else None
        first_epoch, first = divmod(start, per_epoch)
        for epoch in itertools.count(first_epoch):
            order = torch.randperm(len(self), generator=_epoch_generator(seed, epoch))
            for indices in order.split(batch_size)[first:per_epoch]:
                yield self.rows(indices), None if layer is None else layer[indices].long()
            first = 0

    def _check_indices(self, indices: Tensor) -> None:
        if len(indices) and not (0 <= int(indices.min()) and int(indices.max()) < len(self)):
            raise IndexError(f"row {int(indices.max())} or {int(indices.min())} is not in a store of {len(self)} rows")

    def _column(self, name: str) -> Tensor:
        if name not in self._columns:
            column = np.empty(len(self), _COLUMNS[name])
            for path, (a, b) in zip(self._metadata, itertools.pairwise(self._starts.tolist()), strict=True):
                try:
                    # Not read_table: that would take a folder called "layer=15" for a column.
                    column[a:b] = pq.ParquetFile(path).read(columns=[name])[name].to_numpy()
                except _READ_ERRORS as error:
                    raise files.damaged(path, error) from error
            self._columns[name] = torch.from_numpy(column)
        return self._columns[name]


class StoreWriter:
    """Writes a store, or continues one.

    As a context manager it closes the store when the block ends well; an exception leaves it incomplete, to be
    resumed. Rows not yet in a shard are lost then, and recorded again from `next_batch` on.

    Attributes:
        moments: of all rows appended; its `median_norm` may be set, and is stored.
        sink_thresholds: norm over which rows of a layer were left out. Set it before the first `append`; after a
            resume it is what the store says, so that both parts leave out the same rows.
        next_batch: index of the first token batch that has not been appended.
    """

    def __init__(
        self,
        folder: str | Path,
        hookpoints: Sequence[Hookpoint],
        *,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        shard_rows: int = 65536,
        source: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        """Start or continue a store.

        Args:
            folder: made if it is not there.
            hookpoints: one for each layer, all of one width.
            dtype: storage precision. float16 is refused: activations overflow it.
            shard_rows: a shard is cut once it holds at least this many rows.
            source: what the rows come from, as JSON values: the resolved config, without what may differ between
                the first run and a resumed one.
            resume: continue the store in `folder`, if there is one.

        Raises:
            InputError: the folder holds a store and `resume` is off, or that store was recorded with other
                settings (the first difference is named, nothing is touched), or is damaged.
        """
        self._settings = files.settings(hookpoints, dtype, shard_rows, source)
        self.folder = Path(folder)
        if (self.folder / files.MANIFEST).exists():
            if not resume:
                raise InputError(f"{self.folder} holds an activation store: add --resume, or choose another folder")
            store = ActivationStore(self.folder)
            stored = {key: store.manifest[key] for key in files.SETTINGS}
            if difference := next(files.differences(stored, self._settings), None):
                raise InputError(f"cannot resume {self.folder}: {difference}")
            self._manifest, self.moments = store.manifest, store.moments()
        else:
            self._manifest = files.empty_manifest(self._settings)
            self.moments = Moments([hookpoint.layer for hookpoint in hookpoints], hookpoints[0].width)
        self.sink_thresholds = {int(layer): norm for layer, norm in self._manifest["sink_thresholds"].items()}
        self.next_batch: int = self._manifest["next_batch"]
        self._left_out: dict[str, int] = dict(self._manifest["left_out"])
        self._pending: list[ActivationBatch] = []
        self._closed = self.complete
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.unwritable(self.folder, error) from error
        self._remove_leftovers()

    @property
    def complete(self) -> bool:
        """Nothing is left to be done."""
        return self._manifest["complete"]

    @property
    def _pending_rows(self) -> int:
        return sum(len(batch) for batch in self._pending)

    @property
    def rows(self) -> int:
        """Rows appended, those of earlier runs included."""
        return self._manifest["rows"] + self._pending_rows

    def append(self, batch: ActivationBatch, *, next_batch: int, left_out: Mapping[str, int]) -> None:
        """Add the rows of a token batch; a shard is cut when enough are there.

        Args:
            batch: its rows, all finite; may be empty.
            next_batch: index of the token batch that comes next.
            left_out: how many of its rows were left out: "sinks", "nonfinite".

        Raises:
            InputError: rows of another width or layer, a value that is not finite, a token batch that is stored
                already, a closed store, or a file that cannot be written (a full disk).
        """
        if self._closed:
            raise InputError(f"{self.folder} is closed: nothing can be appended")
        if next_batch <= self.next_batch:
            raise InputError(f"{self.folder} already holds the token batches before {self.next_batch}")
        for key in left_out:
            if key not in files.LEFT_OUT:
                raise unknown("reason to leave rows out", key, files.LEFT_OUT)
        stored = self._as_stored(batch)
        self.moments.update(stored.x, stored.layer)
        if len(stored):
            self._pending.append(stored)
        self.next_batch = next_batch
        for key, count in left_out.items():
            self._left_out[key] += count
        if self._pending_rows >= self._settings["shard_rows"]:
            self._commit(f"statistics-{len(self._manifest['shards']):05d}.safetensors")

    def close(self) -> None:
        """Store the remaining rows and mark the store complete. Does nothing on a closed one.

        Raises:
            InputError: a file that cannot be written (a full disk).
        """
        if not self._closed:
            self._commit(files.STATISTICS)
            self._closed = True

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._closed = True

    def _as_stored(self, batch: ActivationBatch) -> ActivationBatch:
        x = batch.x.detach().to("cpu", files.DTYPES[self._settings["dtype"]], copy=True).contiguous()
        if not x.isfinite().all():
            raise InputError("activations to be stored are not finite: leave such rows out and count them")
        return ActivationBatch(
            x=x, layer=batch.layer.cpu(), doc=batch.doc.cpu(), position=batch.position.cpu(), token=batch.token.cpu()
        )

    def _commit(self, statistics: str) -> None:
        """Make everything appended visible: shard, statistics under a new name, then the manifest that lists both."""
        self._closed, rows = True, self.rows  # open again only if all goes well: `_pending` must not be stored twice
        shards = list(self._manifest["shards"])
        if self._pending:
            shards.append(self._write_shard(f"shard-{len(shards):05d}"))
        manifest = self._manifest | {
            "rows": rows,
            "left_out": dict(self._left_out),
            "sink_thresholds": {str(layer): norm for layer, norm in self.sink_thresholds.items()},
            "next_batch": self.next_batch,
            "complete": statistics == files.STATISTICS,
            "shards": shards,
            "statistics": files.write_file(self.folder / statistics, [save(self.moments.state_dict())]),
        }
        files.write_manifest(self.folder, manifest)
        self._manifest, self._pending, self._closed = manifest, [], False
        self._remove_leftovers()

    def _write_shard(self, name: str) -> dict[str, Any]:
        rows, width = self._pending_rows, self.moments.width
        columns = {
            column: pa.array(
                np.concatenate([getattr(batch, column).numpy() for batch in self._pending]), pa.from_numpy_dtype(kind)
            )
            for column, kind in _COLUMNS.items()
        }
        parquet = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), parquet, compression="zstd")
        data = [batch.x.view(torch.uint8).numpy().data for batch in self._pending]
        size = sum(part.nbytes for part in data)
        header = files.safetensors_header("activations", self._settings["dtype"], [rows, width], size)
        return {
            "rows": rows,
            "activations": files.write_file(self.folder / f"{name}.safetensors", [header, *data]),
            "metadata": files.write_file(self.folder / f"{name}.parquet", [memoryview(parquet.getvalue())]),
        }

    def _remove_leftovers(self) -> None:
        for pattern in ("shard-*.tmp", "statistics*.tmp", f"{files.MANIFEST}.tmp", "statistics-*.safetensors"):
            for path in self.folder.glob(pattern):
                if path.name != self._manifest["statistics"].get("file"):
                    path.unlink(missing_ok=True)


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """One for each pair: neighbouring seeds and epochs give unrelated permutations."""
    state = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
