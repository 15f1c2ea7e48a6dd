"""Priors and recorded activations from this project's files to the official ones, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentprior import official
from latentprior.activations import ActivationBatch, finite_rows, sink_threshold, split_sinks
from latentprior.config import ConvertConfig
from latentprior.errors import InputError
from latentprior.hooks import Hookpoint
from latentprior.manifest import MANIFEST
from latentprior.prior import GLP
from latentprior.store import ActivationStore
from latentprior.writer import StoreWriter

OFFICIAL_INDEX = "data_indices.npy"
CHUNK = 65536  # rows copied at a time


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert what lies in ``config.source``; returns what was done, for a table.

    Raises:
        InputError: nothing convertible there, the wanted format already, or an output folder that is in use.
    """
    source = Path(config.source)
    if (source / MANIFEST).is_file():
        return _store_to_official(config)
    if (source / OFFICIAL_INDEX).is_file():
        return _official_to_store(config)
    return _prior(config)


def _prior(config: ConvertConfig) -> dict[str, Any]:
    glp = GLP.from_pretrained(config.source, config.checkpoint)
    if config.to == "latentprior":
        glp.save_pretrained(config.output)
    elif glp.normalizer.basis is not None:
        raise InputError(f"{config.source} is whitened, and the official format holds a scale of each dimension only")
    else:
        official.write_checkpoint(
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
    if config.layer is None and len(store.layers) > 1:
        raise InputError(f"{config.source} holds layers {list(store.layers)}: choose one with --layer")
    rows = torch.arange(len(store))
    if config.layer is not None:
        rows = rows[store.metadata(rows)[0] == config.layer]
    if not len(rows):
        raise InputError(f"{config.source} holds no row of layer {config.layer}, only of {list(store.layers)}")
    official.write_activations(Path(config.output), store.rows(rows), dtype=store.dtype)
    return {"activations": config.source, "written": config.output, "rows": len(rows)}


def _official_to_store(config: ConvertConfig) -> dict[str, Any]:
    if config.to != "latentprior":
        raise InputError(f"{config.source} holds official activations already")
    read = official.read_activations(Path(config.source))
    layer = config.layer if config.layer is not None else read.layer
    if layer is None:
        raise InputError(f"the folder name {config.source!r} does not say which layer it holds: name it with --layer")
    hookpoint = Hookpoint(config.model, layer, read.width)
    medians: dict[int, float] = {}
    with StoreWriter(config.output, [hookpoint], source={"converted": config.source}) as writer:
        for number, begin in enumerate(range(0, len(read), CHUNK)):
            batch, nonfinite = finite_rows(
                _unplaced(read.rows(torch.arange(begin, min(begin + CHUNK, len(read)))), layer)
            )
            if not medians and len(batch):
                norms = batch.norms()
                medians[layer] = float(norms.median())
                writer.moments.median_norm[0] = medians[layer]
                writer.sink_thresholds[layer] = sink_threshold(norms)
            kept, sinks = split_sinks(batch, medians)
            writer.append(kept, next_batch=number + 1, left_out={"sinks": len(sinks), "nonfinite": nonfinite})
    return {"activations": config.source, "written": config.output, "rows": writer.rows}


def _unplaced(x: torch.Tensor, layer: int) -> ActivationBatch:
    """Rows whose document, position and token the official files do not keep: -1."""
    unknown = torch.full((len(x),), -1)
    return ActivationBatch(x, torch.full((len(x),), layer), unknown, unknown, unknown)
