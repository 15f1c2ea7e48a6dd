"""What was collected of units and documents, as the tables of a neuron store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentprior.neurons.document_batches import DocumentBatch, DocumentTokens
from latentprior.neurons.reservoir import at_quantiles
from latentprior.neurons.statistics import UnitStatistics
from latentprior.neurons.store import EXAMPLES_SCHEMA, UNITS_SCHEMA
from latentprior.neurons.token_strings import TokenStrings
from latentprior.neurons.top_documents import TopDocuments
from latentprior.neurons.top_logits import TopLogits
from latentprior.neurons.top_probing_units import ProbedTask
from latentprior.neurons.unit_reader import UnitReader

_UNITS = 128  # units whose examples are assembled together


def unit_table(
    statistics: Sequence[UnitStatistics],
    logits: TopLogits | None,
    neighbours: tuple[Tensor, Tensor],
    tasks: Mapping[int, Sequence[ProbedTask]],
    strings: TokenStrings,
) -> pa.Table:
    """units.parquet: one row a unit, block by block; `neighbours` [units, k], those of correlation 0 left out."""
    d_mlp = len(statistics[0].centre)
    total = len(statistics) * d_mlp
    unit = np.arange(total)
    columns: dict[str, np.ndarray | pa.Array] = {"unit": unit, "block": unit // d_mlp, "index": unit % d_mlp}
    bounds = [part.bounds() for part in statistics]
    joined = {
        "mean": [part.mean() for part in statistics],
        "variance": [part.variance() for part in statistics],
        "kurtosis": [part.kurtosis() for part in statistics],
        "minimum": [part.low for part in statistics],
        "maximum": [part.high for part in statistics],
        "share_above": [part.share_above() for part in statistics],
        "histogram": [part.histogram.clamp(max=torch.iinfo(torch.int32).max) for part in statistics],
        "histogram_low": [low for low, _ in bounds],
        "histogram_high": [high for _, high in bounds],
    }
    columns |= {name: _column(torch.cat(parts).cpu().numpy()) for name, parts in joined.items()}
    columns |= _logit_columns(logits, total, strings)
    number, correlation = (part.numpy() for part in neighbours)
    correlated = correlation != 0
    columns["neighbours"] = _ragged(pa.array(number[correlated]), correlated.sum(axis=1))
    columns["neighbour_correlations"] = _ragged(pa.array(correlation[correlated]), correlated.sum(axis=1))
    columns |= _task_columns(tasks, total)
    return pa.table({name: _as(columns[name], UNITS_SCHEMA.field(name).type) for name in UNITS_SCHEMA.names})


def with_tasks(units: pa.Table, tasks: Mapping[int, Sequence[ProbedTask]]) -> pa.Table:
    """`units` with other tasks that they are among the best at."""
    for name, column in _task_columns(tasks, len(units)).items():
        units = units.set_column(units.schema.get_field_index(name), UNITS_SCHEMA.field(name), column)
    return units


def _task_columns(tasks: Mapping[int, Sequence[ProbedTask]], total: int) -> dict[str, pa.Array]:
    of_units = [tasks.get(i, ()) for i in range(total)]
    return {
        name: pa.array([[getattr(task, part) for task in found] for found in of_units], UNITS_SCHEMA.field(name).type)
        for name, part in (("tasks", "task"), ("task_aucs", "auc"), ("task_signs", "sign"))
    }


def _logit_columns(logits: TopLogits | None, total: int, strings: TokenStrings) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for side in ("promoted", "suppressed"):
        ids = torch.zeros(total, 0, dtype=torch.long) if logits is None else getattr(logits, side)
        values = torch.zeros(total, 0) if logits is None else getattr(logits, f"{side}_values")
        distinct, which = np.unique(ids.numpy(), return_inverse=True)
        names = pa.array(strings(distinct.tolist()), pa.string()).take(pa.array(which.ravel()))
        columns[side] = _ragged(names, np.full(total, ids.shape[1]))
        columns[f"{side}_values"] = _column(values.numpy())
    return columns


def example_tables(
    top: Sequence[TopDocuments],
    bottom: Sequence[TopDocuments],
    reader: UnitReader,
    sample: DocumentBatch,
    quantiles: Sequence[float],
    documents: DocumentTokens,
    strings: TokenStrings,
) -> Iterator[pa.Table]:
    """examples.parquet, some units at a time: each block's `top` and `bottom`, and quantiles of a random `sample`."""
    starts = range(0, reader.d_mlp, _UNITS)
    shown = _Shown(_distinct([*top, *bottom], sample, starts), documents, strings)
    for block, units in enumerate(reader(sample.x)):
        for start in starts:
            stop = min(start + _UNITS, reader.d_mlp)
            found = {
                "top": top[block].best(start, stop),
                "bottom": bottom[block].best(start, stop),
                "quantile": at_quantiles(units[:, start:stop].bfloat16(), sample, quantiles),
            }
            yield _example_table(block * reader.d_mlp + start, found, quantiles, shown)


