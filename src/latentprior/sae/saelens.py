"""Reading SAEs of SAELens (``cfg.json`` and ``sae_weights.safetensors``) without installing it and its dependencies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.config import Side
from latentprior.lm.hooks import Hookpoint
from latentprior.sae.sae import CONFIG, SAE, read_json, read_tensors
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.hub import snapshot

ARCHITECTURES = ("standard", "topk", "jumprelu")
CFG, SAE_WEIGHTS = "cfg.json", "sae_weights.safetensors"


def read_sae(folder: str | Path, *, model: str | None = None) -> SAE:
    """An SAE of this project or of SAELens; see `load_saelens`."""
    return SAE.load(folder) if Path(folder, CONFIG).is_file() else load_saelens(folder, model=model)


def sae_at(folder: str, hookpoint: Hookpoint, *, model: str | None = None) -> SAE:
    """The SAE in `folder`, checked to be of a prior's hookpoint; see `read_sae`."""
    sae = read_sae(folder, model=model)
    if not sae.hookpoint.same_place(hookpoint, check_model=False):  # SAELens has names of its own for models
        raise InputError(f"the SAE in {folder} belongs to {sae.hookpoint}, the prior to {hookpoint}")
    return sae


def load_saelens(
    path_or_repo: str | Path, name: str = "", *, model: str | None = None, revision: str | None = None
) -> SAE:
    """An SAE that SAELens saved, of the architectures standard (ReLU), topk and jumprelu, on a residual stream.

    Args:
        path_or_repo: a folder, or a repository of the Hugging Face Hub. The short names of SAELens's own list of
            releases are not known here: give the repository that they stand for.
        name: folder of the SAE below it, such as "blocks.8.hook_resid_pre".
        model: Hugging Face id of the model, where SAELens has a name of its own for it ("gpt2-small" is "gpt2").

    Raises:
        InputError: no such SAE, another architecture, an SAE that is not of a block's input or output, inputs that are
            normalised row by row, or damaged files.
    """
    root, files = Path(path_or_repo), f"{name}/*" if name else "*"
    if not root.is_dir():
        root = snapshot("SAE", str(path_or_repo), revision=revision, allow_patterns=files)
    folder = root / name
    cfg = _modern(read_json(folder / CFG))
    weights = read_tensors(folder / SAE_WEIGHTS)
    try:
        return _sae(cfg, weights, model, str(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds no whole SAE of SAELens: {error}") from error


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration as SAELens 6 writes it; before, what is in `metadata` now lay beside the rest."""
    flat = cfg | cfg.get("metadata", {})
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    architecture = flat.get("architecture", "standard")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif architecture == "standard" and activation != "relu":
        raise unknown("activation of an SAE", activation, ("relu", "topk"))
    return {"k": flat.get("activation_fn_kwargs", {}).get("k"), **flat, "architecture": architecture}


def _sae(cfg: dict[str, Any], weights: dict[str, Tensor], model: str | None, source: str) -> SAE:
    architecture = cfg["architecture"]
    if architecture not in ARCHITECTURES:
        raise unknown("architecture of an SAE", architecture, ARCHITECTURES)
    # Either way of writing "no": the scale of "expected_average_only_in" is part of the weights, as SAELens takes it.
    if (normalisation := cfg.get("normalize_activations") or "none") not in ("none", "expected_average_only_in", True):
        raise InputError(f"{source}: an SAE whose input is normalised by {normalisation!r} cannot be read")
    if "scaling_factor" in weights and not (weights["scaling_factor"] == 1).all():
        raise InputError(f"{source}: an SAE with a fine-tuned scaling factor cannot be read")
    encoder, decoder, offset = weights["W_enc"].T.float(), weights["W_dec"].float(), weights["b_dec"].float()
    bias = weights["b_enc"].float()
    if cfg.get("apply_b_dec_to_input", True):
        bias = bias - encoder @ offset
    if cfg.get("rescale_acts_by_decoder_norm"):  # the choice of the k largest goes by what they add to the output
        norm = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm[:, None]
    k, threshold = None, None
    if architecture == "topk":
        k = int(cfg["k"])
    else:
        threshold = weights["threshold"] if architecture == "jumprelu" else torch.zeros_like(bias)
    hookpoint = _hookpoint(cfg, len(offset), model)
    provenance = {
        "format": "SAELens",
        "source": source,
        **{name: cfg[name] for name in ("architecture", "model_name", "hook_name", "neuronpedia_id") if name in cfg},
        # A model whose weights TransformerLens centred before it recorded has other activations than the original.
        "model_from_pretrained_kwargs": cfg.get("model_from_pretrained_kwargs") or {},
    }
    return SAE.of(encoder, bias, decoder, offset, hookpoint, k=k, threshold=threshold, provenance=provenance)


def _hookpoint(cfg: dict[str, Any], width: int, model: str | None) -> Hookpoint:
    """From "blocks.8.hook_resid_pre" (TransformerLens) or a block's own name ("model.layers.8": its output)."""
    name = cfg.get("hook_name") or cfg.get("hook_point") or ""
    side: Side = "output"
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name):
        side = "input" if found[2] == "pre" else "output"
    elif not (found := re.fullmatch(r"(?:[\w.]+\.)?(?:layers|h|blocks)\.(\d+)", name)):
        raise InputError(f"this SAE is of {name or 'an unknown place'!r}, not of the input or output of a block")
    return Hookpoint(model if model is not None else str(cfg.get("model_name") or ""), int(found[1]), width, side=side)
