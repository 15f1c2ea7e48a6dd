"""Descriptions of meta-neurons: offline from their examples, or by a language model, which is put to the test.

The test (detection): given the description alone, does the model tell unseen texts in which the unit fires from texts
in which it does not? A description of another unit, tried on the same texts, shows what chance gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentprior.judge.answers import Answer, Answers
from latentprior.judge.endpoint import Cost, EndpointJudge
from latentprior.neurons.detection import DescriptionTask, description_tasks, detection_auc, detections_of
from latentprior.neurons.offline_descriptions import offline_line
from latentprior.neurons.prompts import LONGEST
from latentprior.neurons.store import DESCRIPTIONS_SCHEMA, NeuronStore, Unit, write_descriptions
from latentprior.utils.locks import locked
from latentprior.utils.progress import Report, silent

EVERY = 500  # units between reports of progress


@dataclass(frozen=True)
class Description:
    """What a unit responds to, in words. All but `baseline` and `shown` is stored.

    Attributes:
        unit: block * d_mlp + index.
        consistency: 1 to 5: how many of the texts in which the unit fires fit, by the model that wrote it.
        complexity: 1 to 5, from a token over phrases and topics to something abstract, by that model.
        detection: AUC, 0.5 at chance, of telling held-out texts in which the unit fires from ones in which not.
        reason: why an endpoint's description or its detection score is missing.
        baseline: `detection` with the description of another unit; None if there is none.
        shown: texts, with marked tokens, that an endpoint's description was made from.
    """

    unit: int
    description: str
    source: Literal["endpoint", "offline"]
    consistency: int | None = None
    complexity: int | None = None
    detection: float | None = None
    reason: str = ""
    baseline: float | None = None
    shown: tuple[str, ...] = ()


def describe_offline(unit: Unit) -> Description:
    """A description without an endpoint: common tokens at the peaks, and won tasks; see `offline_line`."""
    return Description(unit.row["unit"], offline_line(unit), "offline")


def describe(
    tasks: Sequence[DescriptionTask], judge: EndpointJudge, *, seed: int, report: Report = silent
) -> tuple[list[Description], list[Answers[Any]]]:
    """Descriptions by an endpoint, each with its detection score, in the order of `tasks`, and the judge's answers.

    One that failed is offline, with the reason; no score is made up. Everything but the partner whose description is
    the baseline depends on the unit and `seed` alone: more units can be described later, and nothing is paid for twice.
    """
    asked = [i for i, task in enumerate(tasks) if task.request is not None]
    first = judge.ask([request for task in tasks if (request := task.request)], report=report)
    described = dict(zip(asked, first.results, strict=True))
    texts = {i: answer.value["description"] for i, answer in described.items() if answer.value is not None}
    detections = detections_of(tasks, texts, seed)
    second = judge.ask(list(detections.values()), report=_after(report, len(asked), None))
    scored = dict(zip(detections, second.results, strict=True))
    descriptions = [
        _description(task, described.get(i), scored.get((i, True)), scored.get((i, False)))
        for i, task in enumerate(tasks)
    ]
    return descriptions, [first, second]


def estimate(
    tasks: Sequence[DescriptionTask],
    judge: EndpointJudge,
    *,
    seed: int,
    prompt_price: float | None = None,
    answer_price: float | None = None,
) -> Cost:
    """An upper bound of what `describe` will take if no call fails, less what the cache holds; calls nothing.

    Descriptions that are not known yet are taken to be as long as they may. Prices are of a million tokens.
    """
    requests = {i: task.request for i, task in enumerate(tasks) if task.request is not None}
    known = dict(zip(requests, judge.recall(list(requests.values())), strict=True))
    # One character a task: equal requests would be counted once.
    texts = {i: value["description"] if value else chr(0x4E00 + i % 20000) * LONGEST for i, value in known.items()}
    detections = detections_of(tasks, texts, seed).values()
    return judge.estimate([*requests.values(), *detections], prompt_price=prompt_price, answer_price=answer_price)


def describe_store(
    folder: str | Path,
    judge: EndpointJudge | None,
    count: int,
    *,
    seed: int,
    report: Report = silent,
    prompt_price: float | None = None,
    answer_price: float | None = None,
) -> dict[str, Any]:
    """Describe every unit of a store offline and, with a judge, `count` of them by its endpoint.

    These are the units that win most tasks, then those of the largest kurtosis. Offline descriptions are written first,
    so that a judge that fails takes nothing away. Descriptions by an endpoint stay until it describes the unit again.

    Args:
        report: gets units and answers done; before the first call upper bounds, "tokens" and, with a price, "cost".
        prompt_price, answer_price: of a million tokens.

    Returns:
        a summary of JSON values: "units", "offline" and "endpoint" (descriptions of each source), "detection" and
        "baseline" (mean AUC, None without one), "scored" (units with each of the two), "failed" (requests), "reasons"
        (how often each), "calls", "troubles", "tokens" and "cost" (of the estimate), "model".
    """
    with locked(folder):
        store = NeuronStore(folder)
        chosen = _chosen(store, count) if judge is not None else []
        total = len(store) + 3 * len(chosen)
        descriptions: dict[int, Description] = {}
        for unit in store:
            descriptions[unit.row["unit"]] = _earlier(unit) or describe_offline(unit)
            if len(descriptions) % EVERY == 0 or len(descriptions) == len(store):
                report(len(descriptions), total, {})
        _write(folder, descriptions)
        if judge is None or not chosen:
            return _counts(descriptions)
        units = [store.unit(*divmod(number, store.info["d_mlp"])) for number in chosen]
        tasks = description_tasks(store, units, seed)
        prices = {"prompt_price": prompt_price, "answer_price": answer_price}
        expected = estimate(tasks, judge, seed=seed, **prices).figures()
        report(len(store), total, expected)
        described, answers = describe(tasks, judge, seed=seed, report=_after(report, len(store), total))
        descriptions |= {description.unit: description for description in described}
        _write(folder, descriptions)
        return _summary(described, answers) | expected | {"model": judge.model} | _counts(descriptions)


def _write(folder: str | Path, descriptions: Mapping[int, Description]) -> None:
    ordered = [descriptions[unit] for unit in sorted(descriptions)]
    columns = {name: [getattr(item, name) for item in ordered] for name in DESCRIPTIONS_SCHEMA.names}
    write_descriptions(folder, pa.table(columns, schema=DESCRIPTIONS_SCHEMA))


def _earlier(unit: Unit) -> Description | None:
    if unit.row["source"] != "endpoint":
        return None
    return Description(**{name: unit.row[name] for name in DESCRIPTIONS_SCHEMA.names})


def _counts(descriptions: Mapping[int, Description]) -> dict[str, int]:
    endpoint = sum(description.source == "endpoint" for description in descriptions.values())
    return {"units": len(descriptions), "offline": len(descriptions) - endpoint, "endpoint": endpoint}


def _description(
    task: DescriptionTask,
    described: Answer[dict[str, Any]] | None,
    tested: Answer[list[float]] | None,
    baseline: Answer[list[float]] | None,
) -> Description:
    if task.request is None or described is None or described.value is None:
        reason = described.reason if described else "too few texts in which the unit fires"
        return replace(describe_offline(task.unit), reason=f"no endpoint's description: {reason}")
    reason = ""
    if tested is None:
        reason = "no detection score: too few held-out texts"
    elif tested.value is None:
        reason = f"no detection score: {tested.reason}"
    return Description(
        task.unit.row["unit"],
        source="endpoint",
        **described.value,
        detection=detection_auc(task.fires, tested),
        reason=reason,
        baseline=detection_auc(task.fires, baseline),
        shown=task.request.firing,
    )


def _chosen(store: NeuronStore, count: int) -> list[int]:
    """Units that win most tasks first, then those of the largest kurtosis."""
    kurtosis = [-math.inf if k is None or math.isnan(k) else k for k in store.units["kurtosis"].to_pylist()]
    tasks = [len(names or ()) for names in store.units["tasks"].to_pylist()]
    return sorted(range(len(store)), key=lambda unit: (-tasks[unit], -kurtosis[unit], unit))[:count]


def _summary(described: Sequence[Description], answers: Sequence[Answers[Any]]) -> dict[str, Any]:
    scores = {
        name: [value for item in described if (value := getattr(item, name)) is not None]
        for name in ("detection", "baseline")
    }
    endpoint = sum(item.source == "endpoint" for item in described)
    return {
        **{name: float(np.mean(values)) if values else None for name, values in scores.items()},
        "scored": {name: len(values) for name, values in scores.items()},
        "failed": {
            "description": len(described) - endpoint,
            "detection": endpoint - len(scores["detection"]),
            "requests": sum(part.failed for part in answers),
        },
        "reasons": dict(Counter(item.reason for item in described if item.reason)),
        "calls": sum(part.calls for part in answers),
        "troubles": dict(sum((part.failures for part in answers), Counter())),
    }


def _after(report: Report, offset: int, total: int | None) -> Report:
    """A report that goes on from `offset`; its total is `total`, or what it is told and `offset`."""

    def shifted(done: int, of: int | None, figures: Mapping[str, Any]) -> None:
        report(offset + done, total if total is not None else of and of + offset, figures)

    return shifted
