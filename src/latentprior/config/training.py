"""The denoiser's shape, recipes, and a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from latentprior.config.base import (
    Folder,
    added,
    changeable,
    changes_of,
    choices,
    from_dict,
    grouped,
    groups,
    known,
    meaningless,
    old_names,
    positive,
    settings_of,
    to_dict,
    typed,
    unit_interval,
)
from latentprior.config.data import StreamConfig
from latentprior.config.embedded import default_layer
from latentprior.utils.errors import InputError

FORMER_STORE = "runs/activations"  # was the default, so configurations of streams hold it in older files


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
    skip: Literal["none", "normal"] = added("none", before="none")
    """"normal" adds ``(2t - 1) / ((1 - t)^2 + t^2) z_t``, the velocity if the data were standard normal, and scales
    what the network gives to nothing at both ends of the path, where that is exact. "none" is the paper's network."""
    modulation: Literal["gate", "norm"] = added("gate", before="gate")
    """What time, and layer, act on: the gates of the hidden units, inside the SiLU ("gate", the paper's network), or
    the output of each layer norm, which they scale and shift ("norm")."""

    def __post_init__(self) -> None:
        typed(self)
        choices(self)
        positive(self, "d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers")
        if self.d_model % 2:
            raise InputError(f"DenoiserConfig.d_model must be even (half cosines, half sines), got {self.d_model}")

    def departures(self) -> dict[str, Any]:
        """Options that make it another network than the paper's, which official files cannot hold."""
        return {name: value for name, value in settings_of(self).items() if name in ("skip", "modulation")}


@dataclass(frozen=True)
class Recipe:
    """How a prior is trained. `PRESETS` holds complete ones."""

    RENAMED = {"draws": "noise_samples"}

    batch_size: int = 4096
    """Activations of one optimizer step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    base_width: int | None = None
    """Width transfer (muP): AdamW's rate of matrices whose fan-in grows is multiplied by this / d_model."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""
    matrix_rate: float = 0.02
    """Peak learning rate of Muon; it needs no width transfer."""
    init: Literal["default", "scaled", "principal"] = "default"
    """Initial weights: torch's; normal ones scaled by fan-in with a zero output and open gates; or input and output
    along the principal directions of the activations, around small blocks ("principal")."""
    time_rate: float = added(1.0, before=1.0)
    """Share of AdamW's rate that the embeddings of time and layer, and the linears behind them, have."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rates fall from their peak to their end; "constant" falls only in the last share `cooldown`, linearly."""
    cooldown: float = 0.2
    """Share of the steps over which the schedule "constant" falls."""
    warmup: float = 0.01
    """Share of the steps over which the rate rises, from 1% of its peak."""
    final_rate: float = 0.1
    """Share of the peak rate at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float | None = None
    """Average the weights with this decay; the average is what is evaluated and saved."""
    times: Literal["grid", "uniform", "stratified", "logit_normal"] = "grid"
    """Noise levels: independent draws from the official grid of 1000; independent uniform draws; one draw in each of
    equal strata of [0, 1]; or the sigmoid of a normal variable, one draw in each of equally likely strata."""
    noise_samples: int = 1
    """Noises, each with a noise level of its own, drawn for each activation of a step; each costs as much work."""
    distinct_times: int = 64
    """How many strata "stratified" and "logit_normal" have; the time path is computed once for each."""
    logit_mean: float = 0.0
    """Mean of the normal variable of "logit_normal"; above 0 is noisier."""
    logit_scale: float = 1.0
    """Standard deviation of the normal variable of "logit_normal"."""
    weighting: Literal["none", "unbiased", "snr"] = "none"
    """Weight of each row's error: one; one over its time's density; or more near data and near noise ("snr")."""
    normalizer: Literal["standard", "whitened"] = "standard"
    """Activations are standardised in each dimension, or along the principal directions of their covariance."""

    def __post_init__(self) -> None:
        typed(self)
        choices(self)
        positive(self, "batch_size", "learning_rate", "matrix_rate", "base_width", "clip", "distinct_times")
        positive(self, "noise_samples", "logit_scale", "time_rate")
        unit_interval(self, "warmup", "final_rate", "cooldown")
        if not math.isfinite(self.logit_mean):
            raise InputError(f"Recipe.logit_mean must be finite, got {self.logit_mean}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"Recipe.ema must lie between 0 and 1, got {self.ema}")
        if self.schedule == "constant" and self.warmup + self.cooldown > 1:
            raise InputError(f"Recipe.warmup {self.warmup} and cooldown {self.cooldown} are more than the whole run")


_QUICK = Recipe(warmup=0.02, final_rate=0.0, betas=(0.9, 0.95), times="stratified")
PRESETS: dict[str, Recipe] = {
    "official": Recipe(),
    "quick": replace(_QUICK, batch_size=1024, learning_rate=2e-3),
    # The winners of docs/recipes.md.
    "fast": replace(
        _QUICK,
        batch_size=256,
        learning_rate=2e-3,
        time_rate=0.1,
        base_width=576,
        schedule="linear",
        init="principal",
        times="logit_normal",
        logit_scale=0.9,
    ),
}
_NETWORKS: dict[str, dict[str, Any]] = {"fast": {"skip": "normal", "modulation": "norm"}}  # others have the paper's


def recipe_of(preset: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of a preset, with some of its fields changed."""
    known("preset", [preset], PRESETS)
    return replace(PRESETS[preset], **grouped(Recipe, changes))


