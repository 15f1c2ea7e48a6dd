"""Persona traits: system prompts that ask for a trait or for its opposite, and questions that can show it.

Those of the paper's persona experiment (evil, sycophantic, hallucinating), in wording of our own, stand in
``traits.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files


@dataclass(frozen=True)
class Trait:
    """A way of answering that system prompts can ask for."""

    name: str
    """Shown to people, such as "flattering"."""
    description: str
    """What an answer that has the trait does, for a judge to read."""
    positive: list[str]
    """System prompts that ask for the trait."""
    negative: list[str]
    """System prompts that ask for its opposite."""
    questions: list[str]
    """Questions whose answers can show the trait: a direction is made from these."""
    held_out_questions: list[str] = field(default_factory=list)
    """More of the kind, for evaluation only."""


_TRAITS = json.loads(files("latentprior.steer").joinpath("traits.json").read_text(encoding="utf-8"))
TRAITS = {values["name"]: Trait(**values) for values in _TRAITS}
SENTIMENT = TRAITS.pop("positive")  # no persona: it makes a direction of the sentiment experiment
