"""Distances between sets of activations, baselines (Gaussians, sparse autoencoders), and intervals."""

from latentprior.sae.sae import SAE
from latentprior.sae.saelens import load_saelens
from latentprior.sae.training import train_sae
from latentprior.stats.bootstrap import bootstrap_interval
from latentprior.stats.distances import TwoSample, classifier_two_sample, sliced_wasserstein
from latentprior.stats.frechet import (
    FrechetParts,
    GaussianMoments,
    frechet_distance,
    frechet_from_moments,
    frechet_parts,
)
from latentprior.stats.gaussian import GaussianPrior

__all__ = [
    "SAE",
    "FrechetParts",
    "GaussianMoments",
    "GaussianPrior",
    "TwoSample",
    "bootstrap_interval",
    "classifier_two_sample",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_parts",
    "load_saelens",
    "sliced_wasserstein",
    "train_sae",
]
