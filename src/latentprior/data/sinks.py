"""Attention sinks: the few activations, mostly of the first position, whose norm dwarfs all others. The one rule."""

from __future__ import annotations

from typing import TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

SINK_FACTOR = 10
"""Attention sinks are rows whose norm is over this many times their layer's median norm."""

Norm = TypeVar("Norm", float, Tensor)


def sink_threshold(median_norm: Norm) -> Norm:
    """The norm over which a row is an attention sink, given its layer's median norm, or what is nearest to it."""
    return SINK_FACTOR * median_norm


def sinks_in(hidden: Float[Tensor, "*n d"], typical_norm: float) -> Bool[Tensor, "*n"]:
    """Which activations are attention sinks, by `sink_threshold`."""
    return hidden.float().norm(dim=-1) > sink_threshold(typical_norm)
