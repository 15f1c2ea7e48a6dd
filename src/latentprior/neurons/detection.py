"""The test of a description: does it tell unseen texts in which a unit fires from texts in which it does not?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentprior.judge.answers import Answer
from latentprior.neurons.offline_descriptions import side, stronger_sign
from latentprior.neurons.prompts import DescriptionRequest, DetectionRequest, marked, plain
from latentprior.neurons.store import Example, NeuronStore, Unit
from latentprior.stats.auc import aucs

POOL = 32  # random units whose top texts serve as texts in which another unit does not fire
SILENT = 5  # texts without the unit beside those that a description is made from
FEWEST = 3  # texts of each kind that a description, or its test, takes
LOW_QUANTILE = 0.75  # random texts up to here are taken as ones in which the unit does not fire


@dataclass(frozen=True)
class DescriptionTask:
    """A unit, the request for its description (None if it fires in too few texts), and the test of that.

    The test: held-out texts in a random order, none if they are too few, and in which of them it fires.
    """

    unit: Unit
    request: DescriptionRequest | None
    texts: tuple[str, ...] = ()
    fires: tuple[bool, ...] = ()


def description_tasks(store: NeuronStore, units: Sequence[Unit], seed: int) -> list[DescriptionTask]:
    """What is asked about each of `units`: a function of the store, the unit and `seed` alone.

    The sign with the larger peak is meant. Of its texts those of even rank are shown, the others are held out.
    """
    size = min(POOL, len(store))
    pool = np.sort(np.random.default_rng([seed, 1]).choice(len(store), size, replace=False)).tolist()
    others = [store.unit(*divmod(number, store.info["d_mlp"])) for number in pool] if units else []
    return [_task(unit, others, seed) for unit in units]


def detections_of(
    tasks: Sequence[DescriptionTask], descriptions: Mapping[int, str], seed: int
) -> dict[tuple[int, bool], DetectionRequest]:
    """Detection by the description of each task that has one, and by that of another task on the same texts.

    Requests by (number of the task, whether the description is its own).
    """
    cycle = np.random.default_rng([seed, 3]).permutation(len(tasks)).tolist()
    partner = dict(zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    requests = {}
    for i, description in descriptions.items():
        if tasks[i].texts:
            requests[i, True] = DetectionRequest(description, tasks[i].texts)
            if partner[i] != i and partner[i] in descriptions:
                requests[i, False] = DetectionRequest(descriptions[partner[i]], tasks[i].texts)
    return requests


def detection_auc(fires: Sequence[bool], answer: Answer[list[float]] | None) -> float | None:
    """AUC of an answer's numbers, exact, ties as half; None without an answer."""
    if answer is None or answer.value is None:
        return None
    return aucs(torch.tensor(answer.value, dtype=torch.float64)[:, None], torch.tensor(fires).long()).item()


def _task(unit: Unit, pool: Sequence[Unit], seed: int) -> DescriptionTask:
    sign = stronger_sign(unit)
    examples = side(unit, sign)
    shown, held_out = examples[::2], examples[1::2]
    if len(shown) < FEWEST:
        return DescriptionTask(unit, None)
    generator = np.random.default_rng([seed, 2, unit.row["unit"]])
    shown_texts = [plain(example) for example in shown]
    fires = _distinct(held_out, shown_texts)
    low, foreign = _silent(unit, pool, [*shown_texts, *fires], generator)
    silent = _filled(low[1::2], foreign, len(fires))
    request = DescriptionRequest(
        tuple(marked(shown, sign, unit.row["mean"])), tuple(_filled(low[::2], foreign, SILENT))
    )
    if min(len(fires), len(silent)) < FEWEST:
        return DescriptionTask(unit, request)
    texts, labels = [*fires, *silent], [True] * len(fires) + [False] * len(silent)
    order = generator.permutation(len(texts)).tolist()
    return DescriptionTask(unit, request, tuple(texts[i] for i in order), tuple(labels[i] for i in order))


def _silent(
    unit: Unit, pool: Sequence[Unit], taken: Sequence[str], generator: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Texts in which a unit does not fire: random ones with a low peak, and top ones of other units in random order.

    Never a document of its own top and bottom texts, nor a text that is taken, nor one of its neighbours.
    """
    own = {example.doc for example in (*unit.top(), *unit.bottom())}
    near = {unit.row["unit"], *(unit.row["neighbours"] or ())}
    low = [e for e in unit.quantiles() if e.quantile is not None and e.quantile <= LOW_QUANTILE and e.doc not in own]
    foreign = [e for other in pool if other.row["unit"] not in near for e in other.top() if e.doc not in own]
    low_texts = _distinct(low, taken)
    order = generator.permutation(len(foreign)).tolist()
    return low_texts, _distinct([foreign[i] for i in order], [*taken, *low_texts])


def _distinct(examples: Sequence[Example], taken: Sequence[str]) -> list[str]:
    """Texts of examples, none twice and none that is taken: a corpus may hold a text under several numbers."""
    return list(dict.fromkeys([*taken, *map(plain, examples)]))[len(set(taken)) :]


def _filled(first: Sequence[str], rest: list[str], count: int) -> list[str]:
    """`count` texts: up to half from `first`, the others taken out of `rest` while there are some."""
    chosen = list(first[: -(-count // 2)])
    return chosen + [rest.pop() for _ in range(min(count - len(chosen), len(rest)))]
