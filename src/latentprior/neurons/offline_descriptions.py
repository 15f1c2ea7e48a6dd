"""What a meta-neuron responds to in one line, without any service: common tokens at its peaks, tasks that it wins."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

from latentprior.neurons.store import Example, Unit

RECURRING = 0.15  # share of a sign's texts whose peak a common token must be: 3 of 20; never under two texts
TOKENS = 3  # how many tokens, or tasks, are named
TOLD_APART = 0.6  # AUC from which a task is worth naming: among a hard task's best units are some that tell nothing
LONGEST_PIECE = 40  # characters


def stronger_sign(unit: Unit) -> int:
    """1 if the unit's largest activation is further from its mean than its smallest one, else -1."""
    mean = unit.row["mean"]
    high = max((example.value - mean for example in unit.top()), default=-math.inf)
    low = max((mean - example.value for example in unit.bottom()), default=-math.inf)
    return 1 if high >= low else -1


def side(unit: Unit, sign: int) -> list[Example]:
    """Texts with the most extreme activations of a sign, the most extreme first."""
    return unit.top() if sign > 0 else unit.bottom()


def offline_line(unit: Unit) -> str:
    """Tokens and n-grams at the peaks of the stronger sign (of both if both have common ones), then won tasks.

    A line such as `on " film", " movie" (14 of 20 top texts; 6 in " of the film"); tells 92_glue_sst2 apart (AUC
    0.81)`. Tokens that differ in case and spaces alone count as one.
    """
    sign = stronger_sign(unit)
    first, second = _peaks(side(unit, sign), sign), _peaks(side(unit, -sign), -sign)
    parts = [first or _uncommon(side(unit, sign))]
    if second:
        parts.append(second if sign > 0 else f"positive {second}")
    return "; ".join([*parts, *_tasks(unit)])


def _peaks(examples: Sequence[Example], sign: int) -> str:
    needed = max(2, math.ceil(RECURRING * len(examples)))
    counts = Counter(_ending(example, 1) for example in examples)
    common = [key for key, count in counts.most_common(TOKENS) if count >= needed]
    if not common:
        return ""
    agreeing = [example for example in examples if _ending(example, 1) in common]
    kind = "top" if sign > 0 else "bottom"
    share = f"{len(agreeing)} of {len(examples)} {kind} texts{_phrase(agreeing, needed)}"
    tokens = ", ".join(_commonest([e for e in agreeing if _ending(e, 1) == key], 1) for key in common)
    return f"{'' if sign > 0 else 'negative '}on {tokens} ({share})"


def _phrase(examples: Sequence[Example], needed: int) -> str:
    """The longest n-gram that ends at the peak in enough texts, and in how many."""
    for length in (3, 2):
        endings = [(_ending(example, length), example) for example in examples if example.peak >= length - 1]
        for key, count in Counter(key for key, _ in endings).most_common(1):
            if count >= needed:
                return f"; {count} in {_commonest([e for k, e in endings if k == key], length)}"
    return ""


def _uncommon(examples: Sequence[Example]) -> str:
    if not examples:
        return "no texts"
    distinct = {_ending(example, 1): example for example in reversed(examples)}.values()
    tokens = [_quoted(example.token_strings[example.peak]) for example in reversed(distinct)]
    return f"no common token: peaks on {', '.join(tokens[:TOKENS])}{', ...' if len(tokens) > TOKENS else ''}"


def _tasks(unit: Unit) -> list[str]:
    won = sorted(zip(unit.row["task_aucs"], unit.row["tasks"], strict=True), key=lambda task: (-task[0], task[1]))
    told_apart = [task for task in won if task[0] >= TOLD_APART]
    if not told_apart:
        return []
    (auc, name), *others = told_apart
    named = [f"{name} ({auc:.2f})" for auc, name in others[: TOKENS - 1]]
    more = len(others) - len(named)
    line = ", ".join([f"tells {name} apart (AUC {auc:.2f})", *named])
    return [f"{line} and {more} more task{'s' * (more > 1)}" if more else line]


def _ending(example: Example, length: int) -> tuple[str, ...]:
    pieces = example.token_strings[max(0, example.peak - length + 1) : example.peak + 1]
    return tuple(piece.strip().casefold() or piece for piece in pieces)


def _commonest(examples: Sequence[Example], length: int) -> str:
    spelled = ("".join(e.token_strings[max(0, e.peak - length + 1) : e.peak + 1]) for e in examples)
    return _quoted(Counter(spelled).most_common(1)[0][0])


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= LONGEST_PIECE else f"{text[:LONGEST_PIECE]}…", ensure_ascii=False)
