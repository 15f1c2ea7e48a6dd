"""Sparse autoencoders (SAEs): an activation as a few of many learned directions, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json, replaced
from latentprior.utils.reprs import ShortRepr

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"
CHUNK = 1024  # rows encoded at a time: their pre-activations are [rows, latents]


@dataclass(frozen=True, eq=False, repr=False)
class SAE(ShortRepr):
    """A sparse autoencoder of raw activations: ``x ≈ values @ decoder[indices] + offset``.

    A latent is active where it is among the row's `k` largest (TopK), or over its own threshold (ReLU: 0; JumpReLU).
    """

    encoder: Float[Tensor, "latents d"]
    bias: Float[Tensor, " latents"]
    """Of the encoder, which takes the activation as it is: nothing is subtracted before."""
    decoder: Float[Tensor, "latents d"]
    """Unit rows: the direction of each latent."""
    offset: Float[Tensor, " d"]
    scale: Float[Tensor, " latents"]
    """Of each latent's value, in units of its decoder row; applied after the choice of active latents."""
    threshold: Float[Tensor, " latents"] | None
    """None for TopK."""
    k: int | None
    """None where thresholds decide."""
    hookpoint: Hookpoint
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-ready: where it comes from, how it was trained."""

    def __post_init__(self) -> None:
        latents, width = self.encoder.shape
        if (self.k is None) == (self.threshold is None):
            raise InputError("an SAE needs either k (TopK) or thresholds")
        if self.k is not None and not 0 < self.k <= latents:
            raise InputError(f"k must lie between 1 and the number of latents, {latents}, got {self.k}")
        if width != self.hookpoint.width:
            raise InputError(f"this SAE has width {width}, but its hookpoint {self.hookpoint.width}")

    @classmethod
    def of(
        cls,
        encoder: Tensor,
        bias: Tensor,
        decoder: Tensor,
        offset: Tensor,
        hookpoint: Hookpoint,
        *,
        k: int | None = None,
        threshold: Tensor | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> SAE:
        """An SAE from any decoder [latents, d], whose norms become `scale`."""
        encoder, bias, decoder, offset = (t.detach().float().contiguous() for t in (encoder, bias, decoder, offset))
        threshold = None if threshold is None else threshold.detach().float()
        parts = [encoder, bias, decoder, offset] + ([] if threshold is None else [threshold])
        per_latent, width = encoder.shape[:1], encoder.shape[-1:]
        shapes = [encoder.shape, per_latent, encoder.shape, width, per_latent]
        if encoder.ndim != 2 or [t.shape for t in parts] != shapes[: len(parts)]:
            raise InputError(f"the SAE's tensors do not fit together: {[list(t.shape) for t in parts]}")
        if not all(t.isfinite().all() for t in parts):
            raise InputError("the SAE holds NaN or infinite numbers")
        norm = torch.linalg.vector_norm(decoder, dim=1)
        unit = decoder / norm.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return cls(encoder, bias, unit, offset, norm, threshold, k, hookpoint, provenance or {})

    @property
    def latents(self) -> int:
        return len(self.encoder)

    @property
    def width(self) -> int:
        return self.encoder.shape[1]

    def encode(self, x: Float[Tensor, "n d"]) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
        """Active latents of raw activations, strongest first: their indices, and values in units of the activation.

        On the SAE's device. m is `k`, or the most that any row has active; unused entries have value 0.
        """
        if x.shape[-1] != self.width:
            raise InputError(f"this SAE takes activations of width {self.width}, got {x.shape[-1]}")
        parts = [self._encode(chunk.to(self.encoder.device).float()) for chunk in x.split(CHUNK)]
        most = max((values.shape[1] for _, values in parts), default=0)
        padded = [[F.pad(t, (0, most - t.shape[1])) for t in part] for part in parts]
        indices, values = map(torch.cat, zip(*padded, strict=True))
        return indices, values

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = F.linear(x, self.encoder, self.bias)
        if self.threshold is None:
            values, indices = values.relu().topk(self.k or 0, dim=1)
        else:
            values = torch.where(values > self.threshold, values, 0)
            most = int((values != 0).sum(dim=1).max()) if len(values) else 0
            values, indices = values.topk(most, dim=1)
        return indices, values * self.scale[indices]

    def decode(self, indices: Int[Tensor, "n m"], values: Float[Tensor, "n m"]) -> Float[Tensor, "n d"]:
        """Raw activations, float32."""
        if not indices.shape[1]:
            return self.offset.repeat(len(indices), 1)
        return F.embedding_bag(indices, self.decoder, per_sample_weights=values, mode="sum") + self.offset

    def reconstruct(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """``decode(*encode(x))``, float32 and on the device of `x`."""
        parts = [self.decode(*self.encode(chunk)) for chunk in x.split(CHUNK)]
        return torch.cat(parts).to(x.device) if parts else x.float()

    def to(self, device: torch.device | str) -> SAE:
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}

    def save(self, folder: str | Path) -> Path:
        """Write ``sae.safetensors`` and ``sae.json``; the second one last, so that it is there only if both are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / WEIGHTS) as partial:
            save_file({name: t.cpu().contiguous() for name, t in self._tensors().items()}, partial)
        described = {"k": self.k, "hookpoint": self.hookpoint.to_dict(), "provenance": self.provenance}
        replace_json(folder / CONFIG, described)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SAE:
        """What `save` wrote."""
        folder = Path(folder)
        described, tensors = read_json(folder / CONFIG), read_tensors(folder / WEIGHTS)
        try:
            encoder, bias, offset = tensors["encoder"], tensors["bias"], tensors["offset"]
            decoder, scale = tensors["decoder"], tensors["scale"]
            hookpoint, threshold = Hookpoint.from_dict(described["hookpoint"]), tensors.get("threshold")
            options = {"k": described["k"], "threshold": threshold, "provenance": described["provenance"]}
            sae = cls.of(encoder, bias, decoder * scale[:, None], offset, hookpoint, **options)
            return replace(sae, decoder=decoder, scale=scale)  # not rounded a second time
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{folder} holds no whole SAE: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; InputError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from error


def explained_variance(sae: SAE, x: Float[Tensor, "n d"]) -> float:
    """Share of the variance of `x` about its mean that the reconstructions explain."""
    error = (x - sae.reconstruct(x)).double().square().sum()
    return 1.0 - float(error / (x - x.double().mean(dim=0)).square().sum())


def active_share(sae: SAE, x: Float[Tensor, "n d"]) -> float:
    """Share of the latents that are active in at least one row of `x`."""
    indices, values = sae.encode(x)
    return indices[values > 0].unique().numel() / sae.latents


def described(sae: SAE, x: Float[Tensor, "n d"]) -> dict[str, Any]:
    """What an SAE is and how it does on activations that it was not trained on, JSON-ready."""
    return {
        "latents": sae.latents,
        "k": sae.k,
        "hookpoint": sae.hookpoint.to_dict(),
        "provenance": sae.provenance,
        "explained_variance": explained_variance(sae, x),
        "active_share": active_share(sae, x),
    }
