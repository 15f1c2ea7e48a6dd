"""What to plan: a training run on chips that need not be here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from latentprior.config.base import File, Size, at_least, changeable, changes_of, choices, positive, size_of
from latentprior.config.data import LLMConfig, StreamConfig
from latentprior.config.training import PriorOptions, Recipe, TrainConfig, recipe_of
from latentprior.utils.errors import InputError


@dataclass(frozen=True)
class PlanConfig:
    """What a training run on live activations needs: parameters, FLOPs, memory, days and disk."""

    llm: LLMConfig = field(default_factory=lambda: LLMConfig(model="8B"))
    """The language model. `llm.model` is a Hugging Face id or a folder, whose config alone is read, or one of the
    known shapes: "smollm2-135m", "gemma-3-270m", "1B" (Llama-3.2-1B), "8B" (Llama-3.1-8B), "70B" (Llama-3.1-70B)."""
    layers: list[int] = field(default_factory=list)
    """Blocks whose activations are modelled, counted from 0; by default the middle one (15 of 32)."""
    max_length: int = StreamConfig.max_length
    """Tokens of a document, the first included, which is never an activation."""
    batch_tokens: int = StreamConfig.batch_tokens
    """Most tokens of one forward pass of the language model, padding included."""
    buffer: Size = StreamConfig.buffer
    """Size of the mixing buffer over all processes: activations, or bytes with a unit ("2GB", "512MiB")."""
    blocks: int = PriorOptions.blocks
    """Residual blocks of the denoiser."""
    d_model: int | None = None
    """Width of the denoiser; by default twice the activations' width."""
    d_mlp: int | None = None
    """Hidden units of each block; by default twice d_model."""
    skip: Literal["preset", "none", "normal"] = PriorOptions.skip
    """Velocity that is added to what the network gives, as in `train`."""
    modulation: Literal["preset", "gate", "norm"] = PriorOptions.modulation
    """What time and layer act on, as in `train`."""
    activations: int = 1_000_000_000
    """Activations to train on in all."""
    preset: str = TrainConfig.preset
    """Recipe, which sets batch size, time sampling, optimizer and averaging: "official" is the paper's."""
    recipe: dict[str, Any] = changes_of(Recipe)
    """Fields of the preset's recipe to change, for example {"learning_rate": 1e-3}."""
    micro_batch: int | None = None
    """Activations of one forward and backward pass; by default 1024 on a CPU, all on a GPU."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes (torchrun): a copy of the prior in each, or its weights sharded over them. "auto" shards
    from a billion parameters on."""
    chip: str = "H100"
    """Chip of the vendor's data sheet, such as "A100-80" or "H200"; "measured" is this machine's own device."""
    chips: int = 1
    """How many chips, one process on each."""
    device: str = "auto"
    """Torch device that is measured as the chip "measured"; "auto" is the CUDA device if there is one, else the CPU."""
    llm_mfu: float = 0.4
    """Assumption: share of the chip's matrix peak that the language model's forward pass reaches."""
    prior_mfu: float = 0.4
    """Assumption: share of the chip's matrix peak that training the prior reaches."""
    output: File | None = changeable(None)
    """JSON file to write."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "batch_tokens", "blocks", "d_model", "d_mlp", "activations", "micro_batch", "chips")
        size_of("buffer", self.buffer)
        at_least(2, self, "max_length")
        for name in ("llm_mfu", "prior_mfu"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"PlanConfig.{name} must lie above 0 and at most at 1, got {getattr(self, name)}")
        if (batch := self.resolved_recipe().batch_size) % self.chips:
            raise InputError(f"{self.chips} chips do not divide the batch of {batch} activations")

    def prior(self) -> PriorOptions:
        """The prior's shape and network."""
        return PriorOptions(self.blocks, self.d_model, self.d_mlp, self.skip, self.modulation).of_preset(self.preset)

    def resolved_recipe(self) -> Recipe:
        """The preset with this configuration's changes."""
        return recipe_of(self.preset, self.recipe)
