"""Reader and writer of the official implementation's activation folders, as plain tensors.

A folder holds headerless memory maps (``data_0000.npy`` and so on), the place of each row in them
(``data_indices.npy``), the storage type (``dtype.txt``) and mean and variance (``rep_statistics.pt``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.data.moments import Moments
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_text, replaced

STATISTICS = "rep_statistics.pt"
INDEX = "data_indices.npy"
DTYPE = "dtype.txt"
STORED_AS = {"int16": torch.bfloat16, "float16": torch.float32, "float32": torch.float32}  # dtype.txt -> dtype of rows
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, eq=False)
class OfficialActivations:
    """An official activation folder, read from memory maps; made by `read_activations`."""

    folder: Path
    width: int  # d of the activations
    layer: int | None  # of the language model, if the folder is named ``layer_NN``
    dtype: torch.dtype  # of the rows: bfloat16 for stored bfloat16 bits, float32 for everything else
    _storage: np.dtype = field(repr=False)
    _index: np.ndarray = field(repr=False)  # [N, 3] int64: file, start, end in elements
    _maps: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self._index)

    def rows(self, indices: Sequence[int] | Int[Tensor, " n"] | np.ndarray) -> Float[Tensor, "n d"]:
        """Activations in the order of `indices`, repeats allowed; one gather for each file."""
        wanted = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        if wanted.size and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise InputError(f"{self.folder} has rows 0 to {len(self) - 1}, asked for {wanted.min()} to {wanted.max()}")
        file, start = self._index[wanted, 0], self._index[wanted, 1]
        gathered = np.empty((len(wanted), self.width), self._storage)
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            gathered[here] = self._windows(number)[start[here]]
        out = torch.from_numpy(gathered)
        return out.view(self.dtype) if self._storage == np.int16 else out.to(self.dtype)

    def _windows(self, number: int) -> np.ndarray:
        """All runs of `width` elements of a file [n, d], without a copy: row s begins at element s."""
        if number not in self._maps:
            flat = np.asarray(np.memmap(_data_file(self.folder, number), self._storage, mode="r"))
            self._maps[number] = np.lib.stride_tricks.sliding_window_view(flat, self.width)
        return self._maps[number]


def read_activations(folder: str | Path) -> OfficialActivations:
    """Open an official activation folder; every row's place is checked, no row is read."""
    folder = Path(folder)
    path = folder / DTYPE
    if not path.is_file():
        raise InputError(f"{path} is missing")
    name = path.read_text(errors="replace").strip().removeprefix("np.")  # the official code writes both
    if name not in STORED_AS:
        raise unknown(f"storage type in {path}:", name, STORED_AS)
    storage = np.dtype(name)
    index = _read_index(folder / INDEX)
    width = _check_index(folder, index, storage)
    layer = re.search(r"layer_(\d+)", folder.resolve().name)
    return OfficialActivations(folder, width, int(layer[1]) if layer else None, STORED_AS[storage.name], storage, index)


