"""Activations of a language model: `TokenBatch` + model -> `ActivationBatch`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.data import tokens
from latentprior.data.sinks import sink_threshold
from latentprior.data.text import Document
from latentprior.data.tokens import TokenBatch
from latentprior.lm import hooks
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.random import Seed, seed_of
from latentprior.utils.reprs import ShortRepr

Positions = Literal["all", "last", "random"]
Sinks = Literal["drop", "keep"]


@dataclass(frozen=True, repr=False)
class ActivationBatch(ShortRepr):
    """Activations with where each one comes from, one row each; `x` may be on another device than the rest."""

    x: Float[Tensor, "n d"]
    layer: Int[Tensor, " n"]
    doc: Int[Tensor, " n"]
    """Index of the document in its source."""
    position: Int[Tensor, " n"]
    """Index of the token in its document; 0, the first, is never recorded."""
    token: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.x)

    def select(self, index: Tensor | slice) -> ActivationBatch:
        x = self.x[index.to(self.x.device) if isinstance(index, Tensor) else index]
        return ActivationBatch(x, *(getattr(self, f.name)[index] for f in fields(self)[1:]))

    def at_layer(self, layer: int) -> ActivationBatch:
        """The rows of one layer; without any this is an `InputError`."""
        hooks.check_recorded([layer], self.layer.unique().tolist())
        return self.select(self.layer == layer)

    def norms(self) -> Float[Tensor, " n"]:
        """Euclidean norm of each row, in float32."""
        return torch.linalg.vector_norm(self.x, dim=-1, dtype=torch.float32)

    @classmethod
    def cat(cls, batches: Sequence[ActivationBatch]) -> ActivationBatch:
        if not batches:
            raise InputError("no activations to join")
        return cls(*(torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(cls)))


def record_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    side: Side = "output",
    max_length: int = 2048,
    positions: Positions = "all",
    positions_per_document: int = 8,
    sinks: Sinks = "keep",
    batch_tokens: int = 4096,
    padding_side: str = "right",
    chat: bool = False,
    generator: Seed = None,
) -> ActivationBatch:
    """Activations of `texts` in memory.

    The first position of a text and padding are never recorded. Rows that are not finite are left out with a warning.
    Having nothing to record and texts longer than the model's context are errors.

    Args:
        layers: indices of blocks; layer 15 is `hidden_states[16]` of transformers (its input: `hidden_states[15]`).
        max_length: texts are cut to this many tokens, BOS included.
        positions: all positions, each text's last one, or `positions_per_document` drawn without replacement (all if
            there are fewer).
        sinks: "drop" leaves out rows whose norm is over 10 times the median norm of their layer.
        batch_tokens: most tokens of one forward pass, padding included.
        chat: wrap every text as a user message in the tokenizer's chat template.
        generator: source of "random" positions; None draws others at every call.

    Returns:
        rows sorted by layer (in the order of `layers`), text (`doc` indexes `texts`) and position.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, got one string")
    if sinks not in get_args(Sinks):
        raise unknown("sinks", sinks, get_args(Sinks))
    documents = (Document(index, text) for index, text in enumerate(texts))
    batches = tokens.tokenize(
        documents, tokenizer, max_length=max_length, batch_tokens=batch_tokens, padding_side=padding_side, chat=chat
    )
    recorded = activations(
        model,
        batches,
        layers,
        side=side,
        positions=positions,
        positions_per_document=positions_per_document,
        seed=seed_of(generator) if positions == "random" else 0,
    )
    parts = list(recorded)
    if not any(map(len, parts)):
        raise InputError("nothing to record: no text has a token after the first position, which is never recorded")
    batch, left_out = finite_rows(_sorted(ActivationBatch.cat(parts), list(dict.fromkeys(layers))))
    if left_out:
        warnings.warn(f"{left_out} activations were not finite and are left out", stacklevel=2)
    if not len(batch):
        raise InputError("nothing to record: every activation is infinite or NaN")
    return split_sinks(batch, median_norms([batch], batch.layer.unique().tolist()))[0] if sinks == "drop" else batch