def network_of(preset: str) -> dict[str, Any]:
    """The options of the denoiser that a preset sets."""
    known("preset", [preset], PRESETS)
    return {"skip": "none", "modulation": "gate"} | _NETWORKS.get(preset, {})


@dataclass(frozen=True)
class StoreOptions:
    """Activations on disk: those to train on with --from store, and those of held-out documents."""

    path: Folder | None = changeable(None)
    """Activation store to train on."""
    heldout: Folder | None = changeable(None)
    """Activation store of held-out documents, for the held-out loss; a stream holds some of its text out by itself."""
    follow: bool = changeable(False)
    """The store is still being recorded: use every row once, in the order of the shards, and wait for more."""
    wait_seconds: float = changeable(600.0)
    """With `follow`: give up when nothing new was recorded for this long."""

    def __post_init__(self) -> None:
        positive(self, "wait_seconds")


@dataclass(frozen=True)
class PriorOptions:
    """Shape of the denoiser."""

    blocks: int = 3
    """Residual blocks of the denoiser."""
    d_model: int | None = None
    """Width of the denoiser; by default twice the activations' width."""
    d_mlp: int | None = None
    """Hidden units of each block; by default twice d_model."""
    skip: Literal["preset", "none", "normal"] = added("preset", before="none")
    """"normal" adds the velocity of a standard normal to what the network gives; "none" is the paper's network."""
    modulation: Literal["preset", "gate", "norm"] = added("preset", before="gate")
    """What time and layer act on: the gates of the hidden units ("gate", the paper's network), or the output of each
    layer norm, which they scale and shift ("norm")."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "blocks", "d_model", "d_mlp")

    def of_preset(self, preset: str) -> PriorOptions:
        """These options, with the preset's network where they leave it to that."""
        open_ = {name: value for name, value in network_of(preset).items() if getattr(self, name) == "preset"}
        return replace(self, **open_)

    def denoiser(self, width: int, multi_layer_n_layers: int | None = None) -> DenoiserConfig:
        """The denoiser's shape for activations of `width`; what is left to the preset is the paper's."""
        chosen: Any = self.of_preset("official")
        d_model = self.d_model or 2 * width
        d_mlp = self.d_mlp or 2 * d_model
        return DenoiserConfig(width, d_model, d_mlp, self.blocks, multi_layer_n_layers, chosen.skip, chosen.modulation)


