"""Folders of priors on disk and on the Hugging Face Hub."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from latentprior.utils.errors import InputError, nearest_path
from latentprior.utils.online import OFFLINE, unreachable

CONFIGS = ("config.json", "config.yaml", "checkpoints/*/config.json")


def fetch(path_or_repo: str | Path, *, revision: str | None, checkpoint: str) -> Path:
    """The local folder of a prior, downloaded first, as far as it is needed, if `path_or_repo` is a repository.

    Raises:
        InputError: a folder without a prior, no such repository, or one without this checkpoint.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        if not any(any(folder.glob(pattern)) for pattern in CONFIGS):
            raise InputError(f"{folder} holds no prior: neither config.json nor the official config.yaml is there")
        return folder
    weights = weights_of(checkpoint)
    # All else, other weights above all, is large.
    patterns = [*CONFIGS, "rep_statistics.pt", *map(glob.escape, weights)]
    folder = snapshot("prior", str(path_or_repo), revision=revision, allow_patterns=patterns)
    official = not any(folder.glob(CONFIGS[0])) and not any(folder.glob(CONFIGS[2]))
    if official and not any((folder / name).is_file() for name in weights):
        raise InputError(f"{path_or_repo} has no checkpoint {checkpoint!r}: its files on the Hub show which there are")
    return folder


def weights_of(checkpoint: str) -> list[str]:
    """Where the weights of a checkpoint can lie in a prior of this project's format or of the official one."""
    own = "model.safetensors" if checkpoint == "final" else f"checkpoints/{checkpoint}/model.safetensors"
    return [own, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]


def snapshot(kind: str, repo: str, **options: Any) -> Path:
    """The folder of a repository, from the cache alone where the Hub does not answer; `options` of `snapshot_download`.

    Raises:
        InputError: no such repository, or none that can be had.
    """
    silence = unreachable()
    try:
        if silence is not None:
            options["local_files_only"] = True
        return Path(snapshot_download(repo, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        silence = OFFLINE if constants.HF_HUB_OFFLINE else silence
        reason = f"the Hub says: {str(error).strip().splitlines()[0]}" if silence is None else silence
        raise InputError(f"no {kind} at {repo!r}: not a folder{nearest_path(repo)}, and {reason}") from error


def upload(save: Callable[[str], Path], repo: str, *, private: bool, revision: str | None) -> str:
    """Upload what `save` writes into a temporary folder; returns the address of the commit."""
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        commit = api.upload_folder(repo_id=repo, folder_path=save(folder), revision=revision)
    return commit.commit_url
