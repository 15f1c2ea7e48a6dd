"""A prior on a running model: `GLP.attach` and `GLP.steer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from latentprior.config import Grid, Solver
from latentprior.data.sinks import sinks_in
from latentprior.lm.edits import EditCounts, Positions
from latentprior.lm.hooks import Hookpoint
from latentprior.prior import flow, repair
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.errors import InputError
from latentprior.utils.random import Seed


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
        """Repair what flows through the hookpoint of a running model, also under ``generate()``.

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

        Yields:
            counts of what was done so far: positions ``seen``, ``edited`` and ``passed_over``, by reason.

        Raises:
            InputError: a model, layer or width that the prior was not trained on; what `edit_positions` refuses.

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

        flow.schedule(steps, t_start=t_start, solver=solver, grid=grid)  # wrong options fail here, not in generate()
        return repair.attach(
            self,
            model,
            layer=layer,
            positions=positions,
            edit=edit,
            paired=paired,
            check_model=check_model,
            generator=generator,
            sinks=sinks,
            t_start=t_start,
            steps=steps,
            solver=solver,
            grid=grid,
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
        layer's mean norm m and a unit vector w (paper, on-manifold steering; paired). The defaults are those of
        `latentprior steer`, the best of docs/steering.md. Several edits at once, and other kinds: `steering` with a
        `PriorRepair`.

        Args:
            strength: in multiples of the mean norm of the layer's activations.
            mean_norm: by default the prior's own, else the direction's (`Normalizer.norm_unit`).
            samples: projections with different noises, of which the mean is taken.

        Raises:
            InputError: a direction of another hookpoint than the prior's, and what `attach` refuses.

        Examples:
            >>> with glp.steer(model, direction, strength=0.8):
            ...     ids = model.generate(**tokenizer("The weather", return_tensors="pt"), max_new_tokens=3)
        """
        place = direction.hookpoint
        if self.hookpoints and not any(place.same_place(h, check_model=check_model) for h in self.hookpoints):
            raise InputError(f"the direction belongs to {place}, this prior to {', '.join(map(str, self.hookpoints))}")
        place.check(model, check_model=check_model)
        flow.schedule(steps, t_start=t_start, solver=solver)
        unit = mean_norm or self.normalizer.norm_unit(place.layer, otherwise=direction.mean_norm)
        push = strength * unit * direction.vector
        return repair.attach(
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
            t_start=t_start,
            steps=steps,
            solver=solver,
        )
