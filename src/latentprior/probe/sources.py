"""Sources of features for probing: the layer's output, MLP neurons, SAE latents, meta-neurons, and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentprior.config import ProbeConfig
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.prior.loading import heldout_loss
from latentprior.probe.names import short_names
from latentprior.probe.recording import Recording
from latentprior.sae.sae import SAE
from latentprior.utils.errors import InputError
from latentprior.utils.formatting import counted
from latentprior.utils.random import keyed_generator, normal

ROWS = 1024  # activations that pass through a denoiser together
LABELS = {
    "layer": "Layer output",
    "rotation": "Layer output, rotated at random",
    "mlp-neurons": "MLP neurons",
    "sae": "SAE latents",
    "random-denoiser": "Untrained denoiser",
    "meta-neurons": "Meta-neurons",
}
_ROTATION, _DENOISER, _NOISE, _DRAW = 1, 2, 3, 4  # streams of random numbers


@dataclass(frozen=True)
class Source:
    """Features of texts: `width` units of each block at each noise level, numbered by level, then block."""

    name: str
    label: str
    kind: Literal["raw", "mlp", "sae", "prior", "control"]
    features: Callable[[Sequence[str]], Float[Tensor, "n f"]]
    blocks: int
    width: int
    times: tuple[float, ...] = ()
    """Noise levels of a denoiser's units."""
    prior: str | None = None
    heldout_loss: float | None = None
    activations: int | None = None
    """What the prior was trained on."""

    @property
    def units(self) -> int:
        return max(len(self.times), 1) * self.blocks * self.width

    def locate(self, unit: int) -> tuple[float | None, int, int]:
        """Noise level, block and index in it of a feature."""
        group, index = divmod(unit, self.width)
        level, block = divmod(group, self.blocks)
        return self.times[level] if self.times else None, block, index

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "label", "kind", "units", "blocks", "times", "prior", "heldout_loss", "activations")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Draws:
    """Random subsets of a source's features, as many of them as another source has, the same ones for every task."""

    name: str
    label: str
    source: Source
    size: int
    """Features of a draw."""
    number: int
    seed: int

    def subsets(self) -> Bool[Tensor, "s f"]:
        """Which features each draw has; a draw does not depend on how many there are."""
        drawn = torch.zeros(self.number, self.source.units, dtype=torch.bool)
        for draw, features in enumerate(drawn):
            generator = keyed_generator(self.seed, _DRAW, draw)
            features[torch.randperm(self.source.units, generator=generator)[: self.size]] = True
        return drawn

    def to_dict(self) -> dict[str, Any]:
        described = {"name": self.name, "label": self.label, "units": self.size, "draws": self.number}
        return self.source.to_dict() | described


def equal_draws(config: ProbeConfig, sources: Sequence[Source]) -> Draws | None:
    """Draws of as many MLP neurons as the first prior has meta-neurons.

    None if none are asked for, if either source is missing, or if there are no more MLP neurons than that.
    """
    named = {source.name: source for source in sources}
    mlp, prior = named.get("mlp-neurons"), named.get("meta-neurons")
    if not (config.mlp_draws and mlp and prior and prior.units < mlp.units):
        return None
    label = f"{mlp.label}, as many as meta-neurons ({counted(config.mlp_draws, 'draw')})"
    return Draws("mlp-neurons-drawn", label, mlp, prior.units, config.mlp_draws, config.seed)


def sources_of(
    config: ProbeConfig, recording: Recording, priors: Mapping[str, GLP], sae: SAE | None = None
) -> list[Source]:
    """The sources that a run compares: the baselines, the first prior, then the other priors."""
    first, *others = priors
    makers: dict[str, Callable[[], Source]] = {
        "layer": lambda: layer_output(recording),
        "rotation": lambda: rotated(recording, config.seed),
        "mlp-neurons": lambda: mlp_neurons(recording),
        "sae": lambda: sae_latents(recording, sae),
        "random-denoiser": lambda: untrained(config, recording, priors[first]),
        "meta-neurons": lambda: meta_neurons(config, recording, priors[first], first),
    }
    chosen = [makers[name]() for name in config.chosen_sources()]
    short = dict(zip(priors, short_names(list(priors)), strict=True))
    for name in others:
        label = f"{LABELS['meta-neurons']} of {short[name]}"
        chosen.append(meta_neurons(config, recording, priors[name], name, f"meta-neurons: {name}", label=label))
    return chosen


