"""Directions along which to steer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from latentprior.errors import InputError


def difference_of_means(positive: Float[Tensor, "n d"], negative: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """The unit vector from the mean of `negative` to that of `positive` (paper, sentiment steering).

    Raises:
        InputError: no rows on one side, or equal means.
    """
    if not len(positive) or not len(negative):
        raise InputError(f"a difference of means needs both sides, got {len(positive)} and {len(negative)} rows")
    difference = positive.double().mean(dim=0) - negative.double().mean(dim=0)
    norm = difference.norm()
    if norm == 0:
        raise InputError("both sides have the same mean: there is no direction between them")
    return (difference / norm).float()