def write_activations(
    folder: str | Path,
    x: Float[Tensor, "n d"] | Iterable[Float[Tensor, "_ d"]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    file_rows: int = 2**18,
) -> Path:
    """Write activations, or parts of them, as an official activation folder with the statistics of all rows.

    Name it ``layer_NN`` for the layer to be known; `dtype` is bfloat16 or float32.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise unknown("storage type", str(dtype).removeprefix("torch."), ("bfloat16", "float32"))
    if file_rows < 1 or isinstance(x, Tensor) and not len(x):
        raise InputError(f"nothing to write: no activations, or {file_rows} in a file")
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise InputError(f"{folder} holds activations already")
    folder.mkdir(parents=True, exist_ok=True)
    moments, rows = None, 0
    for part in [x] if isinstance(x, Tensor) else x:
        stored = part.detach().cpu().to(dtype).contiguous()
        moments = moments or Moments([0], stored.shape[1])
        moments.update(stored)
        _append(folder, stored, rows, file_rows)
        rows += len(stored)
    if moments is None or not rows:
        raise InputError("nothing to write: no activations")
    replace_text(folder / DTYPE, "int16\n" if dtype == torch.bfloat16 else "float32\n")
    with replaced(folder / STATISTICS) as partial:
        torch.save({"mean": moments.mean[0].float(), "var": moments.variance()[0].float()}, partial)
    file, row = np.divmod(np.arange(rows), file_rows)
    index = np.stack([file, row * moments.width, (row + 1) * moments.width], axis=1).astype(np.uint64)
    with replaced(folder / INDEX) as partial, partial.open("wb") as handle:  # last: it can be read from here on
        np.save(handle, index)  # given a name, it would append an ending
    return folder


def _append(folder: Path, stored: Tensor, rows: int, file_rows: int) -> None:
    """Write activations [n, d] behind the `rows` that are there."""
    bits = (stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored).numpy()
    while len(bits):
        number, used = divmod(rows, file_rows)
        fitting = bits[: file_rows - used]
        with _data_file(folder, number).open("ab" if used else "wb") as file:
            fitting.tofile(file)
        rows, bits = rows + len(fitting), bits[len(fitting) :]


def read_statistics(path: Path, width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, [layers, d] each, whether saved as [d], [1, d], [1, 1, d] or [layers, d]."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged or hostile pickles raise errors of nearly every type
        raise InputError(f"{path} is damaged or no plain dictionary of tensors (others are never loaded)") from error
    match loaded:
        case {"mean": Tensor() as mean, "var": Tensor() as var}:
            pass
        case _:
            raise InputError(f"{path} holds no tensors 'mean' and 'var'")
    if mean.shape != var.shape or mean.ndim == 0 or mean.numel() == 0 or mean.shape[-1] != width:
        raise InputError(f"{path}: mean {tuple(mean.shape)} and var {tuple(var.shape)} do not fit width {width}")
    if not (mean.is_floating_point() and var.is_floating_point()):
        raise InputError(f"{path}: mean and var must be floating point, got {mean.dtype} and {var.dtype}")
    return mean.detach().reshape(-1, width), var.detach().reshape(-1, width)


def _data_file(folder: Path, number: int) -> Path:
    return folder / f"data_{number:04d}.npy"


def _read_index(path: Path) -> np.ndarray:
    """Rows' places [N, 3] int64 from uint64, with a header (as np.save writes it) or without."""
    try:
        with path.open("rb") as file:
            has_header = file.read(len(NPY_MAGIC)) == NPY_MAGIC
        index = np.load(path, mmap_mode="r") if has_header else np.fromfile(path, np.uint64).reshape(-1, 3)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no index of rows: {shorten(str(error), 300)}") from error
    if index.ndim != 2 or index.shape[1] != 3 or index.dtype.kind not in "iu":
        raise InputError(f"{path} is no index of rows: {index.dtype} of shape {index.shape}, expected uint64 [N, 3]")
    if not len(index):
        raise InputError(f"{path} lists no rows")
    return np.asarray(index).view(np.int64) if index.dtype == np.uint64 else np.asarray(index, np.int64)


def _check_index(folder: Path, index: np.ndarray, storage: np.dtype) -> int:
    """The width of the rows, once every one is known to lie inside its file."""
    widths = index[:, 2] - index[:, 1]
    if index.min() < 0 or widths.min() < 1:
        raise InputError(f"{folder / INDEX} is damaged: a row has a negative place or ends where it starts")
    if widths.min() != widths.max():
        raise InputError(f"{folder / INDEX}: rows are of unequal width, from {widths.min()} to {widths.max()}")
    files, inverse = np.unique(index[:, 0], return_inverse=True)
    ends = np.zeros(len(files), np.int64)
    np.maximum.at(ends, inverse, index[:, 2])
    for number, end in zip(files.tolist(), ends.tolist(), strict=True):
        path = _data_file(folder, number)
        if not path.is_file():
            raise InputError(f"{path} is missing: {folder / INDEX} has rows in it")
        held = path.stat().st_size // storage.itemsize
        if held < end:
            raise InputError(f"{path} is truncated: its rows end at element {end}, it holds {held}")
    return int(widths[0])
