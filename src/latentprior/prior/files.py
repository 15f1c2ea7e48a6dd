"""The folder of a prior: here, in an installed package or on the Hub, of this project's format or the official one."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprior.config import DenoiserConfig, from_dict, settings_of
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.card import model_card
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.installed import installed_folder
from latentprior.prior.normalizer import Normalizer
from latentprior.prior.official import checkpoint as official
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_text, replaced
from latentprior.utils.hub import snapshot

FORMAT = 1
WHITENED_FORMAT = 2  # with the normalizer's basis, which readers of format 1 do not know
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
LOADED = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # as "load_dtype" may name them
CONFIGS = ("config.json", "config.yaml", "checkpoints/*/config.json")  # one of which a prior has


@dataclass(frozen=True)
class Parts:
    """All that a prior consists of, and all that its folder holds."""

    denoiser: Denoiser
    normalizer: Normalizer
    hookpoints: tuple[Hookpoint, ...]
    provenance: dict[str, Any]  # corpus, training summary and versions, JSON-ready


def fetch(path_or_repo: str | Path, *, revision: str | None, checkpoint: str) -> Path:
    """The local folder of a prior: `path_or_repo` itself if it is one, or of the installed prior of that name.

    A repository is downloaded first, as far as it is needed; its name has a slash, as those of installed priors have
    not.
    """
    folder, name = Path(path_or_repo), str(path_or_repo)
    if not folder.is_dir() and name == folder.name:
        folder = installed_folder(name, revision=revision)
    if folder.is_dir():
        if not any(any(folder.glob(pattern)) for pattern in CONFIGS):
            raise InputError(f"{folder} holds no prior: neither config.json nor the official config.yaml is there")
        return folder
    own = "model.safetensors" if checkpoint == "final" else f"checkpoints/{checkpoint}/model.safetensors"
    weights = [own, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]
    # All else, other weights above all, is large.
    patterns = [*CONFIGS, "rep_statistics.pt", *map(glob.escape, weights)]
    folder = snapshot("prior", name, revision=revision, allow_patterns=patterns)
    official = not any(folder.glob(CONFIGS[0])) and not any(folder.glob(CONFIGS[2]))
    if official and not any((folder / name).is_file() for name in weights):
        raise InputError(f"{path_or_repo} has no checkpoint {checkpoint!r}: its files on the Hub show which there are")
    return folder


def read(folder: Path, checkpoint: str) -> Parts:
    """The prior in `folder`, with its final weights or those of an intermediate checkpoint."""
    files = [folder / CONFIG, *folder.glob(f"checkpoints/*/{CONFIG}")]  # a run in progress has no final weights
    folders = {"final" if f.parent == folder else f.parent.name: f.parent for f in files if f.is_file()}
    if not folders:
        parts = official.read_checkpoint(folder, checkpoint)
        normalizer = Normalizer(parts.mean, parts.var, parts.statistics_layers)
        return Parts(_denoiser(parts.config, parts.weights, folder), normalizer, parts.hookpoints, parts.provenance)
    if checkpoint not in folders:  # found among those that exist: no name can lead out of the prior's folder
        raise unknown("checkpoint", checkpoint, sorted(sorted(folders), key=len))
    return _read_own(folders[checkpoint])


def write(folder: Path, parts: Parts, *, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json``, ``model.safetensors`` and a model card into `folder`, each whole or not at all.

    The denoiser's weights are stored in `dtype`, by default their own, and read in their own again.
    """
    own = parts.denoiser.dtype
    stored = dtype or own
    if torch.float16 in (stored, *(p.dtype for p in parts.denoiser.parameters())):
        raise InputError("float16 storage is refused: cast the prior to bfloat16 or float32 before saving it")
    config = {
        "format": FORMAT if parts.normalizer.basis is None else WHITENED_FORMAT,
        "denoiser": settings_of(parts.denoiser.config),
        "hookpoints": [h.to_dict() for h in parts.hookpoints],
        "provenance": parts.provenance,
    }
    if stored != own:
        config["load_dtype"] = str(own).removeprefix("torch.")
    # Both can fail, so before anything is written.
    text = json.dumps(config, indent=2) + "\n"
    layers = parts.normalizer.layers.tolist()
    card = model_card(parts.denoiser, layers, parts.hookpoints, parts.provenance, stored=stored)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"denoiser.{name}": tensor.to(stored) for name, tensor in parts.denoiser.state_dict().items()}
    statistics = {f"normalizer.{name}": tensor for name, tensor in parts.normalizer.state_dict().items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights | statistics).items()}
    with replaced(folder / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    replace_text(folder / CONFIG, text)
    replace_text(folder / "README.md", card)


def _read_own(folder: Path) -> Parts:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable prior: {shorten(str(error), 300)}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found not in (FORMAT, WHITENED_FORMAT):
        raise InputError(f"{folder} has prior format {found}, this version reads {FORMAT} and {WHITENED_FORMAT}")
    try:
        shape = from_dict(DenoiserConfig, config["denoiser"])
        hookpoints = tuple(Hookpoint.from_dict(h) for h in config["hookpoints"])
        provenance = dict(config["provenance"])
    except KeyError as error:
        raise InputError(f"{folder / CONFIG} lacks the key {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} is no configuration of a prior: {error}") from error
    denoiser = _denoiser(shape, _below("denoiser.", state), folder)
    if (given := config.get("load_dtype")) is not None:
        if given not in LOADED:
            raise InputError(f"{folder / CONFIG}: {unknown('load_dtype', given, LOADED)}")
        denoiser.to(LOADED[given])
    return Parts(
        denoiser,
        _normalizer(state, folder, whitened=found == WHITENED_FORMAT),
        hookpoints,
        provenance,
    )


def _normalizer(state: dict[str, Tensor], folder: Path, *, whitened: bool) -> Normalizer:
    statistics = _below("normalizer.", state)
    names = ["mean", "var", "mean_norm", "median_norm"] + ["basis"] * whitened
    try:
        return Normalizer(layers=statistics["layers"].tolist(), **{name: statistics[name] for name in names})
    except KeyError as error:
        raise InputError(f"{folder / WEIGHTS} lacks the statistic {error}") from error
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}") from error


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _denoiser(config: DenoiserConfig, weights: dict[str, Tensor], folder: Path) -> Denoiser:
    """A denoiser around `weights`, without drawing initial ones."""
    with torch.device("meta"):
        denoiser = Denoiser(config)
    try:
        denoiser.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise InputError(f"weights in {folder} do not fit its configuration: {shorten(str(error), 300)}") from error
    return denoiser
