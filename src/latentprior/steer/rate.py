"""Ratings of an experiment's texts by an endpoint, in place of the offline concept score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latentprior.config import SteerConfig
from latentprior.judge.endpoint import EndpointJudge
from latentprior.judge.ratings import SCALES, Kind, RatingRequest
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.progress import Phase


def rate_texts(
    config: SteerConfig, endpoint: EndpointJudge | None, table: pa.Table, tasks: Sequence[SteeringTask], phase: Phase
) -> tuple[pa.Table, dict[str, Any] | None]:
    """The rows of an experiment with an endpoint's ratings, and how that went; the rows as they are without one.

    The rating over its best one (0 to 2 as in AxBench; 0 to 100 for personas) replaces the column "concept", whose
    offline score is kept as "concept_offline"; "fluency" is its rating over 2. Failed ratings are NaN, counted, and
    never scored. Tokens, and money where prices are known, show in the progress figures before the first call.
    """
    if endpoint is None:
        return table, None
    kind: Kind = "trait" if config.experiment == "persona" else "concept"
    described = {task.direction.name: task.concept for task in tasks}
    rows = zip(*(table[name].to_pylist() for name in ("direction", "prompt_text", "text")), strict=True)
    concepts = [RatingRequest(kind, text, prompt=prompt, description=described[name]) for name, prompt, text in rows]
    requests = concepts + [RatingRequest("fluency", request.continuation) for request in concepts]
    judge = config.judge
    cost = endpoint.estimate(requests, prompt_price=judge.input_price, answer_price=judge.output_price)
    report = phase("rate")
    if cost.calls:
        report(0, cost.calls, cost.figures())
    ratings = endpoint(requests, report=report)
    concept, fluency = np.split(ratings.values(), [len(concepts)])
    table = _with_column(table, "concept_offline", table["concept"].to_numpy())
    table = _with_column(table, "concept", concept / SCALES[kind])
    table = _with_column(table, "fluency", fluency / SCALES["fluency"])
    how = {"model": endpoint.model, "kind": kind, "failed": ratings.failed, "calls": ratings.calls}
    return table, how | {"troubles": dict(ratings.failures)}


def _with_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """NaN is null."""
    column = pa.array(values, pa.float64(), from_pandas=True)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)
