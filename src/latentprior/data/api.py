"""`latentprior.record`: a store of a loaded model's activations, of texts in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import nn

from latentprior.config import LLMConfig, RecordConfig, TextConfig, from_dict
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.record import record_documents
from latentprior.data.text import Document
from latentprior.lm.hooks.blocks import language_model
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent

GIVEN = "texts"  # stands for a data set's name


def record(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    layers: Sequence[int],
    output: str | Path,
    report: Report = silent,
    **options: Any,
) -> ActivationStore:
    """Record a language model's activations of `texts` into a store on disk, as the command `latentprior record` does.

    With a list the same call continues an interrupted recording and opens a finished one; an iterator is used up and
    cannot be continued. Empty texts are skipped, their numbers are not.

    Args:
        texts: documents; long ones come in chunks of ``max_length`` tokens.
        layers: blocks to record, counted from 0: their outputs [rows, d], unless ``side`` says otherwise.
        output: folder of the store.
        report: gets the number of rows recorded so far.
        **options: other fields of `latentprior.config.RecordConfig`, such as ``max_length=128``,
            ``max_activations=100_000``, ``side="mlp"`` or ``dtype="float32"``.

    Examples:
        >>> store = lp.record(model, tokenizer, texts, layers=[1], output="runs/acts")
        >>> store.layers, store[0].shape == (store.width,), store[:8].shape == (8, store.width)
        ((1,), True, True)
    """
    if isinstance(texts, str):
        raise InputError("texts are a list of documents, got one string: put it in a list")
    if not layers:
        raise InputError("layers is empty: name at least one block, for example [15]")
    described: dict[str, Any] = {"dataset": GIVEN}
    if isinstance(texts, Sequence):
        described |= {"documents": len(texts), "digest": _digest(texts)}
    name = getattr(getattr(language_model(model), "config", None), "_name_or_path", "") or "a given model"
    config = from_dict(
        RecordConfig,
        {
            "output": str(output),
            "layers": list(layers),
            "llm": LLMConfig(model=name),
            "text": TextConfig(dataset=GIVEN, part="all"),
            "resume": isinstance(texts, Sequence),
            **options,
        },
    )
    return record_documents(config, lambda: (model, tokenizer), lambda: _documents(texts), described, report)


def _documents(texts: Iterable[str]) -> Iterator[Document]:
    return (Document(index, text) for index, text in enumerate(texts) if text.strip())


def _digest(texts: Sequence[str]) -> str:
    digest = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
