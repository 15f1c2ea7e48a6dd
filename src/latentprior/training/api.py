"""`latentprior.train`: a prior of a recorded store, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentprior.config import TrainConfig, from_dict
from latentprior.data.store.reader import ActivationStore, folder_of
from latentprior.prior.glp import GLP
from latentprior.training.fit import fit
from latentprior.utils.progress import Report, silent


def train(
    store: ActivationStore | str | Path,
    *,
    output: str | Path,
    preset: str = "quick",
    activations: int | None = None,
    heldout: ActivationStore | str | Path | None = None,
    report: Report = silent,
    **options: Any,
) -> GLP:
    """Train a prior on a store of activations, as the command `latentprior train` does.

    The same call continues an interrupted run, and opens a finished one.

    Args:
        store: an open store, or its folder.
        output: folder of the prior, its checkpoints and its log.
        preset: "official" (the paper's recipe), "quick" or "fast" (docs/recipes.md).
        activations: how many to train on in all; the store is gone through as often as that takes.
        heldout: a store of other documents, for the held-out loss.
        **options: other fields of `latentprior.config.TrainConfig`, such as ``blocks=3``, ``d_model=1152``,
            ``device="cuda"``, ``seed=1`` or ``recipe={"learning_rate": 1e-3}``.

    Raises:
        latentprior.training.loop.Diverged: a loss that is not finite; the last saved state is kept.

    Examples:
        >>> glp = lp.train(store, output="runs/prior", preset="fast", activations=512, blocks=1)
        >>> glp.hookpoints[0].layer == store.layers[0]
        True
    """
    values = {"store": folder_of(store), "output": str(output), "preset": preset, **options}
    if activations is not None:
        values["activations"] = activations
    if heldout is not None:
        values["heldout"] = folder_of(heldout)
    return fit(from_dict(TrainConfig, values), report=report)
