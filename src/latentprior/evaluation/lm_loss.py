"""Delta LM loss: what replacing activations costs the language model in next-token loss (paper, evaluation 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.data.activations import model_inputs
from latentprior.data.tokens import TokenBatch
from latentprior.lm import hooks
from latentprior.lm.edits import EditedPositions, edit_positions
from latentprior.stats.bootstrap import bootstrap_interval
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent
from latentprior.utils.random import keyed_generator, normal

Replacement = Callable[[Tensor, Tensor], Tensor]
"""Raw activations and standardised noise [N, d] -> activations [N, d]."""


@dataclass(frozen=True)
class LMLoss:
    """Next-token loss of D documents."""

    total: Tensor
    """[D] float64, summed over the document's predicted tokens, in nats."""
    tokens: Tensor
    """[D] int64, predicted ones."""

    def mean(self, *, per_document: bool = False) -> float:
        """Mean over tokens, or over documents of their means (the official definition)."""
        return float((self.total / self.tokens).mean() if per_document else self.total.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Delta:
    """How much a replacement adds to the loss, with its 95% bootstrap interval over documents."""

    delta: float
    interval: tuple[float, float]


def lm_losses(
    model: nn.Module,
    batches: Sequence[TokenBatch],
    layer: int,
    replacements: Mapping[str, Replacement],
    *,
    side: Side = "output",
    seed: int = 0,
    report: Report = silent,
) -> dict[str, LMLoss]:
    """Next-token losses without ("clean") and with each replacement of all positions but the first.

    Every replacement gets the same noise. The blocks before the replacement run once for each batch and their outputs
    are reused, if on the first batch this gives the same losses bit for bit; else the whole model runs every time.
    """
    if "clean" in replacements:
        raise InputError('"clean" is the loss without replacement: choose another name')
    kept: dict[str, list[Tensor]] = {name: [] for name in ("clean", *replacements)}
    counts = []
    before = hooks.blocks_before(model, layer, side) if replacements else range(0)
    for done, batch in enumerate(batches):
        counts.append(batch.mask[:, 1:].sum(dim=1))
        with hooks.keeping(model, before) as outputs:
            kept["clean"].append(_document_losses(model, batch))
        if not done and not _replays(model, outputs, batch, kept["clean"][0]):
            before, outputs = range(0), {}
        for name, replacement in replacements.items():

            def replace(
                x: Tensor, at: EditedPositions, replacement: Replacement = replacement, batch: TokenBatch = batch
            ):
                return replacement(x, normal(*x.shape, seed=keyed_generator(seed, batch.index), device=x.device))

            with hooks.replaying(model, outputs), edit_positions(model, {layer: replace}, side=side):
                kept[name].append(_document_losses(model, batch))
        report(done + 1, len(batches), {})
    if not counts:
        raise InputError("no document to measure the loss on")
    tokens = torch.cat(counts)
    return {name: LMLoss(torch.cat(losses), tokens) for name, losses in kept.items()}


def delta(loss: LMLoss, clean: LMLoss, *, per_document: bool = False, seed: int = 0) -> Delta:
    """The difference of two losses on the same documents, weighted by token or, as the official code, by document."""
    tokens = loss.tokens.double()
    difference = (loss.total - clean.total) / tokens
    weights = None if per_document else tokens.numpy()
    interval = bootstrap_interval(difference.numpy(), weights, seed=seed)
    return Delta(loss.mean(per_document=per_document) - clean.mean(per_document=per_document), interval)


def _replays(model: nn.Module, outputs: hooks.Outputs, batch: TokenBatch, clean: Tensor) -> bool:
    """Whether the model gives the same losses when the outputs of its first blocks are reused."""
    try:
        with hooks.replaying(model, outputs):
            return torch.equal(_document_losses(model, batch), clean)
    except Exception:  # later blocks need more of the first ones, such as keys and values that are shared
        return False


@torch.no_grad()
def _document_losses(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Summed next-token loss [B] float64 of each document."""
    inputs = model_inputs(model, batch)
    # The mask tells `edit_positions` what is padding.
    inputs["attention_mask"] = batch.mask.to(inputs["input_ids"].device, torch.long)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = inputs["input_ids"][:, 1:].to(logits.device)  # a model that is spread ends elsewhere than it begins
    scored = batch.mask[:, 1:].to(logits.device)
    losses = torch.zeros(scored.shape, dtype=torch.float64, device=logits.device)
    losses[scored] = F.cross_entropy(logits[scored].float(), targets[scored], reduction="none").double()
    return losses.sum(dim=1).cpu()
