"""Distances between sets of activations, baselines, and intervals."""

from latentprior.evaluate.bootstrap import bootstrap_interval
from latentprior.evaluate.distances import TwoSample, classifier_two_sample, sliced_wasserstein
from latentprior.evaluate.frechet import (
    FrechetParts,
    GaussianMoments,
    frechet_distance,
    frechet_from_moments,
    frechet_parts,
)
from latentprior.evaluate.gaussian import GaussianPrior

__all__ = [
    "FrechetParts",
    "GaussianMoments",
    "GaussianPrior",
    "TwoSample",
    "bootstrap_interval",
    "classifier_two_sample",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_parts",
    "sliced_wasserstein",
]
