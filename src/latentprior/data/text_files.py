"""Text files as documents: whole, by paragraph or by line, read as they are asked for."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from latentprior.config import DocumentKind, TextConfig, to_dict
from latentprior.utils.errors import InputError, nearest_path

ENDING = ".txt"
BEGINNING = 2**20  # characters of a file in which "auto" looks for blank lines


def kind(path: Path) -> str:
    """The file's ending, lower case, without the one of its compression."""
    return Path(path.name.lower().removesuffix(".zst").removesuffix(".gz")).suffix


def open_bytes(path: Path) -> pa.NativeFile:
    """The file's bytes, decompressed by its ending."""
    return pa.input_stream(str(path), compression="detect")


TABLES = (".csv", ".tsv", ".parquet")


def read_table(path: str | Path, types: Mapping[str, pa.DataType] | None = None, *, nulls: bool = False) -> pa.Table:
    """A whole table of one of the kinds `TABLES`, also compressed.

    Args:
        types: of columns whose type is not to be guessed.
        nulls: whether a text in CSV or TSV such as "" or "NA" is a missing one.

    Raises:
        InputError: no such file, or none that can be read as its ending says.
    """
    path = Path(path)
    try:
        with open_bytes(path) as file:
            if kind(path) == ".parquet":
                table = pq.read_table(pa.BufferReader(file.read()))
                fields = [field.with_type((types or {}).get(field.name, field.type)) for field in table.schema]
                return table.cast(pa.schema(fields))
            return pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(block_size=2**28),  # no row is cut in two
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if kind(path) == ".tsv" else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=nulls),
            )
    except FileNotFoundError as error:
        raise InputError(f"cannot read {str(path)!r}: there is no such file{nearest_path(str(path))}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error


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
        # Whole files are what documents were then.
        if source["documents"] == "file" or not _has_text_files(Path(source["dataset"])):
            del source["documents"]
    return values


def _has_text_files(source: Path) -> bool:
    return any(kind(path) == ENDING for path in (source.rglob("*") if source.is_dir() else [source]))


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
