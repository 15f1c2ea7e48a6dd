"""Documents from files, Hugging Face datasets and the embedded corpus: mixed, streamed, split by a hash, resumable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from latentprior.config import TextConfig, TextSource
from latentprior.data import corpus
from latentprior.data.text_files import READERS, choose_column, kind, kind_of_documents, parquet_batches
from latentprior.utils.errors import InputError, nearest_path, unknown
from latentprior.utils.hub import unreachable

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@dataclass(frozen=True)
class Document:
    """One text."""

    index: int
    """Its number in the source or mixture, empty documents and every part counted: the same whatever is selected."""
    text: str
    source: str = ""
    """File (relative to the folder), data set or task that it comes from."""


class _Record(NamedTuple):
    text: Any
    source: str
    trainable: bool = True


def documents(config: TextConfig) -> Iterator[Document]:
    """The documents that `config` selects, in a fixed order, read as they are asked for.

    Empty documents are skipped. A document is held out if a hash of its text falls below `config.heldout`: equal
    texts are on one side, in any order and any source. Of the embedded corpus, the test rows of the probing tasks are
    in neither "train" nor "heldout", only in "all".

    Several sources are interleaved: the next document comes from the source with the lowest (taken + 1) / weight, the
    first of equals, so that none is ever a whole document behind its share, until the first ends. A source that holds
    no document of this part is an `InputError`.
    """
    return Reader(config)


class Reader(Iterator[Document]):
    """The iterator that `documents` gives, and its way to continue elsewhere.

    ``Reader(config, state=reader.state())`` gives what `reader` would have given. Files, row groups and the shards of
    Hugging Face datasets that are done are not opened, and of the current one what is done is only skipped.
    """

    def __init__(self, config: TextConfig, *, state: Mapping[str, Any] | None = None) -> None:
        chosen = config.mix or [
            TextSource(config.dataset, config.subset, config.split, config.column, documents=config.documents)
        ]
        self._config, self._weights = config, [source.weight for source in chosen]
        if len({(s.dataset, s.subset, s.split, s.column) for s in chosen}) < len(chosen):
            raise InputError(f"a source is twice in the mix of {', '.join(repr(source.dataset) for source in chosen)}")
        self._sources = [_open_source(source) for source in chosen]
        if state is None:
            for source, options in zip(self._sources, chosen, strict=True):
                if not any(_is_wanted(record, config) for record in source):
                    raise InputError(f"no documents in part {config.part!r} of {options.dataset!r}")
            state = {"index": 0, "given": 0, "taken": [0] * len(chosen), "sources": [{}] * len(chosen)}
        if len(state["sources"]) != len(chosen):
            raise InputError(f"the text has {len(chosen)} sources, its saved position {len(state['sources'])}")
        self._index, self._given, self._taken = state["index"], state["given"], list(state["taken"])
        self._live = {i: source for i, source in enumerate(self._sources) if state["sources"][i] is not None}
        for i, source in self._live.items():
            source.seek(state["sources"][i])
        self._documents = self._read()

    def __next__(self) -> Document:
        return next(self._documents)

    def state(self) -> dict[str, Any]:
        """The position after the last document, as JSON values."""
        sources = [source.state() if i in self._live else None for i, source in enumerate(self._sources)]
        return {"index": self._index, "given": self._given, "taken": list(self._taken), "sources": sources}

    def _read(self) -> Iterator[Document]:
        mixed = self._mixed()
        while self._given != self._config.limit and (record := next(mixed, None)) is not None:
            index, self._index = self._index, self._index + 1
            if _is_wanted(record, self._config):
                self._given += 1
                yield Document(index, record.text, record.source)

    def _mixed(self) -> Iterator[_Record]:
        streams = {i: iter(source) for i, source in self._live.items()}
        while self._live:
            i = min(self._live, key=lambda i: (self._taken[i] + 1) / self._weights[i])
            record = next(streams[i], None)
            if record is None:
                del self._live[i]
            else:
                self._taken[i] += 1
                yield record


def _is_wanted(record: _Record, config: TextConfig) -> bool:
    text = record.text
    if not isinstance(text, str | None):
        raise InputError(f"{record.source}: the column holds {type(text).__name__}, not text")
    if not text or text.isspace():
        return False
    return config.part == "all" or (record.trainable and (config.part == "heldout") == is_heldout(text, config.heldout))


def is_heldout(text: str, share: float) -> bool:
    """Whether `text` is in the held-out split, the `share` of all texts that is kept from training."""
    digest = blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest) < share * 2**64


# --- Sources: records in order, from any position on


class _Files:
    """Files, one after another, each opened at a number of records to skip."""

    def __init__(self, dataset: str, files: Mapping[str, Callable[[int], Iterator[_Record]]]) -> None:
        self._dataset, self._names, self._open = dataset, [*files, None], list(files.values())
        self._file = self._record = 0

    def seek(self, state: Mapping[str, Any]) -> None:
        self._file, self._record = state.get("file", 0), state.get("record", 0)
        if state and state["name"] not in self._names[self._file : self._file + 1]:
            raise InputError(f"cannot continue in {self._dataset!r}: its files are not those of the saved position")

    def state(self) -> dict[str, Any]:
        return {"file": self._file, "name": self._names[self._file], "record": self._record}

    def __iter__(self) -> Iterator[_Record]:
        while self._file < len(self._open):
            for record in self._open[self._file](self._record):
                self._record += 1
                yield record
            self._file, self._record = self._file + 1, 0


class _Hub:
    """A streamed Hugging Face dataset, which keeps its own position."""

    def __init__(self, options: TextSource) -> None:
        self._stream, self._column = _open_stream(options)
        self._dataset, self._given, self._begun = options.dataset, None, False

    def seek(self, state: Mapping[str, Any]) -> None:
        self._given, self._begun = state.get("stream"), False
        if self._given is not None:
            self._stream.load_state_dict(self._given)

    def state(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict() if self._begun else self._given}

    def __iter__(self) -> Iterator[_Record]:
        try:
            for row in self._stream:
                self._begun = True
                yield _Record(row[self._column], self._dataset)
        except (pa.ArrowException, OSError, ValueError, RuntimeError) as error:
            raise _failed(f"read the dataset {self._dataset!r}", error) from error


def _open_source(options: TextSource) -> _Files | _Hub:
    path = Path(options.dataset)
    if options.dataset == corpus.NAME:
        return _Files(corpus.NAME, {corpus.NAME: partial(_corpus_records, corpus.corpus_file())})
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and kind(p) in READERS)
        if not files:
            endings = f"{', '.join(READERS)} (or .zst)"
            raise InputError(f"the folder {options.dataset!r} holds no file that ends in {endings}")
        names = [file.relative_to(path).as_posix() for file in files]
    elif path.exists():
        if kind(path) not in READERS:
            raise unknown("file type", path.name, READERS)
        files, names = [path], [path.name]
    elif kind(path) in READERS or not _HUB_ID.fullmatch(options.dataset):
        raise InputError(f"no such file or folder: {options.dataset!r}{nearest_path(options.dataset)}")
    else:
        return _Hub(options)
    documents = kind_of_documents(options.documents, files)
    opened = {
        name: partial(_file_records, file, name, documents if kind(file) == ".txt" else options.column)
        for file, name in zip(files, names, strict=True)
    }
    return _Files(options.dataset, opened)


def _failed(action: str, error: Exception) -> InputError:
    reason = str(error).partition("\n")[0]
    return InputError(f"cannot {action}: {reason}")


def _corpus_records(path: Path, skip: int) -> Iterator[_Record]:
    for batch in parquet_batches(pq.ParquetFile(path), None, skip):
        for text, source, split in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield _Record(text, source, trainable=split == corpus.TRAIN_ELIGIBLE)


def _file_records(path: Path, name: str, option: Any, skip: int) -> Iterator[_Record]:
    """`option` is the column, or what is a document of a text file."""
    try:
        for text in READERS[kind(path)](path, option, skip):
            yield _Record(text, name)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _failed(f"read {str(path)!r}", error) from error


def _open_stream(options: TextSource) -> tuple[Any, str]:
    import datasets  # slow to import

    name = options.dataset
    if (silence := unreachable()) is not None:
        raise InputError(f"cannot open the dataset {name!r}: no such file or folder{nearest_path(name)}, and {silence}")
    try:
        with _no_bars():
            stream = datasets.load_dataset(name, name=options.subset, split=options.split, streaming=True)
            if stream.features is not None:
                row = stream.features
                texts = [k for k, v in row.items() if isinstance(v, datasets.Value) and v.dtype.endswith("string")]
            else:  # a source without a schema: its first row shows the columns
                row = next(iter(stream), {})
                texts = [k for k, v in row.items() if isinstance(v, str | None)]
    except (OSError, ValueError, RuntimeError) as error:
        raise _failed(f"open the dataset {name!r}{nearest_path(name)}", error) from error
    return stream, choose_column(options.column, row, texts, name)


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
