"""Steering a language model along directions.

Texts, latents or files enter and become a `direction` (`from_texts`, `estimate`, `features`, `foreign`). `intervention`
edits a running model along directions; `repairs` repairs what was edited, with a prior. `generate` is where steered
text is generated. An `experiment` runs the `conditions` of its `tasks` (`runner`) and may have an endpoint `rate` the
texts; `aggregate` and `frontier` turn them into concept-fluency frontiers, which leave as one result.
"""

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
