"""`latentprior.evaluate`: a prior measured against held-out activations, in one call."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from latentprior.config import EvaluateConfig, from_dict
from latentprior.data.store.reader import ActivationStore, folder_of
from latentprior.evaluation import evaluate as command
from latentprior.prior.glp import GLP
from latentprior.utils.progress import Phase, unseen
from latentprior.utils.results import Result


def evaluate(
    prior: GLP | str | Path,
    heldout: ActivationStore | str | Path,
    *,
    train: ActivationStore | str | Path | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    phase: Phase = unseen,
    **options: Any,
) -> Result:
    """Measure a prior against real activations and in the language model, as `latentprior evaluate` does.

    Losses by noise level, distances of samples from held-out activations beside Gaussian baselines, and, with a model,
    what projecting every position costs it (delta LM loss). Activations that are compared are never from one document.

    Args:
        prior: a prior, its folder or repository.
        heldout: a store of held-out documents, or its folder; a little over twice ``samples`` rows.
        train: the store that the Gaussian baselines are fitted to; by default half of the held-out rows.
        model: a language model for the delta LM loss, which is left out without one (or without ``delta_lm=True``).
        output: folder of ``evaluate.json``; none is written by default.
        **options: other fields of `latentprior.config.EvaluateConfig`, such as ``samples=2000``,
            ``solvers=["ab2"]``, ``nfes=[20]``, ``layer=15`` or ``text={"dataset": "texts.jsonl"}``.

    Returns:
        what ``evaluate.json`` holds, with attributes: `heldout_loss`, `distribution`, `delta_lm` ...

    Examples:
        >>> result = lp.evaluate(glp, store, samples=150, solvers=["euler"], nfes=[4])
        >>> result.heldout_loss.mean > 0, len(result.distribution)
        (True, 4)
        >>> frame = result.to_pandas()  # a row for each source: real, Gaussians, prior
    """
    llm = None if model is None else (model, tokenizer)
    with ExitStack() as stack:
        folder = output or stack.enter_context(tempfile.TemporaryDirectory())
        values = {
            "prior": repr(prior) if isinstance(prior, GLP) else str(prior),
            "heldout": folder_of(heldout),
            "train": None if train is None else folder_of(train),
            "output": str(folder),
            "delta_lm": llm is not None,
        } | options
        glp = prior if isinstance(prior, GLP) else None
        return command.evaluate(from_dict(EvaluateConfig, values), glp=glp, llm=llm, phase=phase)