@dataclass(frozen=True)
class RunOptions:
    """How long, where and on what is trained, and what is kept of it."""

    output: Folder = changeable()
    """Folder of the prior, its checkpoints and its log. The same command continues an interrupted run in it."""
    activations: int = 4_000_000
    """Activations to train on in all; a store is gone through as often as that takes."""
    seed: int = 0
    """Seed of initial weights, order of the data, noise and times."""
    device: str = changeable("auto")
    """Torch device; "auto" is this process's CUDA device if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix work; weights stay float32. "auto" is bfloat16 where the device is fast at it."""
    save_seconds: float = changeable(120.0)
    """Seconds between two saved training states."""
    log_every: int = changeable(20)
    """Steps between two lines of the log."""
    track: Literal["none", "wandb", "trackio"] = changeable("none")
    """Also log to one of these; log.jsonl is always written."""
    heldout_activations: int = changeable(4096)
    """Activations of the held-out loss."""
    micro_batch: int | None = None
    """Activations of one forward and backward pass; by default 1024 on a CPU, all on a GPU."""
    parallel: Literal["auto", "ddp", "fsdp"] = changeable("auto")
    """With several processes (torchrun): a copy of the prior in each, or its weights sharded over them. "auto" shards
    from a billion parameters on."""
    compile: Literal["auto", "on", "off"] = changeable("auto")
    """Compile the denoiser's blocks; "auto" does on a GPU."""
    float8: bool = False
    """Matrix products of the blocks in float8 (needs torchao and a GPU that has it)."""

    def __post_init__(self) -> None:
        choices(self)
        positive(self, "activations", "micro_batch", "heldout_activations", "log_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a prior on an activation store, or on the live activations of a language model."""

    UNNAMED = ("run", "store", "stream", "prior")  # groups that --help leaves out of the names of options

    source: Literal["store", "llm"] = "store"
    """Train on a store, or on what the language model computes meanwhile (also spelled --from)."""
    layers: list[int] = field(default_factory=list)
    """Blocks that are modelled, counted from 0, by one prior; by default all of a store, of a language model 15
    (of gemma-3-270m 9)."""
    preset: Literal["official", "quick", "fast"] = "quick"
    """"official" is the paper's recipe, and "quick" one for runs of minutes to hours, both of the paper's network;
    "fast", with a network that is conditioned better, gets the most out of an activation (docs/recipes.md)."""
    run: RunOptions
    store: StoreOptions = field(default_factory=StoreOptions)
    stream: StreamConfig = field(default_factory=StreamConfig)
    prior: PriorOptions = field(default_factory=PriorOptions)
    """Shape of the denoiser."""
    recipe: dict[str, Any] = changes_of(Recipe)
    """Fields of the preset's recipe to change, for example {"learning_rate": 1e-3}."""

    def __post_init__(self) -> None:
        choices(self)
        self._check_source()
        if self.source == "llm" and not self.layers:
            object.__setattr__(self, "layers", [default_layer(self.stream.llm.model)])
        self.resolved_recipe()

    def _check_source(self) -> None:
        if self.source == "llm":
            path = [] if self.store.path == FORMER_STORE else ["store.path"]
            meaningless(self, "with --from llm", *path, "store.follow", "store.wait_seconds")
            return
        of_any = ("statistics", "document_shards", "disk_budget")
        streamed = [f"stream.{f.name}" for f in fields(StreamConfig) if f.name not in of_any]
        meaningless(self, "for a store (it belongs to --from llm)", *streamed)
        if not self.store.follow:
            meaningless(self, "for a store without --follow", "stream.statistics", "store.wait_seconds")
        if not self.store.path:
            raise InputError("name the activation store to train on with --store, or train on a model with --from llm")

    @classmethod
    def of(cls, **options: Any) -> TrainConfig:
        """A configuration from options by name; the group of each may be left out, as on the command line."""
        return from_dict(cls, options)

    def changed(self, **options: Any) -> TrainConfig:
        """This configuration with other values of some options, named as in `of`."""
        values = grouped(TrainConfig, options)
        for name, kind in groups(TrainConfig).items():
            if name in values and kind is not Recipe:
                before = {f.name: getattr(getattr(self, name), f.name) for f in fields(kind)}
                values[name] = from_dict(kind, before | grouped(kind, values[name]))
        return replace(self, **values)

    def resolved_recipe(self) -> Recipe:
        """The preset with this configuration's changes."""
        return recipe_of(self.preset, self.recipe)

    def resolved_prior(self) -> PriorOptions:
        """The denoiser's options, with those that are left out as the preset has them."""
        return self.prior.of_preset(self.preset)

    def settings(self) -> dict[str, Any]:
        """What decides the weights, but for the rows, as training states and provenance hold it: without groups."""
        recipe = old_names(Recipe, settings_of(self.resolved_recipe()))
        return settings_of(self.resolved_prior()) | settings_of(self.run) | {"recipe": recipe}

    def without_groups(self) -> dict[str, Any]:
        """All options by the names that they have in ``train.json`` and its like; `from_dict` reads them again."""
        values = to_dict(self)
        store, stream = values.pop("store"), old_names(StreamConfig, values.pop("stream"))
        values |= {"store": store.pop("path"), **store, **stream, **values.pop("prior"), **values.pop("run")}
        return values | {"recipe": old_names(Recipe, self.recipe)}
