"""A grid of training runs, what each of them reaches, and the scaling law through them (``latentprior sweep``)."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprior.config import SweepConfig, TrainConfig, to_dict
from latentprior.data import text, tokens
from latentprior.data.store.reader import ActivationStore
from latentprior.data.text_files import text_settings
from latentprior.evaluation.evaluate import sampled_halves
from latentprior.evaluation.lm_loss import delta, lm_losses
from latentprior.lm.hooks import at_layer, same_places
from latentprior.lm.loading import load_llm
from latentprior.prior.cost import paper_flops_per_activation, parameters, training_flops
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.prior.repair import hookpoints_on
from latentprior.scaling.law import PowerLaw, correlation, envelope, fit_power_law
from latentprior.stats.frechet import GaussianMoments, frechet_distance
from latentprior.training.fit import fit
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, Report, unseen
from latentprior.utils.provenance import stamp

T_START = 0.5  # of the repair whose delta LM loss is measured (paper, evaluation 2)
COMPUTES = {"executed": "flops", "6ND": "flops_6nd"}
MEASURES = ("frechet", "frechet_raw", "delta_lm")
BEYOND = 4.0  # the curve ends at this many times the dearest run's compute
CURVE = 60


def sweep(config: SweepConfig, *, phase: Phase = unseen) -> dict[str, Any]:
    """Train and measure every run of the grid, cheap ones first, and fit the law; what is there already is reused.

    Writes ``sweep.json`` into ``config.output``: a row for each run (parameters, activations, training FLOPs as
    executed and as 6 N D, held-out loss, Fréchet distance standardised and raw, delta LM loss), which runs are
    compute-optimal, the law through these and through all runs with either count of FLOPs, and the correlations of
    the loss with the other measures. Of every run the final prior is kept, without training states.
    """
    with locked(config.output):
        began = time.perf_counter()
        grid = _Grid(config)
        grid.prepare()
        trained, measured = phase("train, GFLOP"), phase("measure")
        total = sum(run.flops for run in grid.runs)
        before, rows = 0.0, []
        for run in grid.runs:
            glp = fit(run.config, report=_part(trained, run, before, total))
            rows.append(run.row() | grid.measure(run, glp))
            before += run.flops
            measured(len(rows), len(grid.runs), {"run": run.folder.name, "loss": rows[-1]["heldout_loss"]})
        result = {"kind": "sweep", "hookpoint": grid.hookpoint.to_dict(), "bound": grid.bound}
        result |= findings(rows, config.seed)
        result |= stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
        replace_json(grid.folder / "sweep.json", result)
        return result


def findings(rows: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Of the rows of all runs: "runs" (marked where compute-optimal), "laws" and "correlations".

    A law or correlation that the runs do not support has the reason in "failed".
    """
    loss = np.array([row["heldout_loss"] for row in rows])
    computes = {kind: np.array([row[key] for row in rows]) for kind, key in COMPUTES.items()}
    best = {kind: envelope(compute, loss) for kind, compute in computes.items()}
    laws = []
    for runs in ("envelope", "all"):
        for kind, compute in computes.items():
            chosen = best[kind] if runs == "envelope" else np.arange(len(rows))
            law = _or_failure(lambda c=compute, i=chosen: _law(fit_power_law(c[i], loss[i], seed=seed), c))
            laws.append({"runs": runs, "compute": kind, **law})
    correlations = {
        name: _or_failure(lambda key=name: asdict(correlation(loss, [row[key] for row in rows], seed=seed)))
        for name in MEASURES
        if name in rows[0]
    }
    optimal = set(best["executed"].tolist())
    marked = [row | {"optimal": i in optimal} for i, row in enumerate(rows)]
    return {"runs": marked, "laws": laws, "correlations": correlations}


@dataclass(frozen=True)
class _Run:
    """One run of the grid and what it costs."""

    config: TrainConfig
    parameters: int
    d_mlp: int
    flops: float
    flops_6nd: float

    @classmethod
    def of(cls, config: TrainConfig, store: ActivationStore) -> _Run:
        layers, recipe = len(store.layers), config.resolved_recipe()
        shape = config.resolved_prior().denoiser(
            store.width, store.manifest["source"].get("blocks") if layers > 1 else None
        )
        cost, count = training_flops(shape, recipe, recipe.batch_size, layers=layers), config.run.activations
        flops = cost.activation * count + cost.update * math.ceil(count / recipe.batch_size)
        paper = paper_flops_per_activation(shape) * recipe.noise_samples
        return cls(config, parameters(shape), shape.d_mlp, flops, paper * count)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output)

    def row(self) -> dict[str, Any]:
        """What is known of the run once it is trained."""
        trained = json.loads((self.folder / "train.json").read_text(encoding="utf-8"))
        return {
            "name": self.folder.name,
            "d_model": self.config.prior.d_model,
            "d_mlp": self.d_mlp,
            "blocks": self.config.prior.blocks,
            "seed": self.config.run.seed,
            "parameters": self.parameters,
            "activations": trained["summary"]["activations"],
            "distinct": trained["summary"]["distinct"],
            "flops": self.flops,
            "flops_6nd": self.flops_6nd,
            "heldout_loss": trained["summary"]["heldout_loss"],
            "seconds": trained["wall_seconds"],
        }


