"""Steering: directions, edits of a running model, their repair by a prior, and what both do to concept and fluency."""

from latentprior.steer.direction import Direction, read_direction, write_direction
from latentprior.steer.estimate import difference_of_means, paired_pca, probe_normal, random_direction
from latentprior.steer.features import describe_latents, sae_direction
from latentprior.steer.foreign import read_foreign
from latentprior.steer.from_texts import labelled_direction, paired_direction, persona_direction
from latentprior.steer.frontier import summarise
from latentprior.steer.intervention import Edit, Repair, steering
from latentprior.steer.repairs import PriorRepair

__all__ = [
    "Direction",
    "Edit",
    "PriorRepair",
    "Repair",
    "describe_latents",
    "difference_of_means",
    "labelled_direction",
    "paired_direction",
    "paired_pca",
    "persona_direction",
    "probe_normal",
    "random_direction",
    "read_direction",
    "read_foreign",
    "sae_direction",
    "steering",
    "summarise",
    "write_direction",
]
