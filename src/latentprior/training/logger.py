"""What a run says of itself: log.jsonl and the tracking service, the progress report, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentprior.config import TrainConfig
from latentprior.training.loop import Figures, State
from latentprior.training.tracking import Log, read_log
from latentprior.utils.distributed import World
from latentprior.utils.progress import Report


class TrainingLogger:
    """Every process has one, which counts the `activations` of all; the first one's writes the log."""

    def __init__(
        self, config: TrainConfig, world: World, report: Report, peaks: dict[str, float], *, step: int, activations: int
    ) -> None:
        """Open the log, and take over what a run that is continued at `step` wrote until then.

        `peaks` are the activations a second that a device's peaks would give; the log has shares of them.
        """
        self.activations, self.heldout, self._shown = activations, {}, {}
        self._config, self._report, self._peaks, self._log = config.run, report, peaks, None
        if world.main:
            folder = Path(config.run.output)
            folder.mkdir(parents=True, exist_ok=True)
            path, shown = folder / "log.jsonl", config.without_groups()
            self._log = Log(path, track=config.run.track, config=shown, resume_step=step)
            for line in read_log(path):
                if "heldout_loss" in line:
                    self._found({key: line[key] for key in ("heldout_loss", "heldout_loss_by_t")})
        self._losses: list[Tensor] = []
        self.start({})

    def start(self, spent: Mapping[str, float]) -> None:
        """Time counts from here; `spent` are the source's seconds so far, on what comes before training."""
        self._began = self._logged_at = time.perf_counter()
        self._logged_rows, self._spent, self._aside = self.activations, dict(spent), 0.0

    def step(self, state: State, figures: Figures, *, last: bool) -> None:
        """Take note of a step; writes a line if one is due."""
        self.activations += figures.rows
        self._losses.append(figures.loss)
        if state.step % self._config.log_every and not last:
            return
        loss = float(torch.stack(self._losses).mean())  # waits for the GPU, once for many steps
        self._losses.clear()
        now = time.perf_counter()
        rate = (self.activations - self._logged_rows) / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_rows = now, self.activations
        self._shown["loss"] = loss
        norm = float(figures.gradient_norm)
        line = {"loss": loss, "gradient_norm": norm, "learning_rate": figures.learning_rate, "per_second": rate}
        self._write(state.step, line | {name: rate / peak for name, peak in self._peaks.items()})

    def evaluated(self, step: int, loss: float, by_t: list[float]) -> None:
        """Write the held-out loss after `step` steps."""
        self._found({"heldout_loss": loss, "heldout_loss_by_t": by_t})
        self._write(step, self.heldout)

    def _found(self, heldout: dict[str, Any]) -> None:
        self.heldout, self._shown["held-out"] = heldout, heldout["heldout_loss"]

    def _write(self, step: int, figures: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write({"step": step, "activations": self.activations} | figures)

    def report(self) -> None:
        """Show how far the run is."""
        total = self._config.activations
        self._report(min(self.activations, total), total, self._shown)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time in here is evaluating and saving, not training."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def seconds(self, spent: Mapping[str, float]) -> dict[str, float]:
        """Where the time went since `start`, by part; `spent` are the source's seconds so far."""
        parts = {name: seconds - self._spent[name] for name, seconds in spent.items()}
        parts["evaluating and saving"] = self._aside
        return {"training": time.perf_counter() - self._began - sum(parts.values())} | parts

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
