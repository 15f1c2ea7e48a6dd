"""Reader and writer of official checkpoints: ``config.yaml``, ``rep_statistics.pt`` and ``<name>.safetensors``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprior.config import DenoiserConfig, Side, from_dict, settings_of
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.official.activations import STATISTICS, read_statistics
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_text, replaced

CONFIG = "config.yaml"
PREFIX = "model."  # of every weight's name


@dataclass(frozen=True)
class OfficialCheckpoint:
    """An official prior as plain values."""

    config: DenoiserConfig
    weights: dict[str, Tensor]  # state dict of a `Denoiser`
    mean: Tensor  # [L, d], a row for each of `statistics_layers`
    var: Tensor  # [L, d]
    statistics_layers: list[int]  # layers of the language model; [0] if the folder does not say
    hookpoints: tuple[Hookpoint, ...]  # one for each of `statistics_layers`; none if the folder does not say
    provenance: dict[str, Any]  # format, name of the run, name of the checkpoint


def read_checkpoint(folder: str | Path, checkpoint: str = "final") -> OfficialCheckpoint:
    """Read the official checkpoint of this name in `folder`."""
    folder = Path(folder)
    values = _read_yaml(folder / CONFIG)
    config = _denoiser_config(values, folder / CONFIG)
    traced = _traced(values["glp_kwargs"].get("tracedict_config"))
    mean, var, layers = _statistics(folder / STATISTICS, config, traced)
    hookpoints: tuple[Hookpoint, ...] = ()
    if traced is not None:
        model, width = str(values.get("model_name") or ""), config.d_input
        paths = [f"{traced.prefix}.{layer}".lstrip(".") for layer in layers]
        hookpoints = tuple(Hookpoint(model, n, width, traced.side, path) for n, path in zip(layers, paths, strict=True))
    return OfficialCheckpoint(
        config=config,
        weights=_read_weights(folder, checkpoint, config),
        mean=mean,
        var=var,
        statistics_layers=layers,
        hookpoints=hookpoints,
        provenance={"format": "official", "run_name": str(values.get("run_name") or ""), "checkpoint": checkpoint},
    )


def check_official(config: DenoiserConfig) -> None:
    """Raise `InputError` unless it is the paper's network, the only one that the official format holds."""
    if departures := [f"{name} {value!r}" for name, value in config.departures().items()]:
        raise InputError(f"the official format holds the paper's network only, not {' and '.join(departures)}")


def write_checkpoint(
    folder: str | Path,
    *,
    config: DenoiserConfig,
    weights: Mapping[str, Tensor],
    mean: Float[Tensor, "layers d"],
    var: Float[Tensor, "layers d"],
    hookpoints: Sequence[Hookpoint],
    statistics_layers: Sequence[int] | None = None,
) -> Path:
    """Write an official checkpoint that `read_checkpoint` and the official code read; returns the folder.

    The official code finds a multi-layer prior's statistics by layer number, so layers without any get rows of nan.
    `statistics_layers` are those of the rows of `mean`: by default the hookpoints', else all.
    """
    check_official(config)
    folder = Path(folder)
    weights = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    _check_weights(weights, config, "the given weights")
    if statistics_layers is None:
        statistics_layers = [h.layer for h in hookpoints] or range(config.multi_layer_n_layers or 1)
    tables = {"mean": _by_layer(mean, statistics_layers, config), "var": _by_layer(var, statistics_layers, config)}
    values = {
        "model_name": hookpoints[0].model if hookpoints else None,
        "run_name": "latentprior",
        "rep_statistic": STATISTICS,
        "glp_kwargs": {
            "normalizer_config": {"rep_statistic": "${rep_statistic}"},
            "denoiser_config": settings_of(config),
            "tracedict_config": _tracedict(hookpoints),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / "final.safetensors") as partial:
        save_file(weights, partial)
    with replaced(folder / STATISTICS) as partial:
        torch.save(tables, partial)
    replace_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))
    return folder


@dataclass(frozen=True)
class _Traced:
    prefix: str
    side: Side
    layers: list[int]


def _traced(values: object) -> _Traced | None:
    """``tracedict_config``, if it names different members of one list of blocks."""
    match values:
        case {"layers": [*layers], "retain": "output" | "input" as side, **rest} if layers:
            prefix = rest.get("layer_prefix")
        case _:
            return None
    names = [(f"{prefix}.{layer}" if prefix else str(layer)).rpartition(".") for layer in layers]
    prefixes, numbers = {name[0] for name in names}, [name[2] for name in names]
    if len(prefixes) > 1 or len(set(numbers)) < len(numbers) or not all(re.fullmatch("[0-9]+", n) for n in numbers):
        return None
    return _Traced(prefixes.pop(), side, [int(number) for number in numbers])


