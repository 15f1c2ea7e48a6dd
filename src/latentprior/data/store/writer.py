"""Writing activations to disk, so that no kill or full disk can damage the store, within a budget.

A shard counts once the manifest, replaced last, lists it. It holds whole token batches only, so a killed recording
resumes from `next_batch` and ends in the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from latentprior.data.activations import ActivationBatch
from latentprior.data.moments import Moments
from latentprior.data.store import backpressure
from latentprior.data.store import manifest as files
from latentprior.data.store.reader import ActivationStore
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import PARTIAL, check_folder
from latentprior.utils.settings import check_settings

POLL = 0.2  # seconds before the second look for a release


class StoreWriter:
    """Writes a store, or continues one.

    As a context manager it closes the store when the block ends well; an exception leaves it incomplete, to be resumed
    from `next_batch` on: rows not yet in a shard are lost then. A full disk or budget is an `InputError`; the shards
    before are good.

    Attributes:
        moments: of all rows appended; its `median_norm` may be set, and is stored.
        sink_thresholds: norm over which rows of a layer were left out; set before the first `append`, kept by a resume.
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
        budget: int | None = None,
        wait_seconds: float | None = None,
        batch_rows: int = 1,
    ) -> None:
        """Start or continue a store.

        Args:
            hookpoints: one for each layer, all of one width.
            dtype: float16 is refused: activations overflow it.
            shard_rows: a shard is cut once it holds at least this many rows.
            source: what the rows come from, as JSON values, without what may differ in a resumed run.
            resume: continue the store in `folder`, if there is one, was recorded with the same settings and is whole.
            budget: most bytes of all shards together, None for no limit. Where a new shard would exceed it, the oldest
                ones are removed first.
            wait_seconds: remove only shards that a trainer has released (`latentprior.follow`), and wait this long for
                the next release; None removes shards whether they were read or not.
            batch_rows: most rows of one `append`, by which a shard can exceed `shard_rows`.
        """
        self._settings = files.settings(hookpoints, dtype, shard_rows, source)
        self._budget, self._wait_seconds = budget, wait_seconds
        least = 2 * files.most_bytes(self._settings, shard_rows + batch_rows - 1)
        if budget is not None and budget < least:
            raise InputError(
                f"a disk budget of {budget:,} bytes does not hold two shards, which take up to {least:,}: "
                "raise it or lower shard_rows"
            )
        self.folder = Path(folder)
        check_folder(self.folder)
        if (self.folder / files.MANIFEST).exists():
            if not resume:
                raise holds_a_store(self.folder)
            store = ActivationStore(self.folder)
            stored = {key: store.manifest[key] for key in files.SETTINGS}
            check_settings(self.folder, "an activation store", stored, self._settings)
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
        remove_leftovers(self.folder, self._manifest)

    @property
    def complete(self) -> bool:
        return self._manifest["complete"]

    @property
    def _pending_rows(self) -> int:
        return sum(len(batch) for batch in self._pending)

    @property
    def rows(self) -> int:
        """Rows appended, also by earlier runs, and also those removed since."""
        return self._manifest["evicted"] + self._manifest["rows"] + self._pending_rows

    @property
    def _next_shard(self) -> int:
        return self._manifest["first_shard"] + len(self._manifest["shards"])

    def append(self, batch: ActivationBatch, *, next_batch: int, left_out: Mapping[str, int]) -> None:
        """Add the rows, all finite, of the token batch before `next_batch`; a shard is cut when enough are there.

        `left_out` counts what is not among them, by the names of `manifest.LEFT_OUT`.
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
            self._commit()

    def flush(self) -> None:
        """Store the rows that are not in a shard yet, in one of their own. A kill after this loses none of them."""
        if self._pending and not self._closed:
            self._commit()

    def close(self) -> None:
        """Store the remaining rows and mark the store complete. Does nothing on a closed one."""
        if not self._closed:
            self._commit(complete=True)
            self._closed = True

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._closed = True

    def _as_stored(self, batch: ActivationBatch) -> ActivationBatch:
        x = batch.x.detach().to("cpu", files.DTYPES[self._settings["dtype"]], copy=True).contiguous()
        if not x.isfinite().all():
            raise InputError("activations to be stored are not finite: leave such rows out and count them")
        return ActivationBatch(x, batch.layer.cpu(), batch.doc.cpu(), batch.position.cpu(), batch.token.cpu())

    def _commit(self, complete: bool = False) -> None:
        """Make everything appended visible: shard, statistics under a new name, then the manifest that lists both."""
        self._closed = True  # open again only if all goes well: `_pending` must not be stored twice
        statistics = files.STATISTICS if complete else f"statistics-{self._next_shard:05d}.safetensors"
        new = [self._write_shard()] if self._pending else []
        self._replace_manifest(
            rows=self._manifest["rows"] + self._pending_rows,
            left_out=dict(self._left_out),
            sink_thresholds={str(layer): norm for layer, norm in self.sink_thresholds.items()},
            next_batch=self.next_batch,
            complete=complete,
            shards=self._manifest["shards"] + new,
            statistics=files.write_file(self.folder / statistics, [save(self.moments.state_dict())]),
        )
        self._pending, self._closed = [], False
        remove_leftovers(self.folder, self._manifest)

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = self._manifest | changes
        files.write_file(self.folder / files.MANIFEST, [json.dumps(manifest, indent=1).encode()])
        self._manifest = manifest

    def _write_shard(self) -> dict[str, Any]:
        rows, width = self._pending_rows, self.moments.width
        columns = {}
        for name, kind in files.COLUMNS.items():
            column = np.concatenate([getattr(batch, name).numpy() for batch in self._pending])
            columns[name] = pa.array(column, pa.from_numpy_dtype(kind))
        parquet = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), parquet, compression="zstd")
        data = [batch.x.view(torch.uint8).numpy().data for batch in self._pending]
        size = sum(part.nbytes for part in data)
        header = files.safetensors_header("activations", self._settings["dtype"], [rows, width], size)
        metadata = memoryview(parquet.getvalue())
        self._make_room(len(header) + size + metadata.nbytes)
        name = f"shard-{self._next_shard:05d}"
        return {
            "rows": rows,
            "activations": files.write_file(self.folder / f"{name}.safetensors", [header, *data]),
            "metadata": files.write_file(self.folder / f"{name}.parquet", [metadata]),
        }

    def _make_room(self, size: int) -> None:
        """Remove as many of the oldest shards as it takes for `size` more bytes to fit the budget."""
        if self._budget is None:
            return
        sizes = [shard["activations"]["bytes"] + shard["metadata"]["bytes"] for shard in self._manifest["shards"]]
        freed = [0, *itertools.accumulate(sizes)]
        count = bisect_left(freed, freed[-1] + size - self._budget)
        # A trainer can need the last shard until it has the next one: waiting for it to go could be for ever.
        if count > len(sizes) or (self._wait_seconds is not None and 0 < count == len(sizes)):
            raise InputError(
                f"a disk budget of {self._budget:,} bytes does not hold two shards of {size:,}: "
                "raise it and continue with --resume"
            )
        if count:
            if self._wait_seconds is not None:
                self._wait_for_release(self._manifest["first_shard"] + count, self._wait_seconds)
            self._evict(count)

    def _wait_for_release(self, needed: int, seconds: float) -> None:
        """Wait until a trainer has released all shards before number `needed`, each within `seconds`."""
        released = backpressure.read_consumed(self.folder)
        while released < needed:
            before = released
            with backpressure.waiting(self.folder):
                for _ in backpressure.polling(seconds, POLL):
                    if (released := backpressure.read_consumed(self.folder)) != before:
                        break
                else:
                    raise InputError(
                        f"the disk budget of {self.folder} is used up and no trainer has released a shard for "
                        f"{seconds:g} seconds: continue with --resume"
                    )

    def _evict(self, count: int) -> None:
        """Remove the oldest shards, the manifest's entries first: a kill in between leaves files that nobody lists."""
        shards = self._manifest["shards"]
        rows = sum(shard["rows"] for shard in shards[:count])
        self._replace_manifest(
            rows=self._manifest["rows"] - rows,
            evicted=self._manifest["evicted"] + rows,
            first_shard=self._manifest["first_shard"] + count,
            shards=shards[count:],
        )
        remove_leftovers(self.folder, self._manifest)


def remove_leftovers(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what a kill left behind in a store and what its manifest no longer lists."""
    patterns = ["statistics-*.safetensors"]
    for ending in (PARTIAL, ".tmp"):  # older versions wrote under the latter
        patterns += [f"shard-*{ending}", f"statistics*{ending}", f"{files.MANIFEST}{ending}"]
    if manifest["statistics"]:  # else the folder has no manifest yet, and its shards are somebody else's
        patterns += ["shard-*.safetensors", "shard-*.parquet", files.STATISTICS, backpressure.WAITING]
    listed = files.listed_files(manifest)
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns):
        if path.name not in listed:
            path.unlink(missing_ok=True)


def holds_a_store(folder: str | Path) -> InputError:
    """The error for a folder with a store that is not to be continued."""
    return InputError(f"{folder} holds an activation store: add --resume, or choose another folder")
