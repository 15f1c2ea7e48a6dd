"""Directions, steered generation and its measurement."""

from latentprior.steer.directions import difference_of_means
from latentprior.steer.sweep import Judge, sweep

__all__ = ["Judge", "difference_of_means", "sweep"]
