"""The log of a run: always JSON lines, and a tracking service if one is asked for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text


class Log:
    """Appends figures to a JSONL file, without its lines after `resume_step`, and to a tracking service."""

    def __init__(self, path: Path, *, track: str, config: dict[str, Any], resume_step: int) -> None:
        try:  # first: if it is missing, the file stays as it is
            self._tracker = None if track == "none" else importlib.import_module(track)
        except ImportError as error:
            raise InputError(f"{track} is not installed: pip install 'latentprior[track]'") from error
        lines = _whole_lines(path) if resume_step and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
        replace_text(path, "".join(kept))
        self._file = path.open("a", buffering=1)
        if self._tracker is not None:
            self._tracker.init(project="latentprior", name=path.parent.name, config=config)

    def write(self, figures: dict[str, Any]) -> None:
        """Add one line; `figures` has the key "step"."""
        self._file.write(json.dumps(figures) + "\n")
        if self._tracker is not None:
            numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
            self._tracker.log(numbers, step=figures["step"])

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one cut short by a kill is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
