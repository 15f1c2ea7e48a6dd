"""Language models and their tokenizers: from the Hub, a folder or a GGUF file, or an embedded package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from latentprior.config import EMBEDDED, SMOLLM2, LLMConfig, near_embedded
from latentprior.lm.assets import build_once, gguf_of
from latentprior.lm.dequantise import copied_tokenizer, dense_copy, dequantise
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.hub import cache_only

_RECIPE = 1


def load_llm(
    model: str | Path | LLMConfig = SMOLLM2,
    device: torch.device | str = "auto",
    *,
    gguf: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in eval mode and without gradients, and its tokenizer.

    Embedded models and GGUF files are dequantised on first use (seconds to a minute) and read from a copy in the cache
    afterwards.

    Args:
        model: a Hugging Face id, a folder, an embedded model ("smollm2-135m" of requirements-assets.txt, "gemma-3-270m"
            of requirements-gemma.txt), or a configuration.
        gguf: a GGUF file to take the weights from.
        dtype: "float32", "bfloat16" or "auto" (the default): bfloat16 where the device is fast at it.
        device_map: "auto" spreads a large model over all of the machine's GPUs.
        trust_remote_code: run Python code that the model's repository ships; refused by default.

    Examples:
        >>> model, tokenizer = lp.load_llm("smollm2-135m")
        >>> len(lp.hooks.find_blocks(model))
        30
    """
    given = {
        "gguf": None if gguf is None else str(gguf),
        "revision": revision,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(model if isinstance(model, LLMConfig) else LLMConfig(str(model)), **given)
    place = resolve_device(device)
    tokenizer = load_tokenizer(config)
    with _loading(config):
        loaded = AutoModelForCausalLM.from_pretrained(
            _source(config),
            **_options(config),
            dtype=fast_dtype(place) if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map=place if config.device_map == "none" else config.device_map,
            use_safetensors=True,
        )
    loaded.config._name_or_path = config.model  # not the cache folder: what is recorded must name the model anywhere
    return loaded.eval().requires_grad_(False), tokenizer


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` names."""
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(config), **_options(config))
    tokenizer.name_or_path = config.model
    return tokenizer


def count_blocks(config: LLMConfig) -> int:
    """How many decoder blocks the model that `config` names has; its weights are not read."""
    with _loading(config):
        loaded = AutoConfig.from_pretrained(_source(config), **_options(config))
    return loaded.get_text_config(decoder=True).num_hidden_layers


def _source(config: LLMConfig) -> str:
    if config.gguf is not None:
        return str(dense_copy(config.gguf))
    if (embedded := EMBEDDED.get(config.model)) is None:
        _check_place(config.model)
        return config.model
    if config.revision is not None:
        raise InputError(f"{config.model} is installed as a package and has no revision {config.revision!r}")

    def build(folder: Path) -> None:
        with gguf_of(embedded, folder) as file:
            dequantise(file, folder)

    return str(build_once(config.model, embedded.modules, _RECIPE, build))


def _tokenizer_source(config: LLMConfig) -> str:
    """Of a GGUF file, the folder `model` if a tokenizer lies there: it is the original, the file's a conversion."""
    if config.gguf is None:
        return _source(config)
    if any(Path(config.model, name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return config.model
    return str(copied_tokenizer(config.gguf))


def _options(config: LLMConfig) -> dict[str, Any]:
    on_hub = config.gguf is None and config.model not in EMBEDDED and not Path(config.model).is_dir()
    return {
        "revision": config.revision or "main",
        "local_files_only": on_hub and cache_only(config.model, config.revision),
        "trust_remote_code": config.trust_remote_code,
    }


def _check_place(model: str) -> None:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"the folder {model!r} holds no model: it has no config.json")
        return
    if near := near_embedded(model):
        raise InputError(f"no such model: {model!r} is neither a folder here nor an embedded model; {near}")
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise InputError(f"no such model: {model!r} is neither a folder here nor a Hugging Face id") from error


@contextmanager
def _loading(config: LLMConfig) -> Iterator[None]:
    """No progress bars, and transformers' long messages as one line."""
    try:
        with without_bars():
            yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            reason = "it runs code of its own; if you trust that code, set trust_remote_code to true"
        else:
            reason = shorten(str(error), 300)
        raise InputError(f"cannot load the model {config.model!r}: {reason}") from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers without its progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
