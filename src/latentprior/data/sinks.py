"""Attention sinks: the few activations, mostly of the first position, whose norm dwarfs all others."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

SINK_FACTOR = 10
"""Attention sinks are rows whose norm is over this many times their layer's median norm."""


def sink_threshold(norms: Float[Tensor, " n"]) -> float:
    """The norm over which a row is an attention sink: 10 times the median."""
    return SINK_FACTOR * float(norms.median())


def sinks_in(hidden: Float[Tensor, "*n d"], typical_norm: float) -> Bool[Tensor, "*n"]:
    """Which activations are attention sinks.

    Args:
        typical_norm: median norm of their layer or, where that is not known, its mean norm without sinks.
    """
    return hidden.float().norm(dim=-1) > SINK_FACTOR * typical_norm
