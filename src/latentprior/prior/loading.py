"""Priors of one hookpoint: several, to be compared with each other, and the one that is installed for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from latentprior.lm.hooks import Hookpoint, at_layer, same_places
from latentprior.prior.glp import GLP
from latentprior.prior.installed import PUBLISHED, installed_names
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError


def priors_of(
    names: Sequence[str],
    *,
    checkpoint: str = "final",
    layer: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> tuple[dict[str, GLP], Hookpoint]:
    """The priors by their names, folders or repositories, and their one hookpoint: of `layer` if they have several."""
    place = resolve_device(device)
    dtype = fast_dtype(place) if precision == "auto" else getattr(torch, precision)
    priors = {name: GLP.from_pretrained(name, checkpoint, device=place, dtype=dtype) for name in names}
    places = {name: hookpoint_of(glp, name, layer) for name, glp in priors.items()}
    first = places[names[0]]
    for name, mine in places.items():
        if not mine.same_place(first):
            raise InputError(f"{name} is a prior of {mine}, {names[0]} of {first}")
    return priors, first


def installed_at(hookpoint: Hookpoint) -> tuple[str, GLP] | None:
    """The installed prior of this hookpoint alone and its name, one of this project's before others; None without any.

    What counts is where a prior was trained, its model's weights included, and not what it is called.
    """
    names = sorted(installed_names(), key=lambda name: (name not in PUBLISHED, name))
    priors = ((name, GLP.from_pretrained(name)) for name in names)
    return next(((name, glp) for name, glp in priors if same_places(glp.hookpoints, [hookpoint])), None)


def hookpoint_of(glp: GLP, name: str, layer: int | None) -> Hookpoint:
    """Where a prior's activations come from; of a multi-layer prior, those of `layer`."""
    if not glp.hookpoints:
        raise InputError(f"{name} does not say what it was trained on: give it `hookpoints` first")
    return at_layer(glp.hookpoints, layer, name)


def heldout_loss(glp: GLP) -> float | None:
    """The held-out loss at the end of its training, if known."""
    return glp.provenance.get("training", {}).get("heldout_loss")


def packages_of(priors: Iterable[GLP]) -> dict[str, str]:
    """The packages that priors are from, and their versions."""
    packages = [glp.provenance["package"] for glp in priors if "package" in glp.provenance]
    return {package["name"]: package["version"] for package in packages}
