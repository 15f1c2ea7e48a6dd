"""Priors and recorded activations from this project's files to the official ones, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.config import ConvertConfig
from latentprior.data.activations import ActivationBatch, finite_rows, split_sinks
from latentprior.data.sinks import sink_threshold
from latentprior.data.store.manifest import MANIFEST
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint, at_layer
from latentprior.prior.glp import GLP
from latentprior.prior.official.activations import INDEX, read_activations, write_activations
from latentprior.prior.official.checkpoint import check_official, write_checkpoint
from latentprior.utils.errors import InputError
from latentprior.utils.files import check_folder
from latentprior.utils.locks import LOCK, locked

CHUNK = 65536  # rows copied at a time, and most rows that the median norm is taken from
WRITTEN = (  # what a conversion leaves behind, whole or killed
    *("config.json", "model.safetensors", "README.md", "config.yaml", "final.safetensors", "rep_statistics.pt"),
    *("manifest.json", "shard-*.safetensors", "shard-*.parquet", "statistics*.safetensors"),
    *("data_*.npy", "dtype.txt", "*.partial", "*.tmp"),
)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert what lies in ``config.source``; returns what was done, for a table.

    From official activations rows that are not finite and attention sinks are left out and counted; the median norm is
    that of all rows, or of 65,536 that lie evenly over them if there are more.
    """
    source, output = Path(config.source), Path(config.output)
    if output.resolve() == source.resolve():
        raise InputError(f"{source} cannot be converted in place: choose another output")
    check_folder(output)
    if not config.overwrite and output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} holds something: add --overwrite, or choose another folder")
    with locked(output):
        if (source / MANIFEST).is_file():
            return _store_to_official(config)
        return _official_to_store(config) if (source / INDEX).is_file() else _prior(config)


def _prior(config: ConvertConfig) -> dict[str, Any]:
    glp = GLP.from_pretrained(config.source, config.checkpoint)
    if config.to == "official" and glp.normalizer.basis is not None:
        raise InputError(f"{config.source} is whitened, and the official format holds a scale of each dimension only")
    if config.to == "official":
        check_official(glp.denoiser.config)
    _clear(Path(config.output))
    if config.to == "latentprior":
        glp.save_pretrained(config.output)
    else:
        write_checkpoint(
            config.output,
            config=glp.denoiser.config,
            weights=glp.denoiser.state_dict(),
            mean=glp.normalizer.mean,
            var=glp.normalizer.var,
            statistics_layers=glp.normalizer.layers.tolist(),
            hookpoints=glp.hookpoints,
        )
    return {"prior": config.source, "written": config.output, "format": config.to}


def _store_to_official(config: ConvertConfig) -> dict[str, Any]:
    if config.to != "official":
        raise InputError(f"{config.source} is an activation store of this project already")
    store = ActivationStore(config.source)
    at_layer(store.hookpoints, config.layer, config.source)
    _clear(Path(config.output))
    rows = 0

    def parts() -> Iterator[Tensor]:
        nonlocal rows
        for part in _parts(len(store)):
            if len(store.layers) > 1:
                part = part[store.metadata(part)[0] == config.layer]
            rows += len(part)
            yield store.rows(part)

    write_activations(Path(config.output), parts(), dtype=store.dtype)
    return {"activations": config.source, "written": config.output, "rows": rows}


def _official_to_store(config: ConvertConfig) -> dict[str, Any]:
    if config.to != "latentprior":
        raise InputError(f"{config.source} holds official activations already")
    read = read_activations(Path(config.source))
    layer = config.layer if config.layer is not None else read.layer
    if layer is None:
        raise InputError(f"the folder name {config.source!r} does not say which layer it holds: name it with --layer")
    sampled = min(len(read), CHUNK)
    norms = finite_rows(_unplaced(read.rows(torch.arange(sampled) * len(read) // sampled), layer))[0].norms()
    if not len(norms):
        raise InputError(f"{config.source} holds no finite activation")
    median, left_out = float(norms.median()), {"sinks": 0, "nonfinite": 0}
    _clear(Path(config.output))
    hookpoint = Hookpoint(config.model, layer, read.width)
    with StoreWriter(config.output, [hookpoint], source={"converted": config.source}) as writer:
        writer.moments.median_norm[0] = median
        writer.sink_thresholds[layer] = sink_threshold(median)
        for number, part in enumerate(_parts(len(read))):
            batch, nonfinite = finite_rows(_unplaced(read.rows(part), layer))
            kept, sinks = split_sinks(batch, {layer: median})
            writer.append(kept, next_batch=number + 1, left_out={"sinks": len(sinks), "nonfinite": nonfinite})
            left_out["sinks"] += len(sinks)
            left_out["nonfinite"] += nonfinite
    return {
        "activations": config.source,
        "written": config.output,
        "rows": writer.rows,
        "attention sinks left out": left_out["sinks"],
        "not finite, left out": left_out["nonfinite"],
        "median norm": f"{median:.1f} of {len(norms):,} rows",
    }


def _parts(rows: int) -> Iterator[Tensor]:
    """The numbers of all rows, some at a time."""
    return (torch.arange(begin, min(begin + CHUNK, rows)) for begin in range(0, rows, CHUNK))


def _clear(folder: Path) -> None:
    """Remove what an earlier conversion left."""
    there = [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []
    for path in there:
        if path.is_dir() or not any(path.match(pattern) for pattern in WRITTEN):
            raise InputError(f"{folder} holds {path.name!r}, which no conversion leaves: choose another output")
    for path in there:
        path.unlink()


def _unplaced(x: Tensor, layer: int) -> ActivationBatch:
    """Rows whose document, position and token the official files do not keep: -1."""
    unknown = torch.full((len(x),), -1)
    return ActivationBatch(x, torch.full((len(x),), layer), unknown, unknown, unknown)
