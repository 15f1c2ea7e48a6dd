"""A grid of training runs, from which the scaling law is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from latentprior.config.base import Folder, changeable, changes_of, choices, known, positive
from latentprior.config.data import LLMConfig, TextConfig
from latentprior.config.training import PRESETS, Recipe, TrainConfig
from latentprior.utils.errors import InputError


@dataclass(frozen=True)
class SweepConfig:
    """Train priors of several sizes and budgets on a store, and fit the scaling law L(C) = E + A C^-alpha."""

    store: Folder
    """Activation store to train on."""
    heldout: Folder
    """Activation store of held-out documents, for the loss and the Fréchet distance."""
    output: Folder = changeable()
    """Folder of everything. The same command continues; one with more sizes or budgets trains only the new ones."""
    widths: list[int] = field(default_factory=lambda: [288, 576, 1152])
    """Widths of the denoiser (d_model). One below the activations' width is a bottleneck that raises E."""
    blocks: list[int] = field(default_factory=lambda: [3])
    """Numbers of residual blocks; every one is combined with every width."""
    mlp_ratio: float = 2.0
    """Hidden units of each block over the width."""
    budgets: list[int] = field(default_factory=lambda: [65536, 131072, 262144, 524288])
    """Activations to train on. Each is a run of its own, because the learning rate's schedule ends with it."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the runs; every one is combined with every size and budget."""
    preset: str = "quick"
    """Recipe of all runs, as in `train`."""
    recipe: dict[str, Any] = changes_of(Recipe)
    """Fields of the preset's recipe to change, for example {"learning_rate": 1e-3}."""
    layer: int | None = None
    """Which layer of a store of several the Fréchet distance and the delta LM loss are measured at."""
    samples: int = 4000
    """Generated and held-out activations of each Fréchet distance."""
    steps: int = 20
    """Denoiser evaluations of a sample, and of a repair."""
    delta_lm: bool = True
    """Also measure what repairing every position from t = 0.5 costs the language model."""
    lm_documents: int = 64
    """Held-out documents of the delta LM loss, in place of `text.limit`."""
    max_length: int = 128
    """Tokens of a document in the delta LM loss."""
    batch_tokens: int = 1024
    """Most tokens of one forward pass of the language model, padding included."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix work; "auto" is bfloat16 where the device is fast at it."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of samples, noise and resampling."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(part="heldout"))

    def __post_init__(self) -> None:
        choices(self)
        known("preset", [self.preset], PRESETS)
        positive(self, "mlp_ratio", "samples", "steps", "lm_documents", "max_length", "batch_tokens")
        for name in ("widths", "blocks", "budgets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"SweepConfig.{name} must name each value once and at least one, got {values}")
            if name != "seeds" and min(values) < 1:
                raise InputError(f"SweepConfig.{name} must be positive, got {values}")
        if odd := [width for width in self.widths if width % 2]:
            raise InputError(f"SweepConfig.widths must be even (half cosines, half sines), got {odd[0]}")
        batch = self.runs()[0].resolved_recipe().batch_size
        if rounded := [budget for budget in self.budgets if budget % batch]:
            raise InputError(f"budget {rounded[0]} is not a multiple of the recipe's batch of {batch} activations")

    def runs(self) -> list[TrainConfig]:
        """A training run for each size, budget and seed, its folder below ``runs`` in `output`."""
        shared = {name: getattr(self, name) for name in ("store", "heldout", "preset", "recipe", "precision", "device")}
        return [
            TrainConfig.of(
                output=f"{self.output}/runs/d{width}x{blocks}-{budget}-seed{seed}",
                activations=budget,
                blocks=blocks,
                d_model=width,
                d_mlp=max(1, round(self.mlp_ratio * width)),
                seed=seed,
                **shared,
            )
            for width in self.widths
            for blocks in self.blocks
            for budget in self.budgets
            for seed in self.seeds
        ]
