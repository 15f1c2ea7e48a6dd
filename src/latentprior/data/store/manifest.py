"""The files of an activation store: the manifest that lists them, and how each is written, named and checked."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replaced

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
LEFT_OUT = ("sinks", "nonfinite", "cut_documents", "cut_tokens")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = {"doc": np.int64, "position": np.int32, "token": np.int32, "layer": np.int32}
"""The metadata of each row."""
_SETTINGS_FIELDS = {"hookpoints": list, "dtype": str, "width": int, "shard_rows": int, "source": dict}
SETTINGS = tuple(_SETTINGS_FIELDS)
"""What a resumed recording must share with the stored one."""

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_SHARD_FIELDS = {"rows": int, "activations": dict, "metadata": dict}
_FILE_FIELDS = {"file": str, "bytes": int, "sha256": str}
# Manifests come from other people, too: a name that could lead out of the folder is not opened.
_FILE_NAME = re.compile(r"(shard-\d{5,}\.(safetensors|parquet)|statistics(-\d{5,})?\.safetensors)")


def settings(hookpoints: Sequence[Hookpoint], dtype: str, shard_rows: int, source: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that is fixed before the first row, checked, as JSON gives it back."""
    if dtype == "float16":
        raise InputError("float16 is refused: activations go beyond its largest value, 65504; take bfloat16 or float32")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if shard_rows < 1:
        raise InputError(f"shard_rows must be positive, got {shard_rows}")
    widths = {hookpoint.width for hookpoint in hookpoints}
    layers = [hookpoint.layer for hookpoint in hookpoints]
    if len(widths) != 1 or len(set(layers)) < len(layers):
        got = f"{sorted(widths)} and {layers}"
        raise InputError(f"a store needs hookpoints of one width and distinct layers, got {got}")
    values = {
        "hookpoints": [hookpoint.to_dict() for hookpoint in hookpoints],
        "dtype": dtype,
        "width": widths.pop(),
        "shard_rows": shard_rows,
        "source": dict(source),
    }
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"the source of a store must be JSON values: {error}") from error


def empty_manifest(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a store without rows; it becomes valid once "statistics" names a file."""
    return {
        "format_version": FORMAT_VERSION,
        **fixed,
        "rows": 0,
        "evicted": 0,
        "first_shard": 0,
        "left_out": dict.fromkeys(LEFT_OUT, 0),
        "sink_thresholds": {},
        "next_batch": 0,
        "complete": False,
        "shards": [],
        "statistics": {},
    }


_MANIFEST_FIELDS = _SETTINGS_FIELDS | {key: type(value) for key, value in empty_manifest({}).items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`, its structure and every file name checked."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no activation store: {MANIFEST} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    _require(path, "the manifest", manifest, {"format_version": int})
    if manifest["format_version"] > FORMAT_VERSION:
        found = manifest["format_version"]
        raise InputError(f"{path} has format {found}, this version reads up to {FORMAT_VERSION}: update latentprior")
    for key in ("evicted", "first_shard"):  # older stores lack them
        manifest.setdefault(key, 0)
    _require(path, "the manifest", manifest, _MANIFEST_FIELDS)
    for key in ("cut_documents", "cut_tokens"):
        manifest["left_out"].setdefault(key, 0)
    _require(path, "left_out", manifest["left_out"], dict.fromkeys(LEFT_OUT, int))
    thresholds = manifest["sink_thresholds"]
    if not all(layer.isdecimal() and isinstance(norm, int | float) for layer, norm in thresholds.items()):
        raise damaged(path, "sink_thresholds are not one number for each layer")
    for shard in manifest["shards"]:
        _require(path, "a shard", shard, _SHARD_FIELDS)
    for file in _files(manifest):
        _require(path, "a file", file, _FILE_FIELDS)
        if not _FILE_NAME.fullmatch(file["file"]):
            raise damaged(path, f"{file['file']!r} is no name of a store's file")
    if manifest["dtype"] not in DTYPES:
        raise damaged(path, unknown("dtype", manifest["dtype"], DTYPES))
    total = sum(shard["rows"] for shard in manifest["shards"])
    if any(shard["rows"] < 1 for shard in manifest["shards"]) or manifest["rows"] != total:
        raise damaged(path, "the rows of the shards do not add up")
    return manifest


def read_hookpoints(folder: Path, manifest: Mapping[str, Any]) -> list[Hookpoint]:
    """The hookpoints that a manifest lists: distinct layers, one width."""
    for values in manifest["hookpoints"]:
        _require(folder / MANIFEST, "a hookpoint", values, {"model": str, "layer": int, "width": int, "side": str})
    try:
        hookpoints = [Hookpoint.from_dict(values) for values in manifest["hookpoints"]]
    except InputError as error:
        raise damaged(folder / MANIFEST, error) from error
    layers, widths = {h.layer for h in hookpoints}, {h.width for h in hookpoints}
    if len(layers) != len(manifest["hookpoints"]) or widths != {manifest["width"]}:
        raise damaged(folder / MANIFEST, "its hookpoints contradict each other or the width")
    return hookpoints


def most_bytes(fixed: Mapping[str, Any], rows: int) -> int:
    """An upper bound of the bytes of a shard of `rows` rows: parquet may need a little more than the plain columns."""
    columns = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())
    return rows * (fixed["width"] * DTYPES[fixed["dtype"]].itemsize + 2 * columns) + 8192


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file whole or not at all; gives its entry for a manifest: file, bytes, sha256."""
    digest, size = hashlib.sha256(), 0
    try:
        with replaced(path) as partial, open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += memoryview(chunk).nbytes
    except OSError as error:
        raise unwritable(path, error) from error
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def verified_file(folder: Path, entry: Mapping[str, Any], *, checksum: bool) -> Path:
    """The path of a file that a manifest lists, its size and, if asked for, its SHA-256 checked."""
    path = folder / entry["file"]
    if not path.is_file():
        raise InputError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise damaged(path, f"it has {size} bytes instead of {entry['bytes']}")
    if checksum:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise damaged(path, "its SHA-256 is not the manifest's")
    return path


def safetensors_header(name: str, dtype: str, shape: Sequence[int], size: int) -> bytes:
    """What precedes the `size` bytes of the only tensor of a safetensors file, so that they can be streamed."""
    entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({name: entry}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % 64)  # rows begin at a cache line
    return struct.pack("<Q", len(header)) + header


def damaged(path: Path, reason: object) -> InputError:
    """The error for a file that is not what was written; a reason of several lines is cut to its first."""
    return InputError(f"{path} is damaged: {(str(reason).splitlines() or [''])[0]}")


def unwritable(path: Path, error: OSError) -> InputError:
    """The error for a file or folder that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else error.strerror or str(error)
    return InputError(f"cannot write {path}: {reason}; earlier shards are whole, continue with --resume")


def listed_files(manifest: Mapping[str, Any]) -> set[str]:
    return {file["file"] for file in _files(manifest) if file}


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    shards = manifest["shards"]
    return [manifest["statistics"], *(shard[kind] for shard in shards for kind in ("activations", "metadata"))]


def _require(path: Path, what: str, values: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(values, dict):
        raise damaged(path, f"{what} is not an object")
    for key, kind in fields.items():
        if key not in values:
            raise damaged(path, f"{what} lacks {key!r}")
        if not isinstance(values[key], kind):
            raise damaged(path, f"{what} has a {key!r} that is no {kind.__name__}")
