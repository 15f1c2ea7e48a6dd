"""Ratings of an experiment's texts by an endpoint, in place of the offline concept score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentprior.config import SteerConfig
from latentprior.judge.endpoint import endpoint_of
from latentprior.judge.ratings import SCALES, Kind, RatingRequest
from latentprior.steer.tasks import Case
from latentprior.utils.progress import Phase

Rater = Callable[[pa.Table, Sequence[Case], Phase], tuple[pa.Table, dict[str, Any] | None]]


def rater_of(config: SteerConfig) -> Rater:
    """What rates the rows of an experiment: an endpoint, or nothing if none is configured.

    The returned function replaces the column "concept" by the endpoint's rating over its best one (0 to 2 as in
    AxBench; 0 to 100 for personas) and keeps the offline score as "concept_offline"; "fluency" is its rating over 2.
    Failed ratings are NaN, counted, and never scored. Tokens, and money where prices are known, show in the progress
    figures before the first call. Paid answers are kept in ``ratings.jsonl`` of the experiment's folder.

    Raises:
        InputError: the environment variable of the key is not set.
    """
    endpoint = endpoint_of(config.judge, Path(config.output) / "ratings.jsonl")
    if endpoint is None:
        return lambda table, cases, phase: (table, None)
    judge = config.judge

    def rate(table: pa.Table, cases: Sequence[Case], phase: Phase) -> tuple[pa.Table, dict[str, Any]]:
        kind: Kind = "trait" if config.experiment == "persona" else "concept"
        concepts = requests(table, cases, kind)
        fluencies = [RatingRequest("fluency", request.continuation) for request in concepts]
        cost = endpoint.estimate(concepts + fluencies, prompt_price=judge.input_price, answer_price=judge.output_price)
        report = phase("rate")
        if cost.calls:
            report(0, cost.calls, cost.figures())
        ratings = endpoint(concepts + fluencies, report=report)
        values = ratings.values()
        concept, fluency = values[: len(concepts)] / SCALES[kind], values[len(concepts) :] / SCALES["fluency"]
        table = with_column(table, "concept_offline", table["concept"].to_numpy())
        table = with_column(with_column(table, "concept", concept), "fluency", fluency)
        return table, {
            "model": endpoint.model,
            "kind": kind,
            "failed": ratings.failed,
            "calls": ratings.calls,
            "troubles": dict(ratings.failures),
        }

    return rate


def requests(table: pa.Table, cases: Sequence[Case], kind: Kind) -> list[RatingRequest]:
    """A request for the concept of each row's direction."""
    concepts = {case.direction.name: case.concept for case in cases}
    rows = zip(*(table[name].to_pylist() for name in ("direction", "prompt_text", "text")), strict=True)
    return [RatingRequest(kind, text, prompt=prompt, description=concepts[name]) for name, prompt, text in rows]


def with_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """`table` with a column of numbers, in place of one of the same name; NaN is null."""
    column = pa.array(values, pa.float64(), from_pandas=True)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)
