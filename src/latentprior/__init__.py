"""Generative models of a language model's internal activations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentprior import hooks
    from latentprior.data.activations import ActivationBatch, record_activations
    from latentprior.data.store.reader import ActivationStore
    from latentprior.lm.hooks import Hookpoint
    from latentprior.prior.glp import GLP
    from latentprior.stats.frechet import frechet_distance
    from latentprior.utils.errors import InputError

__all__ = [
    "GLP",
    "ActivationBatch",
    "ActivationStore",
    "Hookpoint",
    "InputError",
    "frechet_distance",
    "hooks",
    "record_activations",
]

_HOMES = {
    "GLP": "prior.glp",
    "ActivationBatch": "data.activations",
    "ActivationStore": "data.store.reader",
    "Hookpoint": "lm.hooks",
    "InputError": "utils.errors",
    "frechet_distance": "stats.frechet",
    "record_activations": "data.activations",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: torch takes seconds, which `latentprior --help` need not."""
    if name == "hooks":
        return import_module("latentprior.lm.hooks")
    if name in _HOMES:
        return getattr(import_module(f"latentprior.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentprior' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
