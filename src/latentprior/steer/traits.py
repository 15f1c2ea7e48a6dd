"""Persona traits: those of the paper (evil, sycophantic, hallucinating) in wording of our own, in ``traits.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files


@dataclass(frozen=True)
class Trait:
    """A way of answering that system prompts can ask for."""

    name: str
    description: str  # what an answer that has the trait does, for a judge to read
    positive: list[str]  # system prompts that ask for the trait
    negative: list[str]  # system prompts that ask for its opposite
    questions: list[str]  # a direction is made from the answers to these
    held_out_questions: list[str] = field(default_factory=list)  # for evaluation only


_TRAITS = json.loads(files("latentprior.steer").joinpath("traits.json").read_text(encoding="utf-8"))
TRAITS = {values["name"]: Trait(**values) for values in _TRAITS}
SENTIMENT = TRAITS.pop("positive")  # no persona: it makes a direction of the sentiment experiment
