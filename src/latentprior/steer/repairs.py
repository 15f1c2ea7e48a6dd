"""Repairing what an edit does to a running model, so that the edit survives: the paper's way, and ways that keep more.

The paper's repair is the projection of the edited activation: noise it to `t_start` and integrate back. That loses part
of the edit, and it moves the activation also where it was not edited, because the projection of an *unedited*
activation is not the identity. Each option of `RepairConfig` meets one of the two.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.config import RepairConfig
from latentprior.lm.edits import EditedPositions
from latentprior.prior.glp import GLP
from latentprior.prior.repair import RunningRepair
from latentprior.utils.errors import InputError

T_STEP = 0.05  # adaptive noise levels are multiples of this, so that rows of like strength are repaired in one batch


class PriorRepair:
    """Repairs edited activations of a running model (`latentprior.steer.intervention`'s `repair`).

    Noise depends on the seed, the prompt and the position alone: rows of one prompt share it, so that differences
    between their strengths are not noise.
    """

    def __init__(self, glp: GLP, config: RepairConfig, *, seed: int = 0) -> None:
        self.glp, self.config = glp, config
        self._repair = RunningRepair(glp, seed, samples=config.samples, shared=config.noise == "sequence")

    def __enter__(self) -> PriorRepair:
        self._repair.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._repair.__exit__(*error)

    @property
    def nfe(self) -> int:
        """Denoiser evaluations for each activation."""
        once = self.glp.nfe(self.config.steps, t_start=self.config.t_start, solver=self.config.solver)
        return once * self.config.samples * (2 if self.config.paired else 1)

    def __call__(
        self, clean: Float[Tensor, "n d"], edited: Float[Tensor, "n d"], at: EditedPositions, push: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d"]:
        """The repaired activations; what was not pushed is only touched by a repair that is not paired."""
        clean, edited, push = clean.float(), edited.float(), push.float()
        if self.config.rate is None:
            return self._repaired(clean, edited, at, push, self.config.t_start)
        result = edited.clone()
        levels = self._levels(push, at)
        for level in levels.unique().tolist():
            rows = (levels == level).nonzero().squeeze(1)
            part = replace(at, row=at.row[rows], position=at.position[rows])
            t_start = min(level * T_STEP, self.config.t_start)
            if t_start > 0:
                result[rows] = self._repaired(clean[rows], edited[rows], part, push[rows], t_start)
        return result

    def _levels(self, push: Tensor, at: EditedPositions) -> Tensor:
        """Noise level of each row in steps of `T_STEP`: noise ``t / (1 - t)`` is `rate` times the standardised push."""
        layer, normalizer = self._layer(at), self.glp.normalizer
        alone = normalizer.mean[normalizer.rows(layer)] + push.to(self.glp.device)
        size = normalizer.normalize(alone, layer).square().mean(dim=-1).sqrt() * float(self.config.rate or 0)
        return (size / (1 + size) / T_STEP).ceil().long().to(push.device)

    def _repaired(self, clean: Tensor, edited: Tensor, at: EditedPositions, push: Tensor, t_start: float) -> Tensor:
        config, layer = self.config, self._layer(at)
        reference = clean if config.paired else None
        hold = push.repeat(config.samples, 1) if config.hold else None
        options = {"t_start": t_start, "steps": config.steps, "solver": config.solver, "layer": layer, "hold": hold}
        repaired = self._repair(edited, at, reference=reference, **options)
        if config.readd:
            unit = torch.nn.functional.normalize(push, dim=-1)
            repaired = repaired + ((edited - repaired) * unit).sum(dim=-1, keepdim=True) * unit
        return repaired

    def _layer(self, at: EditedPositions) -> int | None:
        """A prior of one layer is called without it."""
        if len(self.glp.normalizer.layers) == 1:
            return None
        if at.layer not in self.glp.normalizer.layers.tolist():
            raise InputError(f"this prior has no layer {at.layer}: {self.glp.normalizer.layers.tolist()}")
        return at.layer
