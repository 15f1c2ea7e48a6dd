"""Attention sinks: the few activations, mostly of the first position, whose norm dwarfs all others."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

SINK_FACTOR = 10
"""Attention sinks are rows whose norm is over this many times their layer's median norm."""


def sink_threshold(norms: Float[Tensor, " n"]) -> float:
    """The norm over which a row is an attention sink: 10 times the median."""
    return SINK_FACTOR * float(norms.median())