def activations(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    layers: Sequence[int],
    *,
    side: Side = "output",
    positions: Positions = "all",
    positions_per_document: int = 8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[ActivationBatch]:
    """One `ActivationBatch` for each `TokenBatch`; the model is cut after the last of `layers`.

    Rows are ordered by layer (in the order of `layers`), row of the token batch and position. Which positions "random"
    draws depends on `seed` and the document's index and length alone, not on how documents were batched or cut into
    chunks. `x` is put on `device`. Errors are raised at the first batch.
    """
    if positions not in get_args(Positions):
        raise unknown("positions", positions, get_args(Positions))
    context = getattr(hooks.text_config(model), "max_position_embeddings", None)
    for batch in batches:
        length = batch.ids.shape[1]
        if context is not None and length > context:
            raise InputError(f"a batch is {length} tokens long, the model's context {context}: lower max_length")
        hidden = hooks.run_cut(model, layers, side=side, **model_inputs(model, batch))
        row, column = _recorded(batch, positions, positions_per_document, seed).nonzero(as_tuple=True)
        yield ActivationBatch(
            x=torch.cat([_rows(state, row, column, batch).to(device) for state in hidden.values()]),
            layer=torch.tensor(list(hidden)).repeat_interleave(len(row)),
            doc=batch.doc[row].repeat(len(hidden)),
            position=(batch.position[row, column] + batch.offset[row]).repeat(len(hidden)),
            token=batch.ids[row, column].repeat(len(hidden)),
        )


def model_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Tensor]:
    """The model's arguments for a batch, on its device: exact whatever the padding side."""
    device = next(model.parameters()).device
    inputs = {"input_ids": batch.ids.to(device)}
    if batch.mask[:, 0].all():
        # Padding on the right never reaches the tokens before it in a causal model, and attention without a mask takes
        # the fast causal kernels.
        return inputs
    inputs["attention_mask"] = batch.mask.to(device, torch.long)
    if "position_ids" in hooks.forward_parameters(model):
        inputs["position_ids"] = batch.position.clamp(min=0).to(device)
    return inputs


def _recorded(batch: TokenBatch, positions: Positions, count: int, seed: int) -> Tensor:
    """Mask [B, T] of the positions to record."""
    candidates = batch.mask & (batch.position > 0)
    if positions == "all":
        return candidates
    in_document = batch.position + batch.offset[:, None]
    if positions == "last":
        return candidates & (in_document == batch.length[:, None] - 1)
    chosen = torch.zeros_like(candidates)
    for row, (doc, length) in enumerate(zip(batch.doc.tolist(), batch.length.tolist(), strict=True)):
        drawn = np.random.default_rng((seed % 2**64, doc)).permutation(length - 1)[:count] + 1
        chosen[row] = candidates[row] & torch.isin(in_document[row], torch.from_numpy(drawn))
    return chosen


def _rows(state: Tensor, row: Tensor, column: Tensor, batch: TokenBatch) -> Tensor:
    if state.shape[:2] != batch.ids.shape:
        raise InputError(f"the model turned {list(batch.ids.shape)} tokens into {list(state.shape[:2])} activations")
    return state[row.to(state.device), column.to(state.device)]


def _sorted(batch: ActivationBatch, layers: list[int]) -> ActivationBatch:
    rank = torch.empty(max(layers) + 1, dtype=torch.long)
    rank[layers] = torch.arange(len(layers))
    key = (rank[batch.layer] * (batch.doc.max() + 1) + batch.doc) * (batch.position.max() + 1) + batch.position
    return batch.select(key.argsort())


def finite_rows(batch: ActivationBatch) -> tuple[ActivationBatch, int]:
    """The rows without NaN or infinity, and how many others there were."""
    finite = batch.x.isfinite().all(dim=-1).cpu()
    left_out = len(batch) - int(finite.sum())
    return (batch.select(finite) if left_out else batch), left_out


def median_norms(pieces: Sequence[ActivationBatch], layers: Sequence[int]) -> dict[int, float]:
    """Median norm of the rows of each layer; a layer without any is an `InputError`."""
    for layer in layers:
        if not any((rows.layer == layer).any() for rows in pieces):
            where = f"of layer {layer} after its first position"
            raise InputError(f"nothing to record: no document has a finite activation {where}")
    rows = ActivationBatch.cat(pieces)
    return {layer: float(rows.at_layer(layer).norms().median()) for layer in layers}


def split_sinks(batch: ActivationBatch, median_norm: Mapping[int, float]) -> tuple[ActivationBatch, ActivationBatch]:
    """Ordinary rows and attention sinks, by each layer's median norm."""
    limit, layers = torch.empty(len(batch)), batch.layer.unique().tolist()
    hooks.check_recorded(layers, median_norm)
    for layer in layers:
        limit[batch.layer == layer] = sink_threshold(median_norm[layer])
    sink = batch.norms().cpu() > limit
    return batch.select(~sink), batch.select(sink)
