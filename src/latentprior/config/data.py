"""Where activations come from: language model, text, store or live stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latentprior.config.base import (
    File,
    Folder,
    Side,
    Size,
    bytes_of,
    changeable,
    choices,
    meaningless,
    positive,
    size_of,
    unit_interval,
)
from latentprior.config.embedded import SMOLLM2, default_layer
from latentprior.utils.errors import InputError

DocumentKind = Literal["auto", "file", "paragraph", "line"]
LongDocuments = Literal["auto", "chunk", "cut"]


@dataclass(frozen=True)
class LLMConfig:
    """Which language model, and how it is held."""

    model: str = SMOLLM2
    """Hugging Face id, folder, or an embedded model: "smollm2-135m" (requirements-assets.txt), "gemma-3-270m"
    (requirements-gemma.txt). With `gguf` the name it is recorded by."""
    gguf: File | None = None
    """A GGUF file of the weights and, unless the folder `model` has one, the tokenizer; dequantised once, cached."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; "auto" is bfloat16 where the device is fast at it, else float32."""
    device_map: Literal["none", "auto"] = "none"
    """"auto" spreads a model too large for one GPU over all of the machine's; the rest is on `device`. One process."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off: such models are refused."""

    def __post_init__(self) -> None:
        choices(self)
        if self.gguf is not None:
            if self.revision is not None:
                raise InputError(f"a GGUF file has no revision {self.revision!r}")
            if self.model == SMOLLM2:  # left out
                object.__setattr__(self, "model", Path(self.gguf).stem)


@dataclass(frozen=True)
class TextSource:
    """One of several sources of documents that are mixed."""

    dataset: str
    """As `TextConfig.dataset`."""
    subset: str | None = None
    """Configuration name of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    column: str | None = None
    """Column that holds the text."""
    weight: float = 1.0
    """Documents from this source in proportion to the others' weights, until it ends."""
    documents: DocumentKind = "auto"
    """As `TextConfig.documents`."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "weight")


@dataclass(frozen=True)
class TextConfig:
    """Which documents."""

    dataset: str = "sae-probes"
    """The embedded "sae-probes", a Hugging Face dataset, a txt, jsonl, csv or parquet file (also .zst), or a folder."""
    part: Literal["train", "heldout", "all"] = "train"
    """Documents to train on, documents held out of training, or both."""
    limit: int | None = None
    """Stop after this many documents of the chosen part."""
    column: str | None = None
    """Column that holds the text; by default "text", "prompt" or "content", or the only text column."""
    documents: DocumentKind = "auto"
    """What is a document of a txt file: the whole file, a paragraph (between blank lines) or a line. "auto": of several
    files each is one; a single file is cut into paragraphs, or into lines if it has no blank ones."""
    heldout: float = 0.05
    """Share of the documents that is held out, chosen by a hash of the text: equal texts fall on one side."""
    subset: str | None = None
    """Configuration name of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    mix: list[TextSource] = field(default_factory=list)
    """Several sources instead of `dataset`, interleaved by their weights; every document is used once."""

    def __post_init__(self) -> None:
        choices(self)
        unit_interval(self, "heldout")
        positive(self, "limit")


