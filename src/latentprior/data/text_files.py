"""The texts of one file, read as they are asked for, from any number on: txt, jsonl, csv, parquet; and whole tables."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from latentprior.config import DocumentKind, TextConfig, to_dict
from latentprior.utils.errors import InputError, nearest_path, unknown

TABLES = (".csv", ".tsv", ".parquet")
DEFAULT_COLUMNS = ("text", "prompt", "content")
CSV_BLOCK = 2**24  # bytes; no row may be longer
ENDING = ".txt"
BEGINNING = 2**20  # characters of a file in which "auto" looks for blank lines


def kind(path: Path) -> str:
    """The file's ending in lower case, that of its compression left out."""
    return Path(path.name.lower().removesuffix(".zst").removesuffix(".gz")).suffix


def open_bytes(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="detect")


def kind_of_documents(chosen: DocumentKind, files: Iterable[Path]) -> DocumentKind:
    """What is a document of the text files among `files`, those of one source: of several each is, under "auto"."""
    several = sum(kind(file) == ENDING for file in files) > 1
    return "file" if chosen == "auto" and several else chosen


def read_text_file(path: Path, documents: DocumentKind, skip: int) -> Iterator[str]:
    """The documents of a text file after the first `skip`; blank paragraphs and lines are none.

    "auto" cuts it at blank lines, or, if there are none between text in its first mebi-characters, at line ends.
    """
    if documents == "auto":
        documents = "paragraph" if _has_paragraphs(path) else "line"
    with open_bytes(path) as file:
        if documents == "file":
            yield from islice([file.read().decode("utf-8-sig")], skip, None)
        else:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig")
            yield from islice(_paragraphs(lines) if documents == "paragraph" else _lines(lines), skip, None)


def text_settings(config: TextConfig) -> dict[str, Any]:
    """`config` as JSON values without what makes no difference: runs from before text files were cut can continue."""
    values = to_dict(config)
    for source in (values, *values["mix"]):
        path = Path(source["dataset"])
        has_text_files = any(kind(file) == ENDING for file in (path.rglob("*") if path.is_dir() else [path]))
        if source["documents"] == "file" or not has_text_files:  # whole files are what documents were then
            del source["documents"]
    return values


def _has_paragraphs(path: Path) -> bool:
    with open_bytes(path) as file:
        beginning = io.TextIOWrapper(file, encoding="utf-8-sig").read(BEGINNING)
    return next(islice(_paragraphs(io.StringIO(beginning)), 1, None), None) is not None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, block in groupby(lines, key=str.isspace):
        if not blank:
            yield "".join(block).removesuffix("\n")


def _lines(lines: Iterable[str]) -> Iterator[str]:
    return (line.removesuffix("\n") for line in lines if not line.isspace())


def _after(batches: Iterable[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if skip < len(batch):
            yield batch.slice(skip)
        skip = max(0, skip - len(batch))


def parquet_batches(file: pq.ParquetFile, columns: list[str] | None, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows after the first `skip`; row groups before them are not read."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    first = 0
    while first < len(sizes) and sizes[first] <= skip:
        skip -= sizes[first]
        first += 1
    groups = list(range(first, len(sizes)))
    return _after(file.iter_batches(batch_size=1024, row_groups=groups, columns=columns), skip)


def _read_jsonl(path: Path, column: str | None, skip: int) -> Iterator[Any]:
    read = 0
    with open_bytes(path) as file:
        for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
            if line.isspace():
                continue
            read += 1
            if 1 < read <= skip:  # the first record is always parsed: it decides the column
                continue
            where = f"{str(path)!r}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object")
            texts = (key for key, value in row.items() if isinstance(value, str | None))
            column = choose_column(column, row, texts, where)
            text = row[column]
            if read > skip:  # JSON can spell half a surrogate pair, which no tokenizer takes
                yield text.encode(errors="replace").decode() if isinstance(text, str) else text


def _read_csv(path: Path, column: str | None, skip: int) -> Iterator[str]:
    def reader(**convert: Any) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(open_bytes(path), **_csv_options(CSV_BLOCK, **convert))

    with reader() as first:  # types are guessed from the first block; later ones may differ, so they are then fixed
        column = _choose_field(column, first.schema, str(path))
    with reader(include_columns=[column], column_types={column: pa.string()}) as batches:
        for batch in _after(batches, skip):
            yield from batch.column(0).to_pylist()


def read_table(path: str | Path, types: Mapping[str, pa.DataType] | None = None, *, nulls: bool = False) -> pa.Table:
    """A whole table of one of the kinds `TABLES`, also compressed.

    Args:
        types: of columns whose type is not to be guessed.
        nulls: whether a text in CSV or TSV such as "" or "NA" is a missing one.
    """
    path = Path(path)
    try:
        with open_bytes(path) as file:
            if kind(path) == ".parquet":
                table = pq.read_table(pa.BufferReader(file.read()))
                fields = [field.with_type((types or {}).get(field.name, field.type)) for field in table.schema]
                return table.cast(pa.schema(fields))
            # Blocks of more than the largest file, so that no row is cut in two.
            options = _csv_options(2**28, kind(path), column_types=types, strings_can_be_null=nulls)
            return pyarrow.csv.read_csv(file, **options)
    except FileNotFoundError as error:
        raise InputError(f"cannot read {str(path)!r}: there is no such file{nearest_path(str(path))}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error


def _csv_options(block: int, ending: str = ".csv", **convert: Any) -> dict[str, Any]:
    """Cells may hold line ends; no row may be longer than a block, in bytes."""
    return {
        "read_options": pyarrow.csv.ReadOptions(block_size=block),
        "parse_options": pyarrow.csv.ParseOptions(delimiter="\t" if ending == ".tsv" else ",", newlines_in_values=True),
        "convert_options": pyarrow.csv.ConvertOptions(**convert),
    }


def _read_parquet(path: Path, column: str | None, skip: int) -> Iterator[Any]:
    # Parquet is read from its end: a compressed one has to be in memory whole.
    plain = path.suffix.lower() == ".parquet"
    table = pq.ParquetFile(pa.OSFile(str(path)) if plain else pa.BufferReader(open_bytes(path).read()))
    column = _choose_field(column, table.schema_arrow, str(path))
    for batch in parquet_batches(table, [column], skip):
        yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, Any, int], Iterator[Any]]] = {
    ENDING: read_text_file,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def choose_column(column: str | None, columns: Iterable[str], texts: Iterable[str], where: str) -> str:
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
    return choose_column(column, schema.names, texts, where)
