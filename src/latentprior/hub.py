"""Folders of priors on disk and on the Hugging Face Hub."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from latentprior.errors import InputError

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
    patterns = [
        *CONFIGS,
        "rep_statistics.pt",
        *map(glob.escape, weights),
    ]  # all else, other weights above all, is large
    try:
        folder = Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"no prior at {str(path_or_repo)!r}: not a folder, and the Hub says: {reason}") from error
    official = not any(folder.glob(CONFIGS[0])) and not any(folder.glob(CONFIGS[2]))
    if official and not any((folder / name).is_file() for name in weights):
        raise InputError(f"{path_or_repo} has no checkpoint {checkpoint!r}: its files on the Hub show which there are")
    return folder


def weights_of(checkpoint: str) -> list[str]:
    """Where the weights of a checkpoint can lie in a prior of this project's format or of the official one."""
    own = "model.safetensors" if checkpoint == "final" else f"checkpoints/{checkpoint}/model.safetensors"
    return [own, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]


def upload(save: Callable[[str], Path], repo: str, *, private: bool, revision: str | None) -> str:
    """Upload what `save` writes into a temporary folder; returns the address of the commit."""
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        commit = api.upload_folder(repo_id=repo, folder_path=save(folder), revision=revision)
    return commit.commit_url
