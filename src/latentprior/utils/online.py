"""Whether the Hugging Face Hub answers, asked once: its own downloads retry for half a minute, line after line."""

from __future__ import annotations

from huggingface_hub import constants, try_to_load_from_cache
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
    """Whether the Hub cannot be asked for a model, so that it has to come from the cache.

    Raises:
        InputError: it is not in the cache either.
    """
    reason = OFFLINE if constants.HF_HUB_OFFLINE else unreachable()
    if reason is not None and not isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
        missing = f"there is no such folder{nearest_path(repo)}, none in the cache, and {reason}"
        raise InputError(f"cannot load the model {repo!r}: {missing}")
    return reason is not None
