"""Generative models of a language model's internal activations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentprior import hooks
    from latentprior.activations import ActivationBatch, record_activations
    from latentprior.errors import InputError
    from latentprior.evaluate.frechet import frechet_distance
    from latentprior.hooks import Hookpoint
    from latentprior.prior import GLP
    from latentprior.store import ActivationStore

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
    "GLP": "prior",
    "ActivationBatch": "activations",
    "ActivationStore": "store",
    "Hookpoint": "hooks",
    "InputError": "errors",
    "frechet_distance": "evaluate.frechet",
    "record_activations": "activations",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: torch takes seconds, which `latentprior --help` need not."""
    if name == "hooks":
        return import_module("latentprior.hooks")
    if name in _HOMES:
        return getattr(import_module(f"latentprior.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentprior' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
