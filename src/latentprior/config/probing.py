"""Probing: which features of which hookpoint tell the classes of labelled texts apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentprior.config.base import Folder, Prior, at_least, changeable, choices, known, positive
from latentprior.config.data import LLMConfig
from latentprior.utils.errors import InputError

SOURCES = ("layer", "rotation", "mlp-neurons", "sae", "random-denoiser", "meta-neurons")


@dataclass(frozen=True)
class ProbeConfig:
    """Measure how well single features, meta-neurons among them, tell the classes of labelled texts apart."""

    priors: list[Prior]
    """Priors of one hookpoint, by name, folder or repository: the first is compared with the baselines, all show
    how AUC follows the held-out loss."""
    output: Folder = changeable()
    """Folder of probe.json, report.html, probes.csv, winners.parquet, one file a task. The same command continues."""
    tasks: list[str] = changeable(default_factory=list)
    """Names of embedded tasks of SAE-Probes, or paths of CSV files; by default its 113 binary tasks."""
    text_column: str | None = None
    """Column of a CSV file that holds the texts; by default "text", "prompt" or "content", or the only text column."""
    label_column: str | None = None
    """Column of a CSV file with the two classes; by default "target", "label", "class", or the only one left."""
    recording: Folder | None = changeable(None)
    """Folder of the recorded activations, so that several runs share them; by default `recording` in the output."""
    checkpoint: str = "final"
    """Which of the prior's weights."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    sources: list[str] = field(default_factory=lambda: [name for name in SOURCES if name != "sae"])
    """Features to compare: layer (the layer's output), rotation (that through a random rotation), mlp-neurons (hidden
    units of the MLPs of all blocks up to the layer), sae (latents of `sae`), random-denoiser (an untrained denoiser of
    the prior's shape), meta-neurons (the prior's hidden units)."""
    sae: Folder | None = None
    """Folder of an SAE of the same hookpoint, of `evaluate --baseline sae` or SAELens; adds the source "sae"."""
    t: list[float] = field(default_factory=lambda: [0.1])
    """Noise levels of the meta-neurons; with several, a unit counts once at each."""
    times: list[float] = field(default_factory=list)
    """Noise levels of the map of AUC by block and t, such as [0.05,0.1,0.2,0.5,0.9]; by default none is drawn."""
    noises: int = 1
    """Noises over which a meta-neuron is averaged."""
    noise: Literal["shared", "own"] = "shared"
    """"shared": the same noises for every text: a feature depends on the activation alone; "own": others for each."""
    mlp_draws: int = changeable(10)
    """Random draws of as many MLP neurons as the first prior has meta-neurons, each picked from by the same protocol: a
    comparison at equal numbers. Made where both are compared and MLP neurons are more; none with 0."""
    method: Literal["rank", "logistic"] = "rank"
    """"rank" finds each feature's AUC by rank statistics, exactly; "logistic" fits scikit-learn's LogisticRegressionCV
    to each of the candidates, the reference, hundreds of times as slow."""
    candidates: int = 512
    """Features with the largest difference of class means that are probed (the paper's screening)."""
    folds: int = 5
    """Folds of the cross-validation that chooses the feature."""
    sparse: list[int] = field(default_factory=lambda: [1, 2, 5, 16])
    """Sizes k of k-sparse probes; none with []."""
    dense: bool = True
    """Also probe on all features of a source together: the ceiling."""
    max_length: int = 1024
    """Tokens of a text, the beginning-of-sequence token included; longer texts keep their last, as in SAE-Probes."""
    max_test: int | None = None
    """Most test rows of a task, the first of the protocol's random order; by default all."""
    batch_tokens: int = changeable(4096)
    """Most tokens of one forward pass of the language model, padding included."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the denoiser; "auto" is bfloat16 where the device is fast at it."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    seed: int = 42
    """Seed of the split (the protocol's is 42), of noise, controls and resampling."""
    llm: LLMConfig = changeable(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "noises", "candidates", "max_test", "batch_tokens")
        known("source of features", self.sources, SOURCES)
        at_least(2, self, "folds", "max_length")
        at_least(0, self, "mlp_draws")
        if not self.chosen_sources():
            raise InputError("ProbeConfig.sources is empty: name at least one")
        if "sae" in self.sources and not self.sae:
            raise InputError("name the folder of the autoencoder with --sae")
        if not self.priors:
            raise InputError("ProbeConfig.priors is empty: name at least one, it says which layer is probed")
        for t in (*self.t, *self.times):
            if not 0 <= t <= 1:
                raise InputError(f"noise levels must lie in [0, 1], got {t}")
        if not self.t:
            raise InputError("ProbeConfig.t is empty: name at least one noise level")
        if any(k < 1 for k in self.sparse):
            raise InputError(f"ProbeConfig.sparse must be positive numbers, got {self.sparse}")

    def chosen_sources(self) -> list[str]:
        """Names of the sources, the autoencoder's included where there is one, in their usual order."""
        return [name for name in SOURCES if name in self.sources or (name == "sae" and self.sae)]
