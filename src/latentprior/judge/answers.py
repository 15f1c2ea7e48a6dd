"""What a judge is asked and gives back, whatever the question: requests, answers, and JSON in what a model says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

Message = dict[str, str]
Value = TypeVar("Value")
Parsed = TypeVar("Parsed", covariant=True)


class Malformed(ValueError):
    """An answer without a valid value; the message is one line."""


@runtime_checkable
class Request(Protocol[Parsed]):
    """A question to a judge, and how its answer is read."""

    version: ClassVar[int]  # raised whenever the wording changes: answers to another wording are not comparable
    answer_tokens: ClassVar[int]  # an estimate; models that reason first bill more

    @property
    def kind(self) -> str: ...  # what is asked, in a word

    def messages(self) -> list[Message]: ...  # the conversation that asks, in the form of the chat completions protocol

    def parse(self, answer: str) -> Parsed: ...  # a JSON value, never None; raises `Malformed` if there is no valid one

    def again(self, answer: str) -> list[Message]: ...  # what continues the conversation after a malformed answer


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """What came of one request."""

    value: Value | None  # None if it failed: never a made-up one
    reason: str = ""  # why it failed
    calls: int = 0  # 0 if it was in the cache
    failures: tuple[str, ...] = ()  # of its calls: an HTTP status, "time-out", "connection", "not JSON", "malformed"


@dataclass(frozen=True)
class Answers(Generic[Value]):
    """Answers in the order of their requests; those of equal requests are one and the same object."""

    results: list[Answer[Value]]

    @property
    def failed(self) -> int:
        return sum(result.value is None for result in self.results)

    @property
    def calls(self) -> int:
        return sum(result.calls for result in self._distinct())

    @property
    def failures(self) -> Counter[str]:
        """How often calls failed in each way, also where a later one gave a value."""
        return Counter(failure for result in self._distinct() for failure in result.failures)

    def _distinct(self) -> Iterable[Answer[Value]]:
        return {id(result): result for result in self.results}.values()


def ask_again(answer: str, wanted: str) -> list[Message]:
    """The malformed answer and what is wanted instead; nothing after an empty answer."""
    if not answer.strip():
        return []
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": wanted}]


def json_objects(answer: str) -> list[dict[str, Any]]:
    """The outermost JSON objects in a model's answer; thoughts before a "</think>" are left out."""
    # Reasoning models that are served without a parser of their thoughts put them before the answer.
    answer = answer.rpartition("</think>")[2]
    decoder = json.JSONDecoder(object_pairs_hook=_distinct)
    found, begin = [], answer.find("{")
    while begin >= 0:
        try:
            value, end = decoder.raw_decode(answer, begin)
            found.append(value)
        except json.JSONDecodeError:
            end = begin + 1
        except RecursionError as error:
            raise Malformed("the answer is nested too deeply") from error
        begin = answer.find("{", end)
    return found


def whole_number(value: Any, valid: range, name: str) -> int:
    """`value` as an int; raises `Malformed` if it is not a whole number in `valid`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value not in valid:
        raise Malformed(f"the {name} must be a whole number from {valid[0]} to {valid[-1]}, got {shown(value)}")
    return int(value)


def shown(value: Any) -> str:
    """A value on one short line."""
    return re.sub(r"\s+", " ", repr(value))[:40]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Malformed("a JSON object names a key twice")
    return dict(pairs)
