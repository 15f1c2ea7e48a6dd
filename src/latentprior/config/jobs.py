"""What is done with a prior: evaluate, sample, convert, and the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentprior.config.base import (
    SOLVERS,
    File,
    Folder,
    Grid,
    Prior,
    Solver,
    added,
    at_least,
    changeable,
    choices,
    meaningless,
    positive,
)
from latentprior.config.data import LLMConfig, TextConfig
from latentprior.utils.errors import InputError


@dataclass(frozen=True)
class SAEConfig:
    """A TopK sparse autoencoder (SAE), trained on the activations that the Gaussian baselines are fitted to."""

    path: Folder | None = changeable(None)
    """Folder of the SAE, this project's or SAELens's; trained if it has none. By default `sae` in the output folder."""
    expansion: int = 8
    """Latents for each dimension of the activations."""
    k: int = 50
    """Active latents of each activation."""
    activations: int | None = None
    """Activations to train on; by default five times what the store has of the layer, and at most 1,000,000."""
    learning_rate: float | None = None
    """Step of the signed momentum; None is 0.0025 at 16,384 latents, half as much at four times as many."""
    seed: int = 0
    """Seed of initial weights and batches."""

    def __post_init__(self) -> None:
        positive(self, "expansion", "k", "activations", "learning_rate")


@dataclass(frozen=True)
class DoctorConfig:
    """Check that language model, prior and machine work together. Paste what it prints into a bug report."""

    prior: Prior | None = None
    """Name, folder or repository of a prior to check as well."""
    layer: int | None = None
    """Block whose output is recorded and edited; by default the prior's, or the middle one."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    llm: LLMConfig = field(default_factory=LLMConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a prior against real activations and in the language model."""

    prior: Prior
    """Name of an installed prior, a folder or a repository."""
    heldout: Folder
    """Activation store of held-out documents; it needs a little over twice `samples` rows."""
    output: Folder = changeable()
    """Folder of evaluate.json and report.html."""
    train: Folder | None = None
    """Store to which the Gaussian baselines are fitted; by default the half of the held-out rows that is left."""
    samples: int = 6000
    """Generated activations, and real ones in each of the two disjoint sets."""
    solvers: list[Solver] = field(default_factory=lambda: list(SOLVERS))
    """Solvers to compare."""
    nfes: list[int] = field(default_factory=lambda: [4, 20])
    """Numbers of denoiser evaluations to compare."""
    delta_lm: bool = True
    """Measure what repairing every position costs the language model."""
    t_starts: list[float] = field(default_factory=lambda: [0.5])
    """Noise levels of the repair."""
    steps: int = 20
    """Denoiser evaluations of the repair."""
    solver: Solver = "euler"
    """Solver of the repair."""
    per_document: bool = False
    """Headline the delta LM loss as a mean over documents (the official definition), not over tokens."""
    baseline: list[Literal["sae"]] = field(default_factory=list)
    """Further baselines beside the Gaussians: "sae" reconstructs held-out activations with a sparse autoencoder."""
    compare: list[Prior] = field(default_factory=list)
    """Further priors of the same activations, to be measured on the same rows, noise and texts; their samples are of
    the last of `solvers` and `nfes`."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    checkpoint: str = "final"
    """Which of the prior's weights."""
    projections: int = 512
    """Random directions of the sliced Wasserstein distance."""
    fit_rows: int = 100_000
    """Most rows that the Gaussian baselines are fitted to."""
    max_length: int = 128
    """Tokens of a document in the delta LM loss."""
    batch_tokens: int = 1024
    """Most tokens of one forward pass of the language model, padding included."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the denoiser; "auto" is bfloat16 where the device is fast at it."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of samples, noise, projections and resampling."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(part="heldout", limit=128))

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "samples", "projections", "fit_rows", "steps", "max_length", "batch_tokens")
        for name in ("nfes", "t_starts"):
            if any(not value > 0 for value in getattr(self, name)):
                raise InputError(f"EvaluateConfig.{name} must be positive, got {getattr(self, name)}")
        if self.compare and not (self.solvers and self.nfes):
            raise InputError("--compare draws samples: name at least one of --solvers and of --nfes")
        if "sae" not in self.baseline:
            meaningless(self, "without --baseline sae", "sae")


@dataclass(frozen=True)
class SampleConfig:
    """Draw activations from a prior into a safetensors file."""

    prior: Prior
    """Name of an installed prior, a folder or a repository."""
    output: File = changeable()
    """File to write: `activations` [n, d] float32."""
    n: int = 1024
    """How many activations."""
    steps: int = 20
    """Denoiser evaluations for each."""
    solver: Solver = "euler"
    """How to integrate the flow."""
    grid: Grid = "uniform"
    """Times of the evaluations; "official" are those of the official sampler."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    checkpoint: str = "final"
    """Which of the prior's weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the denoiser."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "n", "steps")


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a prior or recorded activations between this project's files and the official ones."""

    source: Folder
    """Folder (or name or repository, for a prior) to read."""
    output: Folder = changeable()
    """Folder to write."""
    to: Literal["latentprior", "official"] = "latentprior"
    """Format to write."""
    checkpoint: str = "final"
    """Which of the prior's weights."""
    model: str = ""
    """Model that official activations, which do not say, come from; by default none is noted."""
    layer: int | None = None
    """Layer of official activations, if their folder's name does not say; or which one of a store to write."""
    overwrite: bool = False
    """Replace what an earlier conversion left in the output folder."""

    def __post_init__(self) -> None:
        choices(self)


@dataclass(frozen=True)
class DemoConfig:
    """The main job end to end on the embedded model and corpus: record, train, evaluate, steer, report."""

    output: Folder = changeable("runs/demo")
    """Folder of everything; a second run reuses what is there. The page is report.html, its data demo.json."""
    tiny: bool = changeable(False)
    """A run of under a minute that only shows that everything works."""
    layer: int | None = None
    """Block whose output is modelled; by default 15, of gemma-3-270m 9."""
    rows: int = 220_000
    """Activations to record for training."""
    activations: int = 1_300_000
    """Activations to train on; recorded ones are used several times."""
    heldout_rows: int = 24_000
    """Activations to record from held-out documents."""
    samples: int = 6000
    """Generated activations of the evaluation."""
    lm_documents: int = 64
    """Held-out documents of the delta LM loss."""
    prompts: int = 32
    """Prompts of the steering part."""
    labelled: int = added(2000, before=2000)
    """SST-2 sentences that its direction and its classifier are learned from."""
    strengths: list[float] = field(default_factory=lambda: [0.4, 0.8, 1.2])
    """Steering strengths in units of the mean activation norm."""
    new_tokens: int = 20
    """Tokens to generate after each prompt."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 0
    """Seed of everything."""
    llm: LLMConfig = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        positive(self, "rows", "activations", "heldout_rows", "samples", "lm_documents", "prompts", "labelled")
        positive(self, "new_tokens")
        at_least(2, self, "prompts")  # intervals are over prompts
        if not self.strengths:
            raise InputError("DemoConfig.strengths is empty: name at least one, for example [0.6]")
