"""Every option of the package, as frozen dataclasses: the command line, YAML files and Python read the same ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin, get_type_hints

from latentprior.errors import InputError, unknown

Solver = Literal["euler", "midpoint", "heun", "ab2"]
Grid = Literal["uniform", "official"]
Side = Literal["output", "input"]

SOLVERS: tuple[Solver, ...] = ("euler", "midpoint", "heun", "ab2")
GRIDS: tuple[Grid, ...] = ("uniform", "official")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise InputError(f"{type(owner).__name__}.{name} must be positive, got {value}")


def _one_of(owner: object, name: str, valid: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in valid:
        raise unknown(f"{type(owner).__name__}.{name}", value, valid)


def _unit_interval(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise InputError(f"{type(owner).__name__}.{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class LLMConfig:
    """Which language model, and how it is held."""

    model: str = "smollm2-135m"
    """Hugging Face id, local folder, or "smollm2-135m", the model that requirements-assets.txt installs."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; "auto" is bfloat16 where the device is fast at it, else float32."""
    device: str = "auto"
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off: such models are refused."""

    def __post_init__(self) -> None:
        _one_of(self, "dtype", ("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class TextConfig:
    """Which documents."""

    dataset: str = "sae-probes"
    """The embedded corpus "sae-probes", a Hugging Face dataset id, or a txt, jsonl, csv or parquet file
    (also .zst), or a folder of them."""
    subset: str | None = None
    """Configuration name of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    column: str | None = None
    """Column that holds the text; by default "text", "prompt" or "content", or the only text column."""
    part: Literal["train", "heldout", "all"] = "train"
    """Documents to train on, documents held out of training, or both."""
    heldout: float = 0.05
    """Share of the documents that is held out, chosen by a hash of the text: equal texts fall on one side."""
    limit: int | None = None
    """Stop after this many documents of the chosen part."""

    def __post_init__(self) -> None:
        _one_of(self, "part", ("train", "heldout", "all"))
        _unit_interval(self, "heldout")
        _positive(self, "limit")


@dataclass(frozen=True)
class RecordConfig:
    """Record activations of a language model into a store on disk."""

    output: str = "runs/activations"
    """Folder of the store."""
    layers: list[int] = field(default_factory=lambda: [15])
    """Blocks to record, counted from 0: layer 15 is the output of block 15, hidden_states[16] of transformers."""
    side: Side = "output"
    """Record a block's output or its input."""
    max_length: int = 2048
    """Documents are cut to this many tokens, the beginning-of-sequence token included."""
    positions: Literal["all", "last", "random"] = "all"
    """Positions of a document to record; the first one never is."""
    positions_per_document: int = 8
    """How many positions "random" draws for each document."""
    chat: bool = False
    """Wrap every document as a user message in the tokenizer's chat template."""
    batch_tokens: int = 4096
    """Most tokens of one forward pass, padding included."""
    max_activations: int | None = None
    """Stop once this many rows are recorded."""
    shard_rows: int = 65536
    """A shard is closed once it holds at least this many rows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage precision."""
    sinks: Literal["drop", "keep"] = "drop"
    """Attention sinks (norm over 10 times the median) are left out and counted, or kept."""
    seed: int = 0
    """Seed of the random positions."""
    resume: bool = False
    """Continue an interrupted recording in the same folder; nothing is lost or repeated."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        _one_of(self, "side", ("output", "input"))
        _one_of(self, "positions", ("all", "last", "random"))
        _one_of(self, "dtype", ("bfloat16", "float32"))
        _one_of(self, "sinks", ("drop", "keep"))
        _positive(self, "max_length", "positions_per_document", "batch_tokens", "max_activations", "shard_rows")
        if not self.layers:
            raise InputError("RecordConfig.layers is empty: name at least one block, for example [15]")


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of the denoiser (paper, section on architecture)."""

    d_input: int
    """Width of the activations."""
    d_model: int
    """Width of the denoiser's residual stream; the paper takes 2 d_input."""
    d_mlp: int
    """Hidden units of each block; the paper takes 2 d_model."""
    n_layers: int = 3
    """Residual blocks."""
    multi_layer_n_layers: int | None = None
    """Blocks of the language model if one denoiser serves several of its layers, else None."""

    def __post_init__(self) -> None:
        _positive(self, "d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers")
        if self.d_model % 2:
            raise InputError(f"DenoiserConfig.d_model must be even (half cosines, half sines), got {self.d_model}")


