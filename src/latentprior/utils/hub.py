"""The Hugging Face Hub: folders from it and to it, but first whether it answers: its downloads retry for long."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from latentprior.utils.errors import InputError, nearest_path

PATIENCE = 10.0  # seconds
OFFLINE = "HF_HUB_OFFLINE is set"


def unreachable() -> str | None:
    """Why the Hub gives no answer, in a few words; None if it does, or if it is not to be asked (HF_HUB_OFFLINE)."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of httpx or its successor, as the installed huggingface_hub has it
        return f"{constants.ENDPOINT} does not answer ({' '.join(str(error).split())[:200]})"
    return None


def cache_only(repo: str, revision: str | None = None) -> bool:
    """Whether a model has to come from the cache, where it must be then, because the Hub cannot be asked."""
    reason = OFFLINE if constants.HF_HUB_OFFLINE else unreachable()
    if reason is not None and not isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
        missing = f"there is no such folder{nearest_path(repo)}, none in the cache, and {reason}"
        raise InputError(f"cannot load the model {repo!r}: {missing}")
    return reason is not None


def snapshot(kind: str, repo: str, **options: Any) -> Path:
    """The folder of a repository that holds a `kind` of thing; `options` are those of `snapshot_download`."""
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
