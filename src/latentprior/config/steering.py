"""Steering: how edits are repaired, judged and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from latentprior.config.base import Folder, Prior, Solver, at_least, changeable, choices, known, positive, unit_interval
from latentprior.config.data import LLMConfig
from latentprior.utils.errors import InputError


@dataclass(frozen=True)
class RepairConfig:
    """How a prior repairs an edited activation; the paper's way is `paired` false, `samples` 1 (docs/steering.md)."""

    t_start: float = 0.5
    """Noise level to start from; with `rate`, the highest one."""
    steps: int = 4
    """Denoiser evaluations."""
    solver: Solver = "euler"
    """How the flow is integrated."""
    paired: bool = True
    """Repair edited and unedited activation with the same noise, and add the difference to the unedited one."""
    hold: bool = False
    """Guide the flow so that the component along the edit stays what the edit made it."""
    readd: bool = False
    """Add what the repair took along the edit afterwards."""
    rate: float | None = None
    """Choose t by the size of the edit: t / (1 - t) is this times the root mean square of the standardised edit."""
    samples: int = 4
    """Repairs with different noises, of which the mean is taken."""
    noise: Literal["position", "sequence"] = "position"
    """Another noise at every position, or one for a whole sequence."""

    def __post_init__(self) -> None:
        choices(self)
        unit_interval(self, "t_start")
        positive(self, "steps", "rate", "samples")


_PAPER: dict[str, Any] = {"paired": False, "samples": 1}
# Changes to the configured repair. "none" does not steer; "plain" does not repair; "random" steers along a random
# direction of the same norm, "random-repaired" repairs that.
REPAIRS: dict[str, dict[str, Any]] = {
    "repaired": _PAPER,
    "readded": _PAPER | {"readd": True},
    "guided": _PAPER | {"hold": True},
    "paired": {"paired": True, "samples": 1},
    "paired-guided": {"paired": True, "samples": 1, "hold": True},
    "paired-mean": {"paired": True, "samples": 4},
    "paired-late": {"paired": True, "samples": 4, "t_start": 0.7},
    "paired-denoise": {"paired": True, "samples": 4, "steps": 1},
    "paired-sequence": {"paired": True, "samples": 1, "noise": "sequence"},
    "paired-adaptive": {"paired": True, "samples": 1, "rate": 0.5},
    "random-repaired": _PAPER,
}
METHODS = ("none", "plain", "random", *REPAIRS)


Experiment = Literal["sentiment", "sae", "persona", "files"]
SENTIMENT_DIRECTIONS = ("difference_of_means", "probe", "pca", "persona", "shuffled")


@dataclass(frozen=True)
class JudgeConfig:
    """An OpenAI-compatible endpoint that rates texts, beside the judge that needs none."""

    url: str | None = None
    """Base address of the endpoint, such as "http://127.0.0.1:8000/v1"; None judges offline."""
    model: str | None = None
    """Name of the judge's model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    workers: int = 8
    """Requests under way at once."""
    attempts: int = 6
    """How often a request is made at most, with growing pauses, before its rating counts as failed."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    input_price: float | None = None
    """Money for a million tokens sent, to show what the ratings will cost."""
    output_price: float | None = None
    """Money for a million tokens received."""

    def __post_init__(self) -> None:
        positive(self, "workers", "attempts", "timeout")
        if self.url and not self.model:
            raise InputError("name the judge's model with --judge.model")


@dataclass(frozen=True)
class SteerConfig:
    """Steer a language model along directions at many strengths, repair, judge, and compare the methods' frontiers."""

    priors: list[Prior] = changeable()
    """The priors that repair, by name, folder or repository; the first also scores how far activations are off the
    data."""
    output: Folder = changeable()
    """Folder of everything: results.parquet with every text, steer.json, report.html. The same command continues."""
    experiment: Experiment = "sentiment"
    """"sentiment" (directions from labelled sentences, neutral news beginnings as prompts); "sae" (features of a sparse
    autoencoder); "persona" (traits of a chat model); or "files" (directions from files, judged by `task`)."""
    directions: list[str] = changeable(default_factory=list)
    """For "sentiment": difference_of_means, probe, pca, persona, shuffled; for "persona": names of traits; for "files":
    their paths; for "sae": numbers of latents. By default the experiment's own choice."""
    methods: list[str] = changeable(
        default_factory=lambda: ["plain", "repaired", "paired", "random", "random-repaired"]
    )
    """What to compare; "none" (unsteered) and "plain", with which the others are compared, are always there."""
    strengths: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    """Strengths in mean activation norms."""
    both_signs: bool = True
    """Also steer the other way."""
    prompts: int = 100
    """How many prompts."""
    prompt_tokens: int = 20
    """Tokens of a prompt, of the experiments whose prompts are beginnings of texts."""
    new_tokens: int = 20
    """Tokens to generate after each prompt, greedily."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    positions: Literal["all", "last", "generated"] = "last"
    """Which positions are steered; "last" is the paper's: the prompt's last and every new one."""
    task: str = "92_glue_sst2"
    """Embedded labelled task that sentiment directions and the offline judge learn from."""
    reading: Literal["both", "embedding", "layer"] = "both"
    """What the offline judge reads: a sentence embedding, the model's own activations two thirds up, or both."""
    labelled: int = 3000
    """Most labelled texts to use: half for the directions, and all for the judge, which holds some out."""
    sae: Folder | None = None
    """Folder of the sparse autoencoder of the experiment "sae": one of `evaluate --baseline sae`, or of SAELens."""
    store: Folder | None = None
    """Activation store in which the top activations of the autoencoder's features are looked for."""
    features: int = 8
    """How many features of the autoencoder to draw, if `directions` names none."""
    batch_rows: int = changeable(256)
    """Texts generated together."""
    examples: int = changeable(3)
    """Prompts whose texts are on the page."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the denoiser; "auto" is bfloat16 where the device is fast at it."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of noise, controls and resampling."""
    repair: RepairConfig = field(default_factory=RepairConfig)
    """The repair; `methods` change parts of it."""
    judge: JudgeConfig = changeable(default_factory=JudgeConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "prompts", "prompt_tokens", "new_tokens", "labelled", "features", "batch_rows")
        at_least(2, self, "prompts")  # intervals are over prompts
        known("method", self.methods, METHODS)
        if self.experiment == "sentiment":
            known("direction of sentiment", self.directions, SENTIMENT_DIRECTIONS)
        if not self.priors:
            raise InputError("SteerConfig.priors is empty: name at least one, the score of activations needs it")
        if not self.strengths or not all(math.isfinite(r) and r > 0 for r in self.strengths):
            raise InputError(f"SteerConfig.strengths must be positive numbers, got {self.strengths}")
        if len(set(self.strengths)) < len(self.strengths):
            raise InputError(f"SteerConfig.strengths names one twice: {self.strengths}")
        if self.experiment == "files" and not self.directions:
            raise InputError("name the files of the directions with --directions")
        if self.experiment == "sae" and not self.sae:
            raise InputError("name the folder of the autoencoder with --sae")
        if self.experiment == "sae" and not self.store:
            raise InputError("name the store of the autoencoder's top activations with --store")

    def signed_strengths(self) -> list[float]:
        """Strengths, and where both signs are steered also the opposite ones."""
        return [*self.strengths, *(-r for r in self.strengths)] if self.both_signs else list(self.strengths)

    def repair_of(self, method: str) -> RepairConfig | None:
        """The repair of a method; None if it has none."""
        return replace(self.repair, **REPAIRS[method]) if method in REPAIRS else None
