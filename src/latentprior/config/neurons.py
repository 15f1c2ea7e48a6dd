"""Exploring: what each meta-neuron of a prior responds to and does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentprior.config.base import Folder, Prior, at_least, changeable, choices, positive, unit_interval
from latentprior.config.data import LLMConfig, TextConfig
from latentprior.config.steering import JudgeConfig
from latentprior.utils.errors import InputError


@dataclass(frozen=True)
class NeuronsConfig:
    """Show what each meta-neuron of a prior responds to: top documents, statistics, tokens, nearest units, tasks."""

    prior: Prior
    """Name of an installed prior, a folder or a repository."""
    output: Folder = changeable()
    """Folder of the store: neurons.json, units.parquet, examples.parquet, descriptions.parquet."""
    tokens: int = 2_000_000
    """Stop after this many tokens that count: not the first of a document, no attention sinks."""
    html: Folder | None = changeable(None)
    """Folder of a static site to look at the units in any browser; by default none."""
    probe: Folder | None = changeable(None)
    """Folder of a `latentprior probe` run of the same prior: names the tasks that a unit is among the best at."""
    describe: int = changeable(0)
    """Units to describe by the endpoint `judge.url`; the others are described by their tokens."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    checkpoint: str = "final"
    """Which of the prior's weights."""
    t: float = 0.1
    """Noise level at which the meta-neurons are read."""
    noises: int = 1
    """Noises over which a meta-neuron is averaged; every token has the same ones."""
    max_length: int = 64
    """Documents are cut to this many tokens, the beginning-of-sequence token included."""
    top: int = 20
    """Documents to keep of each unit and sign."""
    reservoir: int = 64
    """Random documents from which quantile examples and correlations between units are taken."""
    promoted: int = 10
    """Tokens to name that a unit promotes, and as many that it suppresses."""
    neighbours: int = 8
    """Most correlated units to name."""
    batch_tokens: int = changeable(4096)
    """Most tokens of one forward pass of the language model, padding included."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the denoiser; "auto" is bfloat16 where the device is fast at it."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of the noise and of the random documents."""
    judge: JudgeConfig = changeable(default_factory=JudgeConfig)
    llm: LLMConfig = changeable(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        choices(self)
        unit_interval(self, "t")
        positive(self, "noises", "tokens", "batch_tokens", "top", "reservoir")
        at_least(2, self, "max_length")
        at_least(0, self, "promoted", "neighbours", "describe")
        if self.describe and not self.judge.url:
            raise InputError("describing units needs an endpoint: give --judge.url and --judge.model")
