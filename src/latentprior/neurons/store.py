"""The store of what each meta-neuron responds to: Parquet files that are read a unit, or all units, at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentprior.data.store.manifest import damaged
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json, replaced, sync

INFO = "neurons.json"
UNITS = "units.parquet"
EXAMPLES = "examples.parquet"
DESCRIPTIONS = "descriptions.parquet"
ROW_GROUP = 2048  # examples that are read together: some tens of units

UNITS_SCHEMA = pa.schema(
    {
        "unit": pa.int32(),
        "block": pa.int16(),
        "index": pa.int32(),
        "mean": pa.float32(),
        "variance": pa.float32(),
        "kurtosis": pa.float32(),
        "minimum": pa.float32(),
        "maximum": pa.float32(),
        "share_above": pa.list_(pa.float32()),
        "histogram": pa.list_(pa.int32()),
        "histogram_low": pa.float32(),
        "histogram_high": pa.float32(),
        "promoted": pa.list_(pa.string()),
        "promoted_values": pa.list_(pa.float32()),
        "suppressed": pa.list_(pa.string()),
        "suppressed_values": pa.list_(pa.float32()),
        "neighbours": pa.list_(pa.int32()),
        "neighbour_correlations": pa.list_(pa.float32()),
        "tasks": pa.list_(pa.string()),
        "task_aucs": pa.list_(pa.float32()),
        "task_signs": pa.list_(pa.int8()),
    }
)
EXAMPLES_SCHEMA = pa.schema(
    {
        "unit": pa.int32(),
        "kind": pa.string(),
        "rank": pa.int16(),
        "quantile": pa.float32(),
        "value": pa.float32(),
        "doc": pa.int64(),
        "peak": pa.int16(),
        "pieces": pa.list_(pa.string()),
        "values": pa.list_(pa.float32()),
    }
)
DESCRIPTIONS_SCHEMA = pa.schema(
    {
        "unit": pa.int32(),
        "description": pa.string(),
        "source": pa.string(),
        "consistency": pa.int8(),
        "complexity": pa.int8(),
        "detection": pa.float32(),
        "reason": pa.string(),
    }
)

_READ_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, RecursionError)
_INFO_FIELDS = {"kind": str, "blocks": int, "d_mlp": int, "thresholds": list, "quantiles": list}


@dataclass(frozen=True)
class Example:
    """One document in which a unit fired.

    Attributes:
        kind: "top", "bottom" or "quantile".
        rank: place among the examples of its kind, from 0: the most extreme first, quantiles from the lowest.
        quantile: where its peak lies among the random documents' ones; None unless `kind` is "quantile".
        value: the unit's activation at the peak.
        doc: `Document.index`.
        peak: where the unit is largest (top), smallest (bottom) or strongest (quantile) in `token_strings`.
        token_strings: text of each token; joined they are the document's text.
        values: activation at each token, float32; 0 where none was taken: at the first position and at sinks.
    """

    kind: str
    rank: int
    quantile: float | None
    value: float
    doc: int
    peak: int
    token_strings: list[str]
    values: np.ndarray


@dataclass(frozen=True)
class Unit:
    """One meta-neuron, with its row of `NeuronStore.units` as plain values."""

    block: int
    index: int
    row: dict[str, Any]
    examples: list[Example]

    def top(self) -> list[Example]:
        """Documents with the largest activations."""
        return self._of("top")

    def bottom(self) -> list[Example]:
        """Documents with the smallest activations, the smallest first."""
        return self._of("bottom")

    def quantiles(self) -> list[Example]:
        """Random documents, from the middle of what the unit does to its largest magnitude."""
        return self._of("quantile")

    def _of(self, kind: str) -> list[Example]:
        return sorted((example for example in self.examples if example.kind == kind), key=lambda example: example.rank)


class NeuronStore:
    """What `latentprior neurons` wrote, read in bounded memory: only the table of units is held.

    `info` is neurons.json, `units` a row a unit, with the columns of descriptions.parquet (null where there is none).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        units = _read_table(self.folder / UNITS, UNITS_SCHEMA)
        wanted = self.info["blocks"] * self.info["d_mlp"]
        if not np.array_equal(units["unit"].to_numpy(), np.arange(wanted)):
            raise damaged(self.folder / UNITS, f"it does not hold the {wanted} units of {INFO} in order")
        self.units: pa.Table = _with_descriptions(units, self.folder / DESCRIPTIONS)
        self._examples = _open_parquet(self.folder / EXAMPLES, EXAMPLES_SCHEMA)
        self._firsts, self._lasts = self._row_groups()

    def __len__(self) -> int:
        return len(self.units)

    def unit(self, block: int, index: int) -> Unit:
        """One unit: reads the few row groups that hold its examples."""
        blocks, d_mlp = self.info["blocks"], self.info["d_mlp"]
        if not (0 <= block < blocks and 0 <= index < d_mlp):
            raise InputError(
                f"no unit {index} in block {block}: {self.folder} holds blocks 0 to {blocks - 1} "
                f"of units 0 to {d_mlp - 1}"
            )
        number = block * d_mlp + index
        groups = np.flatnonzero((self._firsts <= number) & (number <= self._lasts)).tolist()
        rows: list[dict[str, Any]] = []
        if groups:
            table = self._read(groups)
            rows = table.filter(pa.array(table["unit"].to_numpy() == number)).to_pylist()
        return self._unit(number, self.units.slice(number, 1).to_pylist()[0], rows)

    def __iter__(self) -> Iterator[Unit]:
        """All units in order; a row group's examples are held at a time."""
        examples = self._examples_by_unit()
        number, rows = next(examples, (len(self), []))
        for start in range(0, len(self), ROW_GROUP):
            for unit, row in enumerate(self.units.slice(start, ROW_GROUP).to_pylist(), start):
                yield self._unit(unit, row, rows if unit == number else [])
                if unit == number:
                    number, rows = next(examples, (len(self), []))

    def _examples_by_unit(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        groups = range(self._examples.num_row_groups)
        rows = chain.from_iterable(self._read([group]).to_pylist() for group in groups)
        yield from ((number, list(found)) for number, found in groupby(rows, key=itemgetter("unit")))

    def _read(self, groups: list[int]) -> pa.Table:
        with reading(self.folder / EXAMPLES):
            return self._examples.read_row_groups(groups)

    def _unit(self, number: int, row: dict[str, Any], rows: list[dict[str, Any]]) -> Unit:
        block, index = divmod(number, self.info["d_mlp"])
        return Unit(block, index, row, [_example(example) for example in rows])

    def _row_groups(self) -> tuple[np.ndarray, np.ndarray]:
        footer = self._examples.metadata
        column = EXAMPLES_SCHEMA.get_field_index("unit")
        chunks = [footer.row_group(group).column(column) for group in range(footer.num_row_groups)]
        if any(chunk.path_in_schema != "unit" or not chunk.is_stats_set for chunk in chunks):
            raise damaged(self.folder / EXAMPLES, "it does not say which units its row groups hold")
        firsts = np.array([chunk.statistics.min for chunk in chunks], dtype=np.int64)
        lasts = np.array([chunk.statistics.max for chunk in chunks], dtype=np.int64)
        ordered = (np.diff(firsts) >= 0).all() and (firsts[1:] >= lasts[:-1]).all()
        if not ordered or (len(lasts) and lasts[-1] >= len(self)):
            raise damaged(self.folder / EXAMPLES, f"its units are not those of {UNITS} in order")
        return firsts, lasts


def write_store(folder: str | Path, info: dict[str, Any], units: pa.Table, examples: Iterable[pa.Table]) -> None:
    """Write a store whole or not at all; one that lies in the folder is replaced, with its descriptions.

    Args:
        units: of `UNITS_SCHEMA`, in order of `unit`.
        examples: tables of `EXAMPLES_SCHEMA`, all together in order of `unit`; written as they come.

    Raises:
        ValueError: tables of another schema, or out of order.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / UNITS) as units_partial, replaced(folder / EXAMPLES) as examples_partial:
            _write_parquet(units_partial, UNITS_SCHEMA, [units], 65536)
            _write_parquet(examples_partial, EXAMPLES_SCHEMA, examples, ROW_GROUP)
            # Without neurons.json there is no store: a kill from here on leaves none rather than a mixed one.
            for name in (INFO, DESCRIPTIONS):
                (folder / name).unlink(missing_ok=True)
            sync(folder)
        replace_json(folder / INFO, info)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def write_units(folder: str | Path, info: dict[str, Any], table: pa.Table) -> None:
    """Write all units of the store in `folder` again, a table of `UNITS_SCHEMA`; examples and descriptions stay."""
    _replace_parquet(Path(folder) / UNITS, UNITS_SCHEMA, table)
    replace_json(Path(folder) / INFO, info)


def write_descriptions(folder: str | Path, table: pa.Table) -> None:
    """Replace the descriptions of the store in `folder` by a table of `DESCRIPTIONS_SCHEMA`, in order of `unit`."""
    _replace_parquet(Path(folder) / DESCRIPTIONS, DESCRIPTIONS_SCHEMA, table)


def _replace_parquet(path: Path, schema: pa.Schema, table: pa.Table) -> None:
    try:
        with replaced(path) as partial:
            _write_parquet(partial, schema, [table], 65536)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], row_group: int) -> None:
    last = -1
    options: dict[str, Any] = {"compression": "zstd"}
    if schema is EXAMPLES_SCHEMA:
        # Activations are bfloat16 numbers: split by byte, two of their four streams are zeros.
        options |= {"use_dictionary": ["kind", "pieces.list.element"]}
        options["use_byte_stream_split"] = ["values.list.element"]
    with pq.ParquetWriter(path, schema, **options) as writer:
        for table in tables:
            table = table.select(schema.names).cast(schema)
            units = table["unit"].to_numpy()
            if len(units) and (units[0] < last or (np.diff(units) < 0).any()):
                raise ValueError(f"{path.name}: units must come in order")
            last = int(units[-1]) if len(units) else last
            writer.write_table(table, row_group_size=row_group)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    with reading(path, f"{folder} holds no neurons: {INFO} is missing (write it with latentprior neurons)"):
        info = json.loads(path.read_bytes())
    if not isinstance(info, dict):
        raise damaged(path, "it is not an object")
    for key, kind in _INFO_FIELDS.items():
        if not isinstance(info.get(key), kind):
            raise damaged(path, f"it has no {key!r} that is a {kind.__name__}")
    if info["kind"] != "neurons":
        raise damaged(path, f"its kind is {info['kind']!r}, not 'neurons'")
    return info


@contextmanager
def reading(path: Path, missing: str | None = None) -> Iterator[None]:
    """Errors of a file's reader as one line that names the file, or that is `missing` where there is none."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(missing or f"{path} is missing: write the neurons again") from error
    except _READ_ERRORS as error:
        raise damaged(path, error) from error


def _open_parquet(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    with reading(path):
        file = pq.ParquetFile(path)
        if not file.schema_arrow.equals(schema):
            raise damaged(path, f"it holds columns {file.schema_arrow.names}, or some of another type")
    return file


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    file = _open_parquet(path, schema)
    with reading(path):
        return file.read()


def _with_descriptions(units: pa.Table, path: Path) -> pa.Table:
    names = [name for name in DESCRIPTIONS_SCHEMA.names if name != "unit"]
    table = _read_table(path, DESCRIPTIONS_SCHEMA) if path.exists() else DESCRIPTIONS_SCHEMA.empty_table()
    number = table["unit"].to_numpy()
    if len(np.unique(number)) < len(number) or (len(number) and not 0 <= number.min() <= number.max() < len(units)):
        raise damaged(path, "it describes units that are not there, or one twice")
    place = np.full(len(units), -1)
    place[number] = np.arange(len(number))
    described = table.select(names).take(pa.array(place, mask=place < 0))
    for name in names:
        units = units.append_column(name, described[name])
    return units


def _example(row: dict[str, Any]) -> Example:
    columns = {name: row[name] for name in ("kind", "rank", "quantile", "value", "doc", "peak")}
    return Example(**columns, token_strings=row["pieces"], values=np.asarray(row["values"], dtype=np.float32))
