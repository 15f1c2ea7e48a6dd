"""Latents of a sparse autoencoder: the direction that each one writes, and the tokens that it is active on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.sae.sae import SAE
from latentprior.steer.direction import Direction
from latentprior.utils.errors import InputError
from latentprior.utils.random import generator_of

LEAST = 5  # rows on which a latent must be active to be chosen: what is active once or twice cannot be described
GAP = "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Example:
    """A token on which a latent is active, with the text around it."""

    before: str
    token: str
    after: str
    value: float
    doc: int
    position: int


@dataclass(frozen=True)
class LatentDescription:
    """What a latent is active on, as far as its strongest activations tell."""

    latent: int
    density: float  # share of the rows on which it is active
    examples: list[Example]  # strongest first

    @property
    def tokens(self) -> list[str]:
        """Of the examples, commonest first."""
        return [token for token, _ in Counter(example.token for example in self.examples).most_common()]

    @property
    def name(self) -> str:
        """Such as "latent 12: ' film', ' movie'"."""
        shown = ", ".join(map(repr, self.tokens[:3])) or "never active"
        return f"latent {self.latent}: {shown}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"name": self.name, "tokens": self.tokens}


def sae_direction(sae: SAE, latent: int, *, description: LatentDescription | None = None) -> Direction:
    """The decoder row of a latent (paper, SAE features)."""
    _check_latent(sae, latent)
    provenance: dict[str, Any] = {"latent": latent, "sae": sae.provenance}
    if description is not None:
        provenance["density"], provenance["tokens"] = description.density, description.tokens
    name = description.name if description is not None else f"latent {latent}"
    return Direction.of(sae.decoder[latent], sae.hookpoint, name, "sae", **provenance)


def describe_latents(
    sae: SAE,
    activations: ActivationStore | ActivationBatch,
    tokenizer: Any,
    *,
    latents: Sequence[int] | int = 10,
    examples: int = 10,
    context: int = 10,
    rows: int = 50_000,
    seed: int = 0,
) -> list[LatentDescription]:
    """What latents are active on.

    Args:
        activations: a store, of which random whole documents are taken, or rows in memory; recorded where the SAE
            belongs. A context is what was recorded of it: a row's neighbours in its document.
        latents: which ones, or how many at random (ascending) of those that are active on at least 5 rows.
        context: tokens to each side of an example.
        rows: about how many of a store to look at.
    """
    generator = generator_of(seed)
    batch = activations
    if isinstance(batch, ActivationStore):
        batch = _documents(batch, sae.hookpoint.layer, rows, generator)
    batch = batch.at_layer(sae.hookpoint.layer)
    batch = batch.select((batch.doc * (batch.position.max() + 1) + batch.position).argsort())
    indices, values = (part.cpu() for part in sae.encode(batch.x))
    counts = torch.bincount(indices[values > 0], minlength=sae.latents)
    described = []
    for latent in _active_latents(counts, latents, generator) if isinstance(latents, int) else latents:
        _check_latent(sae, latent)
        strength = torch.where(indices == latent, values, 0).sum(dim=1)
        value, row = strength.topk(min(examples, int(counts[latent])))
        found = [_example(batch, r, v, context, tokenizer) for r, v in zip(row.tolist(), value.tolist(), strict=True)]
        described.append(LatentDescription(latent, int(counts[latent]) / len(batch), found))
    return described


def _documents(store: ActivationStore, layer: int, rows: int, generator: torch.Generator) -> ActivationBatch:
    """Whole documents in random order, about `rows` rows of one layer."""
    layers, docs, _, _ = store.metadata(torch.arange(len(store)))
    chosen = (layers == layer).nonzero().squeeze(1)
    if not len(chosen):
        raise InputError(f"{store.folder} holds no activations of layer {layer}")
    documents, which, sizes = torch.unique(docs[chosen], return_inverse=True, return_counts=True)
    order = torch.randperm(len(documents), generator=generator)
    before = torch.empty_like(sizes)
    before[order] = sizes[order].cumsum(0) - sizes[order]
    return store.batch(chosen[(before < rows)[which]])


def _check_latent(sae: SAE, latent: int) -> None:
    if not 0 <= latent < sae.latents:
        raise InputError(f"latent {latent} is out of range: this SAE has latents 0 to {sae.latents - 1}")


def _active_latents(counts: Tensor, number: int, generator: torch.Generator) -> list[int]:
    active = (counts >= LEAST).nonzero().squeeze(1)
    if len(active) < number:
        raise InputError(f"only {len(active)} latents are active on at least {LEAST} rows, not {number}")
    return active[torch.randperm(len(active), generator=generator)[:number]].sort().values.tolist()


def _example(batch: ActivationBatch, row: int, value: float, context: int, tokenizer: Any) -> Example:
    """The row's token between its neighbours in the same document; `batch` is sorted by document and position."""
    first, last = max(row - context, 0), min(row + context + 1, len(batch))
    doc, position = int(batch.doc[row]), int(batch.position[row])
    same = (batch.doc[first:last] == doc) & ((batch.position[first:last] - position).abs() <= context)
    near = (same.nonzero().squeeze(1) + first).tolist()

    def text(rows: Sequence[int]) -> str:
        """Decoded at once, so that characters of several tokens come out whole; a gap where rows are missing."""
        parts: list[list[int]] = []
        for i in rows:
            if not parts or int(batch.position[i]) != int(batch.position[i - 1]) + 1:
                parts.append([])
            parts[-1].append(int(batch.token[i]))
        return GAP.join(tokenizer.decode(part) for part in parts)

    before, after = [i for i in near if i < row], [i for i in near if i > row]
    return Example(text(before), tokenizer.decode([int(batch.token[row])]), text(after), value, doc, position)
