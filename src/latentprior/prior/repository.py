"""Where a prior lies: a folder here, or a repository of the Hub, of this project's format or the official one."""

from __future__ import annotations

import glob
from pathlib import Path

from latentprior.utils.errors import InputError
from latentprior.utils.hub import snapshot

CONFIGS = ("config.json", "config.yaml", "checkpoints/*/config.json")


def fetch(path_or_repo: str | Path, *, revision: str | None, checkpoint: str) -> Path:
    """The local folder of a prior, downloaded first, as far as it is needed, if `path_or_repo` is a repository."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        if not any(any(folder.glob(pattern)) for pattern in CONFIGS):
            raise InputError(f"{folder} holds no prior: neither config.json nor the official config.yaml is there")
        return folder
    own = "model.safetensors" if checkpoint == "final" else f"checkpoints/{checkpoint}/model.safetensors"
    weights = [own, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]
    # All else, other weights above all, is large.
    patterns = [*CONFIGS, "rep_statistics.pt", *map(glob.escape, weights)]
    folder = snapshot("prior", str(path_or_repo), revision=revision, allow_patterns=patterns)
    official = not any(folder.glob(CONFIGS[0])) and not any(folder.glob(CONFIGS[2]))
    if official and not any((folder / name).is_file() for name in weights):
        raise InputError(f"{path_or_repo} has no checkpoint {checkpoint!r}: its files on the Hub show which there are")
    return folder