@dataclass(frozen=True)
class RecordConfig:
    """Record activations of a language model into a store on disk."""

    output: Folder = changeable()
    """Folder of the store."""
    layers: list[int] = field(default_factory=list)
    """Blocks to record, counted from 0: layer 15 is the output of block 15, hidden_states[16] of transformers. By
    default 15, of gemma-3-270m 9."""
    max_activations: int | None = None
    """Stop at exactly this many activations of each layer; all of the text by default."""
    max_length: int = 2048
    """Most tokens of a document that the model sees at once, the beginning-of-sequence token included."""
    resume: bool = changeable(False)
    """Continue an interrupted recording in the same folder; nothing is lost or repeated."""
    batch_tokens: int = 4096
    """Most tokens of one forward pass of the language model, padding included."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    side: Side = "output"
    """A block's output, its input, or the hidden units of its MLP."""
    long_documents: LongDocuments = "auto"
    """Longer documents come in chunks of `max_length` ("chunk") or are cut to it, what is cut being counted ("cut");
    "auto" is chunks, but for the embedded corpus, whose documents are cut."""
    positions: Literal["all", "last", "random"] = "all"
    """Positions of a document to record; the first one never is."""
    positions_per_document: int = 8
    """How many positions "random" draws for each document."""
    chat: bool = False
    """Wrap every document as a user message in the tokenizer's chat template."""
    sinks: Literal["drop", "keep"] = "drop"
    """Attention sinks (norm over 10 times the median) are left out and counted, or kept."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage precision."""
    shard_rows: int = 65536
    """A shard is closed once it holds at least this many rows."""
    disk_budget: Size | None = changeable(None)
    """Most bytes of the store ("20GB"), at least two shards; its oldest shards go first."""
    wait: bool = changeable(False)
    """At the disk budget, wait for a trainer that follows (train --follow) instead of removing the oldest shard."""
    wait_seconds: float = changeable(600.0)
    """With `wait`: give up when no shard was released for this long; --resume continues."""
    seed: int = 0
    """Seed of the random positions."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "max_length", "positions_per_document", "batch_tokens", "max_activations", "shard_rows")
        positive(self, "wait_seconds")
        budget = self.budget_bytes
        if not self.layers:
            object.__setattr__(self, "layers", [default_layer(self.llm.model)])
        if self.wait and budget is None:
            raise InputError("RecordConfig.wait needs a disk_budget, for example '20GB'")
        if not self.wait:
            meaningless(self, "without --wait", "wait_seconds")
        if self.positions != "random":
            meaningless(self, "unless --positions is random", "positions_per_document")

    @property
    def chunks(self) -> bool:
        """Whether long documents come in chunks."""
        return _in_chunks(self.long_documents, self.text)

    @property
    def budget_bytes(self) -> int | None:
        """`disk_budget` in bytes."""
        return bytes_of("RecordConfig.disk_budget", self.disk_budget)


@dataclass(frozen=True)
class StreamConfig:
    """Live activations: the language model fills a mixing buffer, from which batches are drawn; no disk is needed."""

    RENAMED = {"lanes": "document_shards"}

    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=TextConfig)
    side: Side = "output"
    """A block's output, its input, or the hidden units of its MLP."""
    max_length: int = 2048
    """Most tokens of a document that the model sees at once, the beginning-of-sequence token included."""
    buffer: Size = "65536"
    """Size of the buffer that batches are drawn from, over all processes: activations ("64k") or bytes ("2GB")."""
    batch_tokens: int = 4096
    """Most tokens of one forward pass of the language model, padding included; fewer if the buffer is small."""
    statistics: int = 65536
    """Tokens, over all processes, of the warm-up pass for the normalizer's statistics; they are trained on later."""
    record_to: Folder | None = changeable(None)
    """Also keep what is streamed in this activation store (with several processes: one for each, below this folder)."""
    disk_budget: Size | None = changeable(None)
    """Most bytes of `record_to` ("20GB"); its oldest shards go first."""
    long_documents: LongDocuments = "auto"
    """Longer documents come in chunks of `max_length` ("chunk") or are cut to it, what is cut being counted ("cut");
    "auto" is chunks, but for the embedded corpus, whose documents are cut."""
    sinks: Literal["drop", "keep"] = "drop"
    """Attention sinks (norm over 10 times the median) are left out and counted, or kept."""
    buffer_device: Literal["auto", "cpu"] = changeable("auto")
    """"auto" keeps the buffer on the trainer's device, "cpu" in (pinned) host memory."""
    document_shards: int | None = changeable(None)
    """Shards of the documents that make up every batch. A process serves some of them, so batches do not depend on the
    number of processes, which may be at most this; by default 24, or the least multiple that suffices."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "max_length", "batch_tokens", "statistics", "document_shards")
        size_of("buffer", self.buffer)
        bytes_of("disk_budget", self.disk_budget)
        if self.record_to is None:
            meaningless(self, "without --record-to", "disk_budget")

    @property
    def chunks(self) -> bool:
        """Whether long documents come in chunks."""
        return _in_chunks(self.long_documents, self.text)


def _in_chunks(long_documents: LongDocuments, text: TextConfig) -> bool:
    """The embedded corpus, the default, is cut: short texts, and what was measured on it stays comparable."""
    if long_documents == "auto":
        return bool(text.mix) or text.dataset != TextConfig.dataset
    return long_documents == "chunk"
