"""Generating steered text, for many prompts and strengths at once, while watching what happens to the activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from latentprior.data.prompts import Prompts, prefilled
from latentprior.lm import hooks
from latentprior.lm.edits import EditCounts, EditedPositions
from latentprior.prior.glp import GLP
from latentprior.steer.intervention import Repair


@torch.no_grad()
def generate_continuations(
    model: Any,
    prompts: Prompts,
    copies: int,
    new_tokens: int,
    context: AbstractContextManager[EditCounts] | None = None,
    *,
    share: bool = True,
    **sampling: Any,
) -> tuple[Int64[Tensor, "rows new"], EditCounts]:
    """`copies` continuations of each prompt (rows prompt-major), greedy by default, inside `context`, and what it did.

    The end-of-text token is not generated, so that all continuations have one length and their likelihoods compare.
    To `share`, each prompt is run once for all copies: only if `context` changes nothing before its last token.
    """
    ids = prompts.ids.repeat_interleave(copies, dim=0).to(model.device)
    mask = prompts.mask.long().repeat_interleave(copies, dim=0).to(model.device)
    shared = {hooks.cache_argument(model): prefilled(model, prompts.ids, prompts.mask, copies)} if share else {}
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens} | sampling
    with context or nullcontext(EditCounts()) as counts:
        out = model.generate(input_ids=ids, attention_mask=mask, **shared, **options)
    return out[:, ids.shape[1] :].cpu(), counts


class EditMonitor:
    """A `Repair` that measures, for each row of the batch, what another one (or none) leaves of the edit.

    Of call number `keep` the activations are kept for `off_manifold`; `mean_norm` is the unit of `moved`.
    """

    def __init__(self, repair: Repair | None, rows: int, mean_norm: float, keep: int) -> None:
        self._repair, self._mean_norm, self._keep, self._calls = repair, mean_norm, keep, 0
        self._sums = torch.zeros(3, rows)  # of retention, distance, positions
        self._kept: tuple[EditedPositions, tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, clean: Tensor, edited: Tensor, at: EditedPositions, push: Tensor) -> Tensor:
        final = edited if self._repair is None else self._repair(clean, edited, at, push)
        change, push = (final - clean).float(), push.float()
        along = (change * push).sum(dim=-1) / push.square().sum(dim=-1)  # nan where nothing was pushed
        off = (change - along.nan_to_num()[:, None] * push).norm(dim=-1) / self._mean_norm
        self._sums.index_add_(1, at.row.cpu(), torch.stack([along, off, torch.ones_like(off)]).cpu())
        if self._calls == self._keep:
            self._kept = at, (clean.float(), edited.float(), final.float())
        self._calls += 1
        return final

    def retention(self) -> Float[Tensor, " rows"]:
        """Mean share of the edit's component along itself that is left."""
        return self._sums[0] / self._sums[2]

    def moved(self) -> Float[Tensor, " rows"]:
        """Mean distance from the unedited activation at right angles to the edit, in mean norms."""
        return self._sums[1] / self._sums[2]

    def off_manifold(self, glp: GLP, layer: int | None, seed: int) -> Float[Tensor, "3 rows"]:
        """`GLP.score` of the kept unedited, edited and repaired activations, with the same noise; NaN without one."""
        scores = torch.full((3, self._sums.shape[1]), float("nan"))
        if self._kept is not None:
            at, kept = self._kept
            for i, x in enumerate(kept):
                scores[i, at.row.cpu()] = glp.score(x, layer=layer, generator=seed).cpu()
        return scores
