"""The main job end to end on a real language model, in parts that a second run reuses."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from latentprior.lm.loading import load_llm
from latentprior.report import write_report
from latentprior.steer.experiment import experiment
from latentprior.training.fit import fit
from latentprior.training.tracking import read_log
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text
from latentprior.utils.locks import locked
from latentprior.utils.progress import Phase, unseen
from latentprior.utils.provenance import stamp

MAX_LENGTH = 128
LABELLED = 2000  # SST-2 sentences for direction and classifier

TINY: dict[str, Any] = {
    "rows": 6000,
    "activations": 12_288,
    "heldout_rows": 2600,
    "samples": 1200,
    "lm_documents": 6,
    "prompts": 4,
    "strengths": [0.6],
    "new_tokens": 6,
}


def demo(config: DemoConfig, *, phase: Phase = unseen) -> dict[str, Any]:
    """Record, train, evaluate, steer and write ``report.html`` and ``demo.json`` into ``config.output``.

    Raises:
        InputError: the asset packages are missing, the folder holds a demo of other settings or another process writes
            it, or strengths that are not positive.
    """
    if config.tiny:
        config = dataclasses.replace(config, **TINY)
    with locked(config.output) as folder:
        return _demo(config, folder, phase)


def _demo(config: DemoConfig, folder: Path, phase: Phase) -> dict[str, Any]:
    began = time.perf_counter()
    run = _Demo(config, folder, steering_of(config))
    result = {
        "kind": "demo",
        "record": run.part("record", lambda: run.record(phase)),
        "train": run.part("train", lambda: run.train(phase)),
        "evaluate": run.part("evaluate", lambda: run.evaluate(phase)),
        "steer": run.part("steer", lambda: run.steer(phase)),
    }
    result |= stamp(to_dict(config), seed=config.seed, wall_seconds=time.perf_counter() - began)
    replace_text(run.folder / "demo.json", json.dumps(result, indent=1) + "\n")
    write_report(result, run.folder / "report.html")
    return result


@dataclass
class _Demo:
    config: DemoConfig
    folder: Path
    steering: SteerConfig

    @cached_property
    def llm(self) -> tuple[Any, Any]:
        return load_llm(self.config.llm, self.config.device)

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a part, from its file if it was made with these settings."""
        path = self.folder / f"{name}.json"
        settings = settings_of(self.config)
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                raise InputError(f"{self.folder} holds a demo of other settings: choose another --output")
            return saved["result"]
        began = time.perf_counter()
        result = make() | {"seconds": round(time.perf_counter() - began, 1)}
        replace_text(path, json.dumps({"settings": settings, "result": result}) + "\n")
        return result

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def record(self, phase: Phase) -> dict[str, Any]:
        for part, rows in (("heldout", self.config.heldout_rows), ("train", self.config.rows)):
            name = {"heldout": "held-out activations", "train": "activations"}[part]
            store = record_from(*self.llm, self._record_config(part, rows), report=phase(f"record {name}"))
        documents = store.metadata(torch.arange(len(store)))[1].unique().numel()
        hookpoint = store.hookpoints[0].to_dict()
        return {
            "rows": len(store),
            "documents": documents,
            "hookpoint": hookpoint,
            "left_out": store.manifest["left_out"],
        }

    def _record_config(self, part: Any, rows: int) -> RecordConfig:
        return RecordConfig(
            output=self.path("heldout" if part == "heldout" else "activations"),
            layers=[self.config.layer],
            max_length=MAX_LENGTH,
            batch_tokens=2048,
            max_activations=rows,
            seed=self.config.seed,
            resume=True,
            device=self.config.device,
            llm=self.config.llm,
            text=TextConfig(part=part),
        )

    def train(self, phase: Phase) -> dict[str, Any]:
        width = self.llm[0].config.hidden_size
        config = TrainConfig.of(
            store=self.path("activations"),
            heldout=self.path("heldout"),
            output=self.path("prior"),
            activations=self.config.activations,
            blocks=2,
            d_mlp=2 * width,
            device=self.config.device,
            seed=self.config.seed,
        )
        fit(config, report=phase("train the prior"))
        result = json.loads((self.folder / "prior" / "train.json").read_text(encoding="utf-8"))
        return {
            "summary": result["summary"],
            "config": result["config"],
            "log": read_log(self.folder / "prior" / "log.jsonl"),
        }

    def evaluate(self, phase: Phase) -> dict[str, Any]:
        config = EvaluateConfig(
            prior=self.path("prior"),
            heldout=self.path("heldout"),
            train=self.path("activations"),
            output=self.path("evaluation"),
            samples=self.config.samples,
            solvers=["euler", "ab2"],
            nfes=[4, 20],
            max_length=MAX_LENGTH,
            device=self.config.device,
            seed=self.config.seed,
            llm=self.config.llm,
            text=TextConfig(part="heldout", limit=self.config.lm_documents),
        )
        return evaluate(config, phase=phase)

    def steer(self, phase: Phase) -> dict[str, Any]:
        return experiment(self.steering, lambda: self.llm, phase=phase)


def steering_of(config: DemoConfig) -> SteerConfig:
    """The demo's steering experiment, small enough for it.

    Raises:
        InputError: strengths that are not positive, or one of them twice.
    """
    return SteerConfig(
        output=str(Path(config.output, "steering")),
        priors=[str(Path(config.output, "prior"))],
        directions=["difference_of_means"],
        methods=["plain", "repaired", "paired"],
        strengths=config.strengths,
        both_signs=False,
        prompts=config.prompts,
        new_tokens=config.new_tokens,
        labelled=LABELLED,
        device=config.device,
        seed=config.seed,
        llm=config.llm,
    )