def layer_output(recording: Recording) -> Source:
    width = recording.hookpoint.width
    return Source("layer", LABELS["layer"], "raw", lambda texts: recording.output(texts).float(), 1, width)


def rotated(recording: Recording, seed: int) -> Source:
    """The layer's output through a random rotation: are its own axes special?"""
    width = recording.hookpoint.width
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=keyed_generator(seed, _ROTATION)))

    def features(texts: Sequence[str]) -> Tensor:
        x = recording.output(texts).float()
        return x @ rotation.to(x.device)

    return Source("rotation", LABELS["rotation"], "control", features, 1, width)


def mlp_neurons(recording: Recording) -> Source:
    """Hidden units of the language model's own MLPs, of all blocks up to the layer (paper, baseline)."""
    hookpoints = recording.mlp_hookpoints
    if not hookpoints:
        raise InputError(f"{recording.folder} holds no MLP neurons: record them first")

    def features(texts: Sequence[str]) -> Tensor:
        return torch.cat([recording.mlp(texts, block) for block in range(len(hookpoints))], dim=1)

    return Source("mlp-neurons", LABELS["mlp-neurons"], "mlp", features, len(hookpoints), hookpoints[0].width)


def sae_latents(recording: Recording, sae: SAE | None) -> Source:
    if sae is None:
        raise InputError("the source 'sae' needs a sparse autoencoder")

    def features(texts: Sequence[str]) -> Tensor:
        indices, values = sae.encode(recording.output(texts).float())
        return torch.zeros(len(texts), sae.latents, device=values.device).scatter_(1, indices, values)

    return Source("sae", LABELS["sae"], "sae", features, 1, sae.latents)


def untrained(config: ProbeConfig, recording: Recording, like: GLP) -> Source:
    """Hidden units of a denoiser of the same shape with torch's initial weights: what training adds is above this."""
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator only
        torch.default_generator.set_state(keyed_generator(config.seed, _DENOISER).get_state())
        denoiser = Denoiser(like.denoiser.config).to(like.device, like.denoiser.dtype)
    glp = GLP(denoiser.eval().requires_grad_(False), like.normalizer, like.hookpoints)
    return meta_neurons(config, recording, glp, None, "random-denoiser", label=LABELS["random-denoiser"])


def meta_neurons(
    config: ProbeConfig,
    recording: Recording,
    glp: GLP,
    prior: str | None,
    name: str = "meta-neurons",
    t: float | None = None,
    label: str = LABELS["meta-neurons"],
) -> Source:
    """Hidden units of a prior (None: of a control) at noise level `t` (None: the configured ones), mean over noises."""
    times = config.t if t is None else [t]

    def features(texts: Sequence[str]) -> Tensor:
        x = recording.output(texts).float().to(glp.device)
        shared = normal(config.noises, 1, glp.width, seed=keyed_generator(config.seed, _NOISE), device=glp.device)
        own = keyed_generator(config.seed, _NOISE)
        parts = []
        for rows in x.split(ROWS):
            noises = shared if config.noise == "shared" else normal(config.noises, *rows.shape, seed=own).to(x.device)
            parts.append(torch.cat([unit_means(glp, rows, noises, t, config.layer) for t in times], dim=1))
        return torch.cat(parts)

    kind, shape = "control" if prior is None else "prior", glp.denoiser.config
    seen = glp.provenance.get("training", {}).get("activations")
    return Source(
        name, label, kind, features, shape.n_layers, shape.d_mlp, tuple(times), prior, heldout_loss(glp), seen
    )


def unit_means(glp: GLP, x: Tensor, noises: Tensor, t: float, layer: int | None) -> Float[Tensor, "n f"]:
    """Meta-neurons of `x` [N, d] at `t`, the mean over `noises` [k, 1 or N, d], numbered block by block."""
    total = sum(glp.features(x, t=t, noise=noise.expand_as(x), layer=layer).float() for noise in noises)
    assert isinstance(total, Tensor)  # there is at least one noise
    return total.flatten(1) / len(noises)
