"""The main job end to end on a real language model, in parts that a second run reuses."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from latentprior.config import (
    DemoConfig,
    EvaluateConfig,
    RecordConfig,
    SteerConfig,
    TextConfig,
    TrainConfig,
    settings_of,
    to_dict,
)
from latentprior.data.store.record import record_from
from latentprior.evaluation.evaluate import evaluate
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.prior.installed import how_to_install, installed_names, published_name
from latentprior.prior.loading import installed_at
from latentprior.report import write_report
from latentprior.steer.experiment import experiment
from latentprior.training.fit import fit
from latentprior.training.tracking import read_log
from latentprior.utils.files import replace_json
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, unseen
from latentprior.utils.provenance import stamp
from latentprior.utils.settings import check_settings

MAX_LENGTH = 128
FORMER = {"preset": "quick"}  # of folders that do not say
# The denoiser's residual stream is as wide as the activations, whose principal directions it starts with. At equal
# FLOPs one block of many hidden units ends at a lower held-out loss than several narrower ones.
TRAINING: dict[str, Any] = {"preset": "fast", "blocks": 1, "hidden": 4}  # hidden units are a multiple of the width

TINY: dict[str, Any] = {
    "rows": 6000,
    "activations": 12_288,
    "heldout_rows": 2600,
    "samples": 1200,
    "lm_documents": 6,
    "prompts": 4,
    "labelled": 300,
    "strengths": [0.6],
    "new_tokens": 6,
}


def demo(config: DemoConfig, *, phase: Phase = unseen) -> dict[str, Any]:
    """Record, train, evaluate, steer and write ``report.html`` and ``demo.json`` into ``config.output``."""
    if config.tiny:
        config = dataclasses.replace(config, **TINY)
    with locked(config.output) as folder:
        began = time.perf_counter()
        parts = _Parts(config, folder, phase)
        result: dict[str, Any] = {"kind": "demo"}
        for name in ("record", "train", "evaluate", "steer"):
            result[name] = parts.once(name, getattr(parts, name))
        result["shipped"] = parts.shipped
        result |= stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
        replace_json(folder / "demo.json", result)
        write_report(result, folder / "report.html")
        return result


class _Parts:
    """The parts of a demo; each gives what the page shows of it."""

    def __init__(self, config: DemoConfig, folder: Path, phase: Phase) -> None:
        self.config, self.folder, self.phase = config, folder, phase
        self.shared = {"device": config.device, "seed": config.seed}
        self.steering = steering_of(config)  # refused before anything runs

    @cached_property
    def llm(self) -> tuple[Any, Any]:
        return load_llm(self.config.llm, self.config.device)

    @cached_property
    def hookpoint(self) -> Hookpoint:
        return Hookpoint.from_dict(self.once("record", self.record)["hookpoint"])

    @cached_property
    def shipped(self) -> dict[str, Any]:
        """The installed "prior" of the recorded activations and its "package", or how to "install" this project's."""
        if found := installed_at(self.hookpoint):
            name, glp = found
            return {"prior": name, "package": glp.provenance.get("package"), "install": None}
        name = published_name(self.hookpoint.model, self.hookpoint.layer)
        install = how_to_install(name) if name and name not in installed_names() else None  # that one is of others
        return {"prior": None, "package": None, "install": install}

    @property
    def beside(self) -> list[str]:
        """The priors to measure beside the demo's own."""
        return [self.shipped["prior"]] if self.shipped["prior"] else []

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part, from its file if there is one, made with the shipped prior that is there now."""
        path, settings, shipped = self.folder / f"{name}.json", settings_of(self.config), None
        if name != "record":
            settings |= TRAINING
        if name in ("evaluate", "steer"):
            shipped = {key: self.shipped[key] for key in ("prior", "package")}
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            check_settings(self.folder, "a demo", (FORMER if name != "record" else {}) | saved["settings"], settings)
            if saved.get("shipped") == shipped:
                return saved["result"]
        began = time.perf_counter()
        result = make() | {"seconds": round(time.perf_counter() - began, 1)}
        replace_json(path, {"settings": settings, "shipped": shipped, "result": result}, indent=None)
        return result

    def record(self) -> dict[str, Any]:
        self._store("heldout", TextConfig(part="heldout"), self.config.heldout_rows, "record held-out activations")
        store = self._store("activations", TextConfig(part="train"), self.config.rows, "record activations")
        return {
            "rows": len(store),
            "documents": store.metadata(torch.arange(len(store)))[1].unique().numel(),
            "hookpoint": store.hookpoints[0].to_dict(),
            "left_out": store.manifest["left_out"],
        }

    def _store(self, name: str, text: TextConfig, rows: int, title: str) -> Any:
        config = RecordConfig(
            output=self.path(name),
            layers=[] if self.config.layer is None else [self.config.layer],
            max_length=MAX_LENGTH,
            batch_tokens=2048,
            max_activations=rows,
            resume=True,
            llm=self.config.llm,
            text=text,
            **self.shared,
        )
        return record_from(*self.llm, config, report=self.phase(title))

    def train(self) -> dict[str, Any]:
        width = self.hookpoint.width
        config = TrainConfig.of(
            store=self.path("activations"),
            heldout=self.path("heldout"),
            output=self.path("prior"),
            activations=self.config.activations,
            preset=TRAINING["preset"],
            blocks=TRAINING["blocks"],
            d_model=width,
            d_mlp=TRAINING["hidden"] * width,
            **self.shared,
        )
        fit(config, report=self.phase("train the prior"))
        result = json.loads((self.folder / "prior" / "train.json").read_text(encoding="utf-8"))
        log = read_log(self.folder / "prior" / "log.jsonl")
        return {"summary": result["summary"], "config": result["config"], "log": log}

    def evaluate(self) -> dict[str, Any]:
        config = EvaluateConfig(
            prior=self.path("prior"),
            heldout=self.path("heldout"),
            train=self.path("activations"),
            output=self.path("evaluation"),
            samples=self.config.samples,
            solvers=["euler", "ab2"],
            nfes=[4, 20],
            compare=self.beside,
            max_length=MAX_LENGTH,
            llm=self.config.llm,
            text=TextConfig(part="heldout", limit=self.config.lm_documents),
            **self.shared,
        )
        return evaluate(config, phase=self.phase)

    def steer(self) -> dict[str, Any]:
        config = dataclasses.replace(self.steering, priors=[*self.steering.priors, *self.beside])
        return experiment(config, lambda: self.llm, phase=self.phase)


def steering_of(config: DemoConfig) -> SteerConfig:
    return SteerConfig(
        output=str(Path(config.output, "steering")),
        priors=[str(Path(config.output, "prior"))],
        directions=["difference_of_means"],
        methods=["plain", "repaired", "paired"],
        strengths=config.strengths,
        both_signs=False,
        prompts=config.prompts,
        new_tokens=config.new_tokens,
        labelled=config.labelled,
        device=config.device,
        seed=config.seed,
        llm=config.llm,
    )