class _Grid:
    """All runs, and what they are measured with."""

    def __init__(self, config: SweepConfig) -> None:
        self.config, self.folder = config, Path(config.output)
        self.store, self.heldout = ActivationStore(config.store), ActivationStore(config.heldout)
        if not same_places(self.heldout.hookpoints, self.store.hookpoints):
            raise InputError(f"{config.heldout} was recorded at other hookpoints than {config.store}")
        self.hookpoint = at_layer(self.store.hookpoints, config.layer, config.store)
        self.layer = self.hookpoint.layer if len(self.store.layers) > 1 else None
        self.device = resolve_device(config.device)
        self.normalizer = Normalizer.from_moments(self.store.moments()).to(self.device)
        self.runs = sorted((_Run.of(run, self.store) for run in config.runs()), key=lambda run: run.flops)

    def prepare(self) -> None:
        """Check rows, model and folder before anything is trained."""
        stores = {"store": self.store, "heldout": self.heldout}
        identity = {name: store.manifest["statistics"]["sha256"] for name, store in stores.items()}
        path = self.folder / "activations.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != identity:
            raise InputError(f"{self.folder} holds a sweep of other activations: choose another --output")
        halves = sampled_halves(self.heldout, self.layer, self.config.samples, self.config.seed)
        real, other = (self.heldout.rows(half).float().to(self.device) for half in halves)
        self.real = {name: GaussianMoments.of(x) for name, x in self._scaled(real).items()}
        self.bound = self._distances(other)
        lm = self._lm_settings()
        if lm is not None and any(_read_result(run.folder / "delta_lm.json", lm) is None for run in self.runs):
            _ = self.llm  # loads it, and finds whether the store is of it
        replace_json(path, identity, indent=None)

    @cached_property
    def llm(self) -> tuple[Any, list[tokens.TokenBatch]]:
        """The language model, checked, and the documents of the delta LM loss."""
        config = self.config
        model, tokenizer = load_llm(config.llm, self.device)
        hookpoints_on([self.hookpoint], model, None, check_model=True)
        documents = text.documents(replace(config.text, limit=config.lm_documents))
        batches = tokens.tokenize(documents, tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens)
        return model, list(batches)

    def measure(self, run: _Run, glp: GLP) -> dict[str, Any]:
        """Fréchet distances and delta LM loss of a trained prior, from its folder where they are known."""
        glp.cast(fast_dtype(glp.device) if self.config.precision == "auto" else getattr(torch, self.config.precision))
        settings = {name: getattr(self.config, name) for name in ("samples", "steps", "layer", "seed", "precision")}
        result = _result(run.folder / "frechet.json", settings, lambda: self._frechet(glp))
        if (lm := self._lm_settings()) is not None:
            result |= _result(run.folder / "delta_lm.json", lm, lambda: self._delta_lm(glp))
        for leftover in ("steps", "checkpoints"):  # training states are three times the size of the prior
            shutil.rmtree(run.folder / leftover, ignore_errors=True)
        return result

    def _frechet(self, glp: GLP) -> dict[str, float]:
        config = self.config
        x = glp.sample(config.samples, steps=config.steps, layer=self.layer, generator=config.seed)
        return self._distances(x.float())

    def _delta_lm(self, glp: GLP) -> dict[str, Any]:
        model, batches = self.llm

        def repaired(x: Tensor, eps: Tensor) -> Tensor:
            return glp.project(x, t_start=T_START, steps=self.config.steps, noise=eps, layer=self.layer)

        at, seed = self.hookpoint, self.config.seed
        losses = lm_losses(model, batches, at.layer, {"prior": repaired}, side=at.side, seed=seed)
        found = delta(losses["prior"], losses["clean"], seed=seed)
        return {"delta_lm": found.delta, "delta_lm_interval": list(found.interval)}

    def _lm_settings(self) -> dict[str, Any] | None:
        """What decides a delta LM loss; None if there is none to measure."""
        if not self.config.delta_lm:
            return None
        names = ("steps", "lm_documents", "max_length", "batch_tokens", "layer", "seed", "precision")
        plain = {name: getattr(self.config, name) for name in names}
        return plain | {"llm": to_dict(self.config.llm), "text": text_settings(self.config.text)}

    def _distances(self, x: Tensor) -> dict[str, float]:
        return {name: frechet_distance(self.real[name], y) for name, y in self._scaled(x).items()}

    def _scaled(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"frechet": self.normalizer.normalize(x, self.layer), "frechet_raw": x}


def _part(report: Report, run: _Run, before: float, total: float) -> Report:
    """The report of one run as a part of all training."""

    def part(done: int, of: int | None, figures: Mapping[str, Any]) -> None:
        flops = before + run.flops * done / (of or run.config.run.activations)
        report(math.ceil(flops / 1e9), math.ceil(total / 1e9), {"run": run.folder.name, **figures})

    return part


def _law(law: PowerLaw, compute: np.ndarray) -> dict[str, Any]:
    """A law and its curve over all computes and somewhat beyond, as plain values."""
    values = asdict(law)
    del values["draws"]
    at = np.geomspace(compute.min(), BEYOND * compute.max(), CURVE)
    loss, low, high = (v.tolist() for v in law.predict(at))
    return values | {"curve": {"compute": at.tolist(), "loss": loss, "low": low, "high": high}}


def _or_failure(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except InputError as error:
        return {"failed": str(error)}


def _read_result(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if it was made with these settings."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    return saved["result"] if saved["settings"] == settings else None


def _result(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The kept result, else a new one, kept."""
    if (result := _read_result(path, settings)) is None:
        result = make()
        replace_json(path, {"settings": settings, "result": result}, indent=None)
    return result