@dataclass(frozen=True)
class Recipe:
    """How a prior is trained. `PRESETS` holds complete ones."""

    batch_size: int = 4096
    """Activations of one optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup: float = 0.01
    """Share of the steps over which the rate rises, from 1% of its peak."""
    final_rate: float = 0.1
    """Share of the peak rate that the cosine decays to."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float | None = None
    """Average the weights with this decay; the average is what is evaluated and saved."""
    times: Literal["grid", "stratified"] = "grid"
    """Noise levels: independent draws from the official grid of 1000, or one draw in each of equal strata of [0, 1]."""
    distinct_times: int = 64
    """How many strata "stratified" has; the time path is computed once for each."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "learning_rate", "clip", "distinct_times")
        _unit_interval(self, "warmup", "final_rate")
        _one_of(self, "times", ("grid", "stratified"))
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"Recipe.ema must lie between 0 and 1, got {self.ema}")
        if self.times == "stratified" and self.batch_size % self.distinct_times:
            raise InputError(f"batch_size {self.batch_size} is not a multiple of distinct_times {self.distinct_times}")


PRESETS: dict[str, Recipe] = {
    "official": Recipe(),
    "quick": Recipe(
        batch_size=1024, learning_rate=2e-3, warmup=0.02, final_rate=0.0, betas=(0.9, 0.95), times="stratified"
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a prior on an activation store."""

    store: str = "runs/activations"
    """Activation store to train on."""
    heldout: str | None = None
    """Activation store of held-out documents, for the held-out loss."""
    output: str = "runs/prior"
    """Folder of the prior, its checkpoints and its log. The same command continues an interrupted run in it."""
    activations: int = 4_000_000
    """Activations to train on in all; the store is gone through as often as that takes."""
    preset: Literal["official", "quick"] = "quick"
    """"official" is the paper's recipe; "quick" suits runs of minutes to hours."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset's recipe to change, for example {"learning_rate": 1e-3}."""
    blocks: int = 3
    """Residual blocks of the denoiser."""
    d_model: int | None = None
    """Width of the denoiser; by default twice the activations' width."""
    d_mlp: int | None = None
    """Hidden units of each block; by default twice d_model."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix work; weights stay float32. "auto" is bfloat16 where the device is fast at it."""
    micro_batch: int | None = None
    """Activations of one forward and backward pass; by default 1024 on a CPU (cache-sized), all on a GPU."""
    heldout_activations: int = 4096
    """Activations of the held-out loss."""
    log_every: int = 20
    """Steps between two lines of the log."""
    save_seconds: float = 120.0
    """Seconds between two saved training states."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Also log to one of these; log.jsonl is always written."""
    device: str = "auto"
    """Torch device."""
    seed: int = 0
    """Seed of initial weights, order of the data, noise and times."""

    def __post_init__(self) -> None:
        _one_of(self, "preset", tuple(PRESETS))
        _one_of(self, "precision", ("auto", "float32", "bfloat16"))
        _one_of(self, "track", ("none", "wandb", "trackio"))
        _positive(self, "activations", "blocks", "d_model", "d_mlp", "micro_batch", "heldout_activations", "log_every")
        self.resolved_recipe()

    def resolved_recipe(self) -> Recipe:
        """The preset with this configuration's changes."""
        valid = [f.name for f in dataclasses.fields(Recipe)]
        for key in self.recipe:
            if key not in valid:
                raise unknown("recipe key", key, valid)
        return dataclasses.replace(PRESETS[self.preset], **self.recipe)

    def denoiser(self, width: int, multi_layer_n_layers: int | None = None) -> DenoiserConfig:
        """The denoiser's shape for activations of `width`."""
        d_model = self.d_model or 2 * width
        return DenoiserConfig(width, d_model, self.d_mlp or 2 * d_model, self.blocks, multi_layer_n_layers)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a prior against real activations and in the language model."""

    prior: str = "runs/prior"
    """Folder or repository of the prior."""
    checkpoint: str = "final"
    """Which of its weights."""
    heldout: str = "runs/heldout"
    """Activation store of held-out documents; it needs a little over twice `samples` rows."""
    train: str | None = "runs/activations"
    """Store to which the Gaussian baselines are fitted; None fits them to the half of the held-out rows that the
    samples are not compared with."""
    output: str = "runs/evaluation"
    """Folder of evaluate.json."""
    layer: int | None = None
    """Which layer of a multi-layer prior."""
    samples: int = 6000
    """Generated activations, and real ones in each of the two disjoint sets."""
    solvers: list[Solver] = field(default_factory=lambda: list(SOLVERS))
    """Solvers to compare."""
    nfes: list[int] = field(default_factory=lambda: [4, 20])
    """Numbers of denoiser evaluations to compare."""
    projections: int = 512
    """Random directions of the sliced Wasserstein distance."""
    fit_rows: int = 100_000
    """Most rows that the Gaussian baselines are fitted to."""
    delta_lm: bool = True
    """Measure what repairing every position costs the language model."""
    per_document: bool = False
    """Headline the delta LM loss as a mean over documents (the official definition), not over tokens."""
    t_starts: list[float] = field(default_factory=lambda: [0.5])
    """Noise levels of the repair."""
    steps: int = 20
    """Denoiser evaluations of the repair."""
    solver: Solver = "euler"
    """Solver of the repair."""
    max_length: int = 128
    """Tokens of a document in the delta LM loss."""
    batch_tokens: int = 1024
    """Most tokens of one forward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the denoiser; "auto" is bfloat16 where the device is fast at it."""
    seed: int = 0
    """Seed of samples, noise, projections and resampling."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(part="heldout", limit=128))

    def __post_init__(self) -> None:
        _positive(self, "samples", "projections", "fit_rows", "steps", "max_length", "batch_tokens")
        for solver in (*self.solvers, self.solver):
            if solver not in SOLVERS:
                raise unknown("solver", solver, SOLVERS)
        for name in ("nfes", "t_starts"):
            if any(not value > 0 for value in getattr(self, name)):
                raise InputError(f"EvaluateConfig.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class SampleConfig:
    """Draw activations from a prior into a safetensors file."""

    prior: str = "runs/prior"
    """Folder or repository of the prior."""
    checkpoint: str = "final"
    """Which of its weights."""
    output: str = "runs/samples.safetensors"
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the denoiser."""
    device: str = "auto"
    """Torch device."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        _positive(self, "n", "steps")
        _one_of(self, "solver", SOLVERS)
        _one_of(self, "grid", GRIDS)
        _one_of(self, "precision", ("float32", "bfloat16"))


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a prior or recorded activations between this project's files and the official ones."""

    source: str = ""
    """Folder (or repository, for a prior) to read."""
    output: str = ""
    """Folder to write."""
    to: Literal["latentprior", "official"] = "latentprior"
    """Format to write."""
    checkpoint: str = "final"
    """Which weights of a prior."""
    model: str = ""
    """Model that official activations, which do not say, come from."""
    layer: int | None = None
    """Layer that official activations come from, if their folder's name does not say; or the one to write out of a
    store of several layers."""

    def __post_init__(self) -> None:
        _one_of(self, "to", ("latentprior", "official"))
        for name in ("source", "output"):
            if not getattr(self, name):
                raise InputError(f"name a folder with --{name}")


@dataclass(frozen=True)
class DemoConfig:
    """The main job end to end on the embedded model and corpus: record, train, evaluate, steer, report."""

    output: str = "runs/demo"
    """Folder of everything; a second run reuses what is there. The page is report.html, its data demo.json."""
    tiny: bool = False
    """A run of under a minute that only shows that everything works."""
    layer: int = 15
    """Block whose output is modelled."""
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
    strengths: list[float] = field(default_factory=lambda: [0.4, 0.8, 1.2])
    """Steering strengths in units of the mean activation norm."""
    new_tokens: int = 20
    """Tokens to generate after each prompt."""
    seed: int = 0
    """Seed of everything."""
    llm: LLMConfig = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        _positive(self, "rows", "activations", "heldout_rows", "samples", "lm_documents", "prompts", "new_tokens")
        if not self.strengths:
            raise InputError("DemoConfig.strengths is empty: name at least one, for example [0.6]")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from plain values, nested dataclasses included.

    Raises:
        InputError: a key that `cls` does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown(f"{cls.__name__} key", key, fields)
    types = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        kind = types[key]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = from_dict(kind, value)
        elif get_origin(kind) is tuple and isinstance(value, list):
            value = tuple(value)  # JSON and YAML have lists only
        built[key] = value
    return cls(**built)