def _distinct(kept: Iterable[TopDocuments], sample: DocumentBatch, starts: Iterable[int]) -> np.ndarray:
    parts = [sample.doc.numpy()]
    for documents in kept:
        parts += [np.unique(documents.best(start, start + _UNITS)[1].numpy()) for start in starts]
    distinct = np.unique(np.concatenate(parts))
    return distinct[distinct >= 0]


class _Shown:
    """The token strings of the documents that are examples, end to end."""

    def __init__(self, doc: np.ndarray, documents: DocumentTokens, strings: TokenStrings) -> None:
        ids = documents.of(doc)
        self._doc = doc
        self._length = np.array([len(row) for row in ids])
        self._start = np.concatenate([[0], self._length.cumsum()[:-1]])
        chunks = [
            pa.array(list(chain(*strings.of_documents(ids[i : i + 1024]))), pa.string())
            for i in range(0, len(ids), 1024)
        ]
        self._strings = pa.chunked_array(chunks, pa.string()).combine_chunks()

    def lengths(self, doc: np.ndarray) -> np.ndarray:
        return self._length[self._doc.searchsorted(doc)]

    def token_strings(self, doc: np.ndarray) -> pa.Array:
        place = self._doc.searchsorted(doc)
        length = self._length[place]
        before = length.cumsum() - length
        token = np.arange(length.sum()) + np.repeat(self._start[place] - before, length)
        return _ragged(self._strings.take(pa.array(token)), length)


def _example_table(
    first: int, found: Mapping[str, tuple[Tensor, Tensor, Tensor]], quantiles: Sequence[float], shown: _Shown
) -> pa.Table:
    """The examples of consecutive units: each of `found` has values [m, k], documents [m, k], activations [m, k, T]."""
    width = max(values.shape[2] for _, _, values in found.values())
    value = torch.cat([part[0] for part in found.values()], dim=1).numpy()
    doc = torch.cat([part[1] for part in found.values()], dim=1).numpy()
    values = torch.cat(
        [torch.nn.functional.pad(part[2].float(), (0, width - part[2].shape[2])) for part in found.values()], dim=1
    ).numpy()
    kept = doc >= 0
    counts = [part[0].shape[1] for part in found.values()]
    kind = np.repeat(list(found), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    quantile = np.concatenate([np.full(sum(counts) - counts[-1], np.nan), quantiles])
    unit = np.repeat(np.arange(first, first + len(doc)), kept.sum(axis=1))
    doc, value, values = doc[kept], value[kept], values[kept]
    length = shown.lengths(doc)
    inside = np.arange(width) < length[:, None]
    each = np.broadcast_to(np.arange(sum(counts)), kept.shape)[kept]
    columns: dict[str, np.ndarray | pa.Array] = {
        "unit": unit,
        "kind": pa.array(kind[each].tolist()),
        "rank": rank[each],
        "quantile": pa.array(quantile[each], from_pandas=True),  # NaN to null
        "value": value,
        "doc": doc,
        "peak": 1 + (values[:, 1:] == value[:, None]).argmax(axis=1),  # never the first position, which holds a 0
        "pieces": shown.token_strings(doc),
        "values": _ragged(pa.array(values[inside]), length),
    }
    return pa.table({name: _as(columns[name], EXAMPLES_SCHEMA.field(name).type) for name in EXAMPLES_SCHEMA.names})


def _column(values: np.ndarray) -> pa.Array:
    """[n] as numbers, [n, k] as lists."""
    if values.ndim == 1:
        return pa.array(values)
    return _ragged(pa.array(values.ravel()), np.full(len(values), values.shape[1]))


def _ragged(values: pa.Array, lengths: np.ndarray) -> pa.Array:
    """Lists of the given lengths, cut from `values`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _as(column: np.ndarray | pa.Array, kind: pa.DataType) -> pa.Array:
    array: pa.Array = pa.array(column) if isinstance(column, np.ndarray) else column
    return array.cast(kind)
