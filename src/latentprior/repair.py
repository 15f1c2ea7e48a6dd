"""Repairing the activations of a running model with a prior: `attach`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latentprior.config import Side
from latentprior.errors import InputError, unknown
from latentprior.hooks import Hookpoint
from latentprior.rewrite import Positions, Rewriter, Site, rewrite


@runtime_checkable
class Projector(Protocol):
    """What `attach` needs of a prior."""

    hookpoints: tuple[Hookpoint, ...]

    def project(self, x: Tensor, *args: Any, **options: Any) -> Tensor: ...


class PositionNoise:
    """Standard normal noise that depends on seed, batch size, row and position alone.

    A position gets the same noise however often it is computed, so that generation without a cache equals
    generation with one, and a second run equals the first.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[int, int], tuple[torch.Generator, list[Tensor]]] = {}

    def __call__(self, site: Site, width: int) -> Tensor:
        """Noise [N, width] of the rows of `site`."""
        key = (site.batch, site.layer)
        if key not in self._drawn:
            self._drawn = {k: v for k, v in self._drawn.items() if k[0] == site.batch}  # only the batch in progress
            self._drawn[key] = (torch.Generator().manual_seed(self._seed + 7919 * site.layer), [])
        generator, drawn = self._drawn[key]
        while len(drawn) <= int(site.position.max()):
            drawn.append(torch.randn(site.batch, width, generator=generator))
        table = torch.stack(drawn[int(site.position.min()) :])
        position = (site.position - site.position.min()).cpu()
        return table[position, site.row.cpu()].to(site.row.device)


def hookpoints_on(
    hookpoints: Sequence[Hookpoint], model: nn.Module, layers: Sequence[int] | int | None, *, check_model: bool
) -> list[Hookpoint]:
    """The hookpoints to use on `model`, checked before anything runs.

    Raises:
        InputError: the prior knows no hookpoint, not this layer, or was trained on another model or width.
    """
    if not hookpoints:
        raise InputError("this prior does not say what it was trained on: give it `hookpoints` first")
    wanted = [h.layer for h in hookpoints] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    by_layer = {h.layer: h for h in hookpoints}
    for layer in wanted:
        if layer not in by_layer:
            raise unknown("layer", layer, by_layer)
    chosen = [by_layer[layer] for layer in wanted]
    for hookpoint in chosen:
        hookpoint.check(model, check_model=check_model)
    return chosen


@contextmanager
def attach(
    prior: Projector,
    model: nn.Module,
    *,
    layer: Sequence[int] | int | None = None,
    positions: Positions = "all",
    edit: Callable[[Tensor], Tensor] | None = None,
    paired: bool = False,
    check_model: bool = True,
    generator: torch.Generator | int | None = None,
    **options: Any,
) -> Iterator[None]:
    """See `GLP.attach`, whose implementation this is."""
    if paired and edit is None:
        raise InputError("paired repair compares an activation with its edit: give `edit`")
    chosen = hookpoints_on(prior.hookpoints, model, layer, check_model=check_model)
    if not chosen:
        raise InputError(f"name at least one of the prior's layers {[h.layer for h in prior.hookpoints]}")
    sides: set[Side] = {h.side for h in chosen}
    if len(sides) > 1:
        raise InputError("attach one side at a time: this prior has hookpoints on block inputs and outputs")
    noise = PositionNoise(_seed(generator))
    several = len(prior.hookpoints) > 1

    def repaired(x: Tensor, site: Site) -> Tensor:
        edited = x if edit is None else edit(x.clone())  # `x += v` must not reach the reference
        return prior.project(
            edited,
            reference=x if paired else None,
            noise=noise(site, x.shape[-1]),
            layer=site.layer if several else None,
            **options,
        )

    rewriters: dict[int, Rewriter] = {h.layer: repaired for h in chosen}
    with rewrite(model, rewriters, positions=positions, side=sides.pop()):
        yield


def _seed(generator: torch.Generator | int | None) -> int:
    """A seed from a generator (which it advances), from a number, or 0."""
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    return generator or 0