def _tracedict(hookpoints: Sequence[Hookpoint]) -> dict[str, Any] | None:
    """The inverse of `_traced`."""
    if not hookpoints:
        return None
    for h in hookpoints:
        if h.path.rpartition(".")[2] != str(h.layer):
            raise InputError(f"the official format names blocks by path, and layer {h.layer} has path {h.path!r}")
    places = {(h.model, h.side, h.path.rpartition(".")[0]) for h in hookpoints}
    if len(places) > 1:
        raise InputError(f"the official format holds one side of one model, hookpoints have {sorted(places)}")
    _, side, prefix = places.pop()
    return {"layer_prefix": prefix, "layers": [h.layer for h in hookpoints], "retain": side}


def _statistics(path: Path, config: DenoiserConfig, traced: _Traced | None) -> tuple[Tensor, Tensor, list[int]]:
    """Mean and variance [L, d] and their layers; rows of nan stand for layers without statistics."""
    mean, var = read_statistics(path, config.d_input)
    layers = _statistics_layers(len(mean), config, traced, path)
    given = ~mean.expand(len(layers), -1).isnan().all(dim=1)
    if not given.any():
        raise InputError(f"{path} holds no statistics: all means are nan")
    mean, var = (table.expand(len(layers), -1)[given] for table in (mean, var))
    return mean, var, [layer for layer, known in zip(layers, given.tolist(), strict=True) if known]


def _statistics_layers(rows: int, config: DenoiserConfig, traced: _Traced | None, path: Path) -> list[int]:
    """The layers that the statistics are for; a single row serves all layers of a multi-layer prior."""
    n_layers = config.multi_layer_n_layers
    if n_layers is None and rows == 1:
        return traced.layers if traced is not None and len(traced.layers) == 1 else [0]
    if n_layers is not None and rows in (1, n_layers):
        return list(range(n_layers))
    if n_layers is not None and traced is not None and rows == len(traced.layers):
        return traced.layers
    raise InputError(f"{path} holds statistics of {rows} layers, the denoiser serves {n_layers or 1}")


def _by_layer(table: Tensor, layers: Sequence[int], config: DenoiserConfig) -> Tensor:
    """Statistics [L, d] of `layers` as the official code looks them up: by layer, or [d] for a single one."""
    n_layers = config.multi_layer_n_layers
    if tuple(table.shape) != (len(layers), config.d_input) or (n_layers is None and len(layers) != 1):
        serves = f"{n_layers or 1} layers of width {config.d_input}"
        raise InputError(f"statistics {tuple(table.shape)} of layers {list(layers)} do not fit a prior for {serves}")
    table = table.detach().cpu()
    if n_layers is None:
        return table[0].clone()
    if len(set(layers)) < len(layers) or not all(0 <= layer < n_layers for layer in layers):
        raise InputError(f"layers of statistics must differ and lie in 0..{n_layers - 1}, got {list(layers)}")
    full = table.new_full((n_layers, config.d_input), float("nan"))
    full[list(layers)] = table
    return full


class _Loader(yaml.SafeLoader):
    """Plain values only, and the paths that OmegaConf writes with a Python tag, as text."""


def _path_as_text(loader: _Loader, _suffix: str, node: yaml.Node) -> str:
    parts = loader.construct_sequence(node)  # pyright: ignore[reportArgumentType] - refuses other nodes by itself
    return str(PurePosixPath(*map(str, parts)))


_Loader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:pathlib", _path_as_text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_bytes(), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no plain YAML: {shorten(str(error), 300)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("glp_kwargs"), dict):
        raise InputError(f"{path} is no official configuration: it has no glp_kwargs")
    return values


def _denoiser_config(values: dict[str, Any], path: Path) -> DenoiserConfig:
    shape = values["glp_kwargs"].get("denoiser_config")
    if not isinstance(shape, dict):
        raise InputError(f"{path} is no official configuration: it has no glp_kwargs.denoiser_config")
    shape = {"multi_layer_n_layers": None, **shape}
    for name in ("d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers"):
        value = shape.get(name)
        if type(value) is not int and not (value is None and name == "multi_layer_n_layers"):
            raise InputError(f"{path}: denoiser_config.{name} must be an integer, got {value!r}")
    try:
        return from_dict(DenoiserConfig, shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_weights(folder: Path, checkpoint: str, config: DenoiserConfig) -> dict[str, Tensor]:
    # Found among those that exist: no name can lead out of the folder.
    files = {path.stem: path for place in (folder / "checkpoints", folder) for path in place.glob("*.safetensors")}
    if checkpoint not in files:
        raise unknown("checkpoint", checkpoint, sorted(sorted(files), key=len))
    path = files[checkpoint]
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged: {shorten(str(error), 300)}") from error
    _check_weights(weights, config, path)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}


def _check_weights(weights: Mapping[str, Tensor], config: DenoiserConfig, source: object) -> None:
    """Names and shapes are those of a denoiser of this configuration."""
    with torch.device("meta"):
        expected = {PREFIX + name: tuple(t.shape) for name, t in Denoiser(config).state_dict().items()}
    for name in sorted(expected.keys() ^ weights.keys()):
        fault = "missing from" if name in expected else "unexpected in"
        raise InputError(f"weights do not fit the configuration: {name} is {fault} {source}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise InputError(f"weights do not fit the configuration: {name} is {found}, not {shape}, in {source}")
