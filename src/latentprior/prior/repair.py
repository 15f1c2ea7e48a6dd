"""Repair: projecting what flows through a running model, edited or not, position by position (`GLP.attach`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latentprior.config import Grid, Side, Solver
from latentprior.data.sinks import sinks_in
from latentprior.lm.edits import EditCounts, EditedPositions, EditFunction, Positions, edit_positions
from latentprior.lm.hooks import Hookpoint, at_layers
from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.errors import InputError
from latentprior.utils.random import Seed, keyed_generator, seed_of


@runtime_checkable
class Projector(Protocol):
    """What repair needs of a prior."""

    hookpoints: tuple[Hookpoint, ...]

    def project(self, x: Tensor, *args: Any, **options: Any) -> Tensor: ...


class PositionNoise:
    """Standard normal noise that depends on seed, layer, prompt and position alone.

    A position gets the same noise however often it is computed and whatever else is in the batch. Rows of one prompt,
    such as copies of it under several strengths, share their noise. Where a call does not know its prompts, the row's
    index stands for them. `shared` is one noise for all positions of a sequence.
    """

    BLOCK = 32  # positions that are drawn together
    BYTES = 2**28  # of blocks that are kept, those used last; all can be drawn again

    def __init__(self, seed: int, *, samples: int = 1, shared: bool = False) -> None:
        self._seed, self._samples, self._shared = seed, samples, shared
        self._blocks: OrderedDict[tuple[int, int, int], Tensor] = OrderedDict()  # (layer, prompt, block) -> noise
        self._bytes = 0

    def __call__(self, at: EditedPositions, width: int) -> Tensor:
        """Noise [samples N, width] of the rows of `at`, sample-major."""
        row, position = at.row.tolist(), at.position.cpu()
        position = torch.zeros_like(position) if self._shared else position
        prompts = row if at.prompts is None else [at.prompts[i] for i in row]
        keys = list(zip(prompts, (position // self.BLOCK).tolist(), strict=True))
        blocks = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        noise = torch.stack([self._block(at.layer, *key, width) for key in blocks], dim=1)
        chosen = noise[:, [blocks[key] for key in keys], position % self.BLOCK]
        return chosen.flatten(0, 1).to(at.row.device)

    def _block(self, layer: int, prompt: int, block: int, width: int) -> Tensor:
        key = (layer, prompt, block)
        if key not in self._blocks:
            rows = 1 if self._shared else self.BLOCK
            drawn = torch.randn(self._samples, rows, width, generator=keyed_generator(self._seed, *key))
            self._blocks[key] = drawn
            self._bytes += drawn.nbytes
            while self._bytes > self.BYTES and len(self._blocks) > 1:
                self._bytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks.move_to_end(key)
        return self._blocks[key]


class RunningRepair:
    """Projects activations of a running model, with the mean over `samples` noises (`PositionNoise`).

    While it is open the prior's time path is computed once (`Denoiser.caching`), as every decoding step projects at the
    same few times. The prior moves to the device of the first activations.
    """

    def __init__(self, prior: Projector, seed: int, *, samples: int = 1, shared: bool = False) -> None:
        self._prior, self._samples, self._moved = prior, samples, False
        self._noise = PositionNoise(seed, samples=samples, shared=shared)
        self._open = ExitStack()

    def __enter__(self) -> RunningRepair:
        if isinstance(denoiser := getattr(self._prior, "denoiser", None), Denoiser):
            self._open.enter_context(denoiser.caching())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __call__(
        self, edited: Tensor, at: EditedPositions, *, reference: Tensor | None = None, **options: Any
    ) -> Tensor:
        """``prior.project(edited, ...)`` [N, d] with the noise of the positions; `options` hold for all rows."""
        if not self._moved and isinstance(self._prior, nn.Module):
            with torch.inference_mode(False):  # weights moved in inference mode could not be used outside it
                self._prior.to(edited.device)
        self._moved = True
        noise = self._noise(at, edited.shape[-1])
        reference = None if reference is None else reference.repeat(self._samples, 1)
        edited = edited.repeat(self._samples, 1)  # sample-major
        projected = self._prior.project(edited, reference=reference, noise=noise, **options)
        return projected.unflatten(0, (self._samples, -1)).mean(dim=0)


def hookpoints_on(
    hookpoints: Sequence[Hookpoint], model: nn.Module, layers: Sequence[int] | int | None, *, check_model: bool
) -> list[Hookpoint]:
    """The hookpoints to use on `model`, checked before anything runs."""
    if not hookpoints:
        raise InputError("this prior does not say what it was trained on: give it `hookpoints` first")
    chosen = at_layers(hookpoints, [layers] if isinstance(layers, int) else layers)
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
    samples: int = 1,
    check_model: bool = True,
    generator: Seed = None,
    sinks: Callable[[Tensor, int], Tensor] | None = None,
    **options: Any,
) -> Iterator[EditCounts]:
    """See `GLP.attach`; `sinks` as in `edit_positions`."""
    if paired and edit is None:
        raise InputError("paired repair compares an activation with its edit: give `edit`")
    chosen = hookpoints_on(prior.hookpoints, model, layer, check_model=check_model)
    if not chosen:
        raise InputError(f"name at least one of the prior's layers {[h.layer for h in prior.hookpoints]}")
    sides: set[Side] = {h.side for h in chosen}
    if len(sides) > 1:
        raise InputError("attach one side at a time: this prior has hookpoints on block inputs and outputs")
    several = len(prior.hookpoints) > 1

    with RunningRepair(prior, seed_of(generator), samples=samples) as repair:

        def repaired(x: Tensor, at: EditedPositions) -> Tensor:
            edited = x if edit is None else edit(x.clone())  # `x += v` must not reach the reference
            layer = at.layer if several else None
            return repair(edited, at, reference=x if paired else None, layer=layer, **options)

        edits: dict[int, EditFunction] = {h.layer: repaired for h in chosen}
        with edit_positions(model, edits, positions=positions, side=sides.pop(), sinks=sinks) as counts:
            yield counts


@runtime_checkable
class UnitDirection(Protocol):
    """What `Attachable.steer` needs of a direction, such as `latentprior.Direction`."""

    @property
    def vector(self) -> Tensor: ...  # [d] float32, of norm 1

    @property
    def hookpoint(self) -> Hookpoint: ...

    @property
    def mean_norm(self) -> float | None: ...  # of the activations it was made from


class Attachable(nn.Module):
    """The methods of `GLP` that change a running model."""

    hookpoints: tuple[Hookpoint, ...]
    normalizer: Normalizer

    def project(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def attach(
        self,
        model: nn.Module,
        *,
        layer: Sequence[int] | int | None = None,
        positions: Positions = "all",
        edit: Callable[[Tensor], Tensor] | None = None,
        paired: bool = False,
        check_model: bool = True,
        generator: Seed = None,
        t_start: float = 0.5,
        steps: int = 4,
        solver: Solver = "euler",
        grid: Grid = "uniform",
    ) -> AbstractContextManager[EditCounts]:
        """Repair what flows through the hookpoint of a running model, also under ``generate()``; yields counts.

        Works with and without a KV cache, with batches, left padding and beams. The first position, padding and
        attention sinks are never touched. The noise depends on the generator, the prompt's tokens and the position
        alone: a prompt gets the same text alone and in any batch (in float32; bfloat16 rounds by the batch's shape).
        The prior's weights must not be changed meanwhile. The prior moves to the device of the first hidden states, and
        stays there.

        Args:
            layer: which of the prior's layers; all by default.
            positions: "all"; "last", the last position at every decoding step (the paper's protocol); "prompt";
                "generated"; a number, from that position on; or a boolean mask (`latentprior.lm.edits.Positions`).
            edit: changes the activations [N, d] before they are projected, for example ``lambda x: x + a * w``.
            paired: project the edit against the unedited activation (`project`'s `reference`).
            check_model: refuse a model of another name. The paper puts a base model's prior on the instruct model;
                say False for that. Width and layer are always checked.

        Examples:
            >>> with glp.attach(model, t_start=0.3, generator=0) as counts:
            ...     ids = model.generate(**tokenizer("The weather", return_tensors="pt"), max_new_tokens=3)
            >>> counts.edited > 0
            True
        """
        several, normalizer = len(self.hookpoints) > 1, self.normalizer

        def sinks(hidden: Tensor, layer: int) -> Tensor:
            found = normalizer.sinks(hidden.to(normalizer.mean.device), layer if several else None)
            return found.to(hidden.device)

        options: dict[str, Any] = {"steps": steps, "t_start": t_start, "solver": solver, "grid": grid}
        flow.schedule(**options)  # wrong options fail here, not in generate()
        return attach(
            self,
            model,
            layer=layer,
            positions=positions,
            edit=edit,
            paired=paired,
            check_model=check_model,
            generator=generator,
            sinks=sinks,
            **options,
        )

    def steer(
        self,
        model: nn.Module,
        direction: UnitDirection,
        strength: float = 1.0,
        *,
        mean_norm: float | None = None,
        positions: Positions = "all",
        t_start: float = 0.5,
        steps: int = 4,
        solver: Solver = "euler",
        samples: int = 4,
        check_model: bool = True,
        generator: Seed = 0,
    ) -> AbstractContextManager[EditCounts]:
        """Steer a running model along a direction, each edit repaired in pairs: `attach` with an edit of its own.

        An activation a [d] becomes ``a + project(a + r m w) - project(a)`` with the same noise, for a strength r, the
        layer's mean norm m and a unit vector w (paper, on-manifold steering; paired). `mean_norm` is by default the
        prior's own, else the direction's (`Normalizer.norm_unit`); `samples` are projections with different noises, of
        which the mean is taken. The defaults are those of `latentprior steer`, the best of docs/steering.md. Several
        edits at once, and other kinds: `steering` with a `PriorRepair`.

        Examples:
            >>> with glp.steer(model, direction, strength=0.8):
            ...     ids = model.generate(**tokenizer("The weather", return_tensors="pt"), max_new_tokens=3)
        """
        place = direction.hookpoint
        if self.hookpoints and not any(place.same_place(h, check_model=check_model) for h in self.hookpoints):
            raise InputError(f"the direction belongs to {place}, this prior to {', '.join(map(str, self.hookpoints))}")
        place.check(model, check_model=check_model)
        options: dict[str, Any] = {"steps": steps, "t_start": t_start, "solver": solver}
        flow.schedule(**options)
        unit = mean_norm or self.normalizer.norm_unit(place.layer, otherwise=direction.mean_norm)
        push = strength * unit * direction.vector
        return attach(
            self,
            model,
            layer=place.layer,
            positions=positions,
            edit=lambda x: x.float() + push.to(x.device),
            paired=True,
            samples=samples,
            check_model=check_model,
            generator=generator,
            sinks=lambda hidden, layer: sinks_in(hidden, unit),
            **options,
        )
