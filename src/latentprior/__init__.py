"""Generative models of a language model's internal activations.

    import latentprior as lp

    model, tokenizer = lp.load_llm("smollm2-135m")
    store = lp.record(model, tokenizer, texts, layers=[15], output="runs/acts")
    glp = lp.train(store, output="runs/prior", preset="fast")
    happy = lp.Direction.from_texts(model, tokenizer, positive, negative, layer=15)
    with glp.steer(model, happy, strength=0.8):
        model.generate(**tokenizer("Hi", return_tensors="pt").to(model.device))

Each name below is imported from its home on first use. The commands are in `cli`, their options in `config`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentprior import hooks
    from latentprior.data.activations import ActivationBatch, record_activations
    from latentprior.data.api import record
    from latentprior.data.store.reader import ActivationStore
    from latentprior.evaluation.api import evaluate
    from latentprior.lm.hooks import Hookpoint
    from latentprior.lm.loading import load_llm
    from latentprior.prior.glp import GLP
    from latentprior.stats.frechet import frechet_distance
    from latentprior.steer.direction import Direction
    from latentprior.steer.intervention import Edit, steering
    from latentprior.steer.repairs import PriorRepair
    from latentprior.training.api import train
    from latentprior.utils.errors import InputError
    from latentprior.utils.results import Result

    __version__: str

__all__ = [
    "GLP",
    "ActivationBatch",
    "ActivationStore",
    "Direction",
    "Edit",
    "Hookpoint",
    "InputError",
    "PriorRepair",
    "Result",
    "__version__",
    "evaluate",
    "frechet_distance",
    "hooks",
    "load_llm",
    "record",
    "record_activations",
    "steering",
    "train",
]

_HOMES = {
    "GLP": "prior.glp",
    "ActivationBatch": "data.activations",
    "ActivationStore": "data.store.reader",
    "Direction": "steer.direction",
    "Edit": "steer.intervention",
    "Hookpoint": "lm.hooks",
    "InputError": "utils.errors",
    "PriorRepair": "steer.repairs",
    "Result": "utils.results",
    "evaluate": "evaluation.api",
    "frechet_distance": "stats.frechet",
    "load_llm": "lm.loading",
    "record": "data.api",
    "record_activations": "data.activations",
    "steering": "steer.intervention",
    "train": "training.api",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: torch takes seconds, which `latentprior --help` need not."""
    if name == "hooks":
        return import_module("latentprior.lm.hooks")
    if name == "__version__":
        return import_module("importlib.metadata").version("latentprior")
    if name in _HOMES:
        return getattr(import_module(f"latentprior.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'latentprior' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
