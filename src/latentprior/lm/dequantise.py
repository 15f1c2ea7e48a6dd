"""Packed weights (GGUF files) as dense copies in the cache: twice as fast to run, and read as any other model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from latentprior.lm.assets import build_version_once
from latentprior.utils.errors import InputError

MAGIC = b"GGUF"
NO_TOKENIZER = "no_tokenizer.txt"  # in a copy: why it has none
_RECIPE = 1


def dense_copy(path: str) -> Path:
    """The cached folder of a GGUF file, made anew when that changes: quantised weights as bfloat16, others float32."""
    file = _checked(path)
    facts = file.stat()
    place = hashlib.sha256(str(file).encode()).hexdigest()[:12]  # files of one name in several folders
    version = f"{facts.st_size}-{facts.st_mtime_ns}-{_RECIPE}"

    def build(folder: Path) -> None:
        with _reading(f"cannot read the model in {path!r}"):
            model = _model(file, _dense_dtype(file))
        model.save_pretrained(folder)
        try:
            with _reading(f"cannot read the tokenizer in {path!r}"):
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except InputError as error:  # the weights are of use with another one
            (folder / NO_TOKENIZER).write_text(str(error), encoding="utf-8")
        else:
            tokenizer.save_pretrained(folder)

    return build_version_once(f"gguf-{file.stem}-{place}", version, build)


def copied_tokenizer(path: str) -> Path:
    """`dense_copy`, whose tokenizer has to be there."""
    folder = dense_copy(path)
    if (reason := folder / NO_TOKENIZER).is_file():
        raise InputError(f"{reason.read_text(encoding='utf-8')}; name a folder that has it with --llm.model")
    return folder


def config_of(path: str) -> Any:
    """The transformers config of the model in a GGUF file; its weights are not read."""
    file = _checked(path)
    with _reading(f"cannot read the model in {path!r}"):
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def dequantise(file: Path, folder: Path) -> None:
    """Write a GGUF file's model as dense bfloat16 weights, with tokenizer and chat template, into `folder`."""
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    _model(file, torch.bfloat16).save_pretrained(folder)


def _model(file: Path, dtype: torch.dtype) -> Any:
    unpack = GgufConfig(dequantize=True)
    load: Any = AutoModelForCausalLM.from_pretrained  # its annotation knows no loading info
    with redirect_stderr(StringIO()):  # transformers' switch for progress bars does not reach the one drawn here
        model, info = load(
            file.parent, gguf_file=file.name, quantization_config=unpack, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise InputError(f"{file.name!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    return model


@contextmanager
def _reading(otherwise: str) -> Iterator[None]:
    """Damaged files raise errors of nearly every type: they become one line, which begins with `otherwise`."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the reason is in the error
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{otherwise}: {shorten(f'{type(error).__name__}: {error}', 300)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _checked(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no such GGUF file: {path!r}")
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path!r} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
    return file.resolve()


def _dense_dtype(file: Path) -> torch.dtype:
    """float32 if no weight is quantised and bfloat16 would round some."""
    reader = gguf.GGUFReader(file)
    if (parts := reader.get_field("split.count")) is not None and int(parts.contents()) > 1:
        raise InputError(
            f"{file.name!r} is one of {parts.contents()} parts: merge them first (llama-gguf-split --merge)"
        )
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return torch.float32 if kinds <= {"F32", "F16", "BF16"} and kinds != {"BF16"} else torch.bfloat16
