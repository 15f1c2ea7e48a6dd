"""Documents from files, from Hugging Face datasets and from the embedded corpus, streamed and split by a hash."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from latentprior import corpus
from latentprior.config import TextConfig
from latentprior.errors import InputError, unknown

DEFAULT_COLUMNS = ("text", "prompt", "content")
_CSV_BLOCK = 2**24  # bytes; no row may be longer
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


@dataclass(frozen=True)
class Document:
    """One text."""

    index: int
    """Its number in the source, empty documents and every part counted: the same whatever is selected."""
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

    Raises:
        InputError: no such file, data set or column, a file that cannot be read (all naming it), or no document left.
    """
    return islice(_select(_records(config), config), config.limit)


def _select(records: Iterable[_Record], config: TextConfig) -> Iterator[Document]:
    found = False
    for index, (text, source, trainable) in enumerate(records):
        if not isinstance(text, str | None):
            raise InputError(f"{source}: the column holds {type(text).__name__}, not text")
        if not text or text.isspace():
            continue
        if config.part == "all" or (trainable and (config.part == "heldout") == is_heldout(text, config.heldout)):
            found = True
            yield Document(index, text, source)
    if not found:
        raise InputError(f"no documents in part {config.part!r} of {config.dataset!r}")


def is_heldout(text: str, share: float) -> bool:
    """Whether `text` belongs to the `share` of all texts that is kept from training."""
    digest = blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest) < share * 2**64


def _records(config: TextConfig) -> Iterator[_Record]:
    path = Path(config.dataset)
    if config.dataset == corpus.NAME:
        return _corpus_records(corpus.corpus_file())
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in _READERS)
        if not files:
            raise InputError(
                f"the folder {config.dataset!r} holds no file that ends in {', '.join(_READERS)} (or .zst)"
            )
        return (record for file in files for record in _file_records(file, file.relative_to(path), config.column))
    if path.exists():
        if _kind(path) not in _READERS:
            raise unknown("file type", path.name, _READERS)
        return _file_records(path, Path(path.name), config.column)
    if _kind(path) in _READERS or not _HUB_ID.fullmatch(config.dataset):
        raise InputError(f"no such file or folder: {config.dataset!r}")
    return _hub_records(config)


# --- The embedded corpus


def _corpus_records(path: Path) -> Iterator[_Record]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
        for text, source, split in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield _Record(text, source, trainable=split == corpus.TRAIN_ELIGIBLE)


# --- Files


def _kind(path: Path) -> str:
    """The file's ending, lower case, without the one of its compression."""
    return Path(path.name.lower().removesuffix(".zst").removesuffix(".gz")).suffix


def _file_records(path: Path, name: Path, column: str | None) -> Iterator[_Record]:
    try:
        for text in _READERS[_kind(path)](path, column):
            yield _Record(text, name.as_posix())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read {str(path)!r}: {reason}") from error


def _open(path: Path) -> pa.NativeFile:
    """The file's bytes, decompressed by its ending."""
    return pa.input_stream(str(path), compression="detect")


def _read_txt(path: Path, column: str | None) -> Iterator[str]:
    with _open(path) as file:
        yield file.read().decode("utf-8-sig")


def _read_jsonl(path: Path, column: str | None) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if line.isspace():
                continue
            where = f"{str(path)!r}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object")
            column = _choose(column, row, (key for key, value in row.items() if isinstance(value, str | None)), where)
            text = row[column]
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            yield text.encode(errors="replace").decode() if isinstance(text, str) else text


def _read_csv(path: Path, column: str | None) -> Iterator[str]:
    def reader(**convert: Any) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            _open(path),
            read_options=pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(**convert),
        )

    with reader() as first:  # types are guessed from the first block; later ones may differ, so they are then fixed
        column = _choose_field(column, first.schema, str(path))
    with reader(include_columns=[column], column_types={column: pa.string()}) as batches:
        for batch in batches:
            yield from batch.column(0).to_pylist()


def _read_parquet(path: Path, column: str | None) -> Iterator[Any]:
    # Parquet is read from its end: a compressed one has to be in memory whole.
    plain = path.suffix.lower() == ".parquet"
    table = pq.ParquetFile(pa.OSFile(str(path)) if plain else pa.BufferReader(_open(path).read()))
    column = _choose_field(column, table.schema_arrow, str(path))
    for batch in table.iter_batches(batch_size=1024, columns=[column]):
        yield from batch.column(0).to_pylist()


_READERS: dict[str, Callable[[Path, str | None], Iterator[Any]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --- Hugging Face datasets


def _hub_records(config: TextConfig) -> Iterator[_Record]:
    import datasets  # slow to import

    try:
        with _no_bars():
            stream = datasets.load_dataset(config.dataset, name=config.subset, split=config.split, streaming=True)
            if stream.features is not None:
                row = stream.features
                texts = [k for k, v in row.items() if isinstance(v, datasets.Value) and v.dtype.endswith("string")]
            else:  # a source without a schema: its first row shows the columns
                row = next(iter(stream), {})
                texts = [k for k, v in row.items() if isinstance(v, str | None)]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot open the dataset {config.dataset!r}: {reason}") from error
    column = _choose(config.column, row, texts, config.dataset)
    return (_Record(row[column], config.dataset) for row in stream)


@contextmanager
def _no_bars() -> Iterator[None]:
    """`datasets` without its progress bars."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# --- Columns


def _choose(column: str | None, columns: Iterable[str], texts: Iterable[str], where: str) -> str:
    """The column to read: `column` if it exists, else a default one, else the only one that holds text."""
    if column is not None:
        if column not in (columns := list(columns)):
            raise unknown(f"column of {where}", column, columns)
        return column
    texts = list(texts)
    for name in DEFAULT_COLUMNS:
        if name in texts:
            return name
    if len(texts) != 1:
        found = f"{len(texts)} text columns ({', '.join(texts)})" if texts else "no text column"
        raise InputError(f"{where} has {found} and none called {', '.join(DEFAULT_COLUMNS)}: name one as column")
    return texts[0]


def _choose_field(column: str | None, schema: pa.Schema, where: str) -> str:
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    return _choose(column, schema.names, texts, where)
