"""How good a prior is: distances of its samples from real activations, and what its projections cost in LM loss.

`evaluate` runs all of it from a configuration, with Gaussians and sparse autoencoders as baselines, and gives what is
in ``evaluate.json``; `lm_loss` measures the delta LM loss of any replacement. The distances, intervals and baselines
themselves, from `stats` and `sae`, are importable from here.
"""

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
