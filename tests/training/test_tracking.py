"""The log of a run: JSON lines, whole, in order, also after a kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentprior.training.tracking import Log, read_log
from latentprior.utils.errors import InputError


def log(path: Path, *, track: str = "none", resume_step: int = 0) -> Log:
    return Log(path, track=track, config={"seed": 1}, resume_step=resume_step)


@pytest.fixture
def path(tmp_path) -> Path:
    """A log of steps 0 to 8 in twos, a held-out loss at 4, and a last line that a kill cut short."""
    path = tmp_path / "run" / "log.jsonl"
    path.parent.mkdir()
    writer = log(path)
    for step in range(0, 10, 2):
        writer.write({"step": step, "loss": 1 / (1 + step)})
        if step == 4:
            writer.write({"step": 4, "heldout_loss": 0.5})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 10, "lo')
    return path


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_log(path)]


def test_lines_come_back_without_one_that_was_cut(path):
    assert steps(path) == [0, 2, 4, 4, 6, 8]
    assert read_log(path)[3] == {"step": 4, "heldout_loss": 0.5}


def test_a_line_is_on_disk_once_it_is_written(path):
    writer = log(path)
    writer.write({"step": 1, "by_t": [1.0, 2.0]})
    assert path.read_text() == json.dumps({"step": 1, "by_t": [1.0, 2.0]}) + "\n"
    writer.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"),
    [(0, []), (3, [0, 2]), (4, [0, 2, 4, 4]), (8, [0, 2, 4, 4, 6, 8]), (99, [0, 2, 4, 4, 6, 8])],
)
def test_steps_to_be_done_again_are_dropped(path, resume_step, kept):
    writer = log(path, resume_step=resume_step)
    assert steps(path) == kept
    writer.write({"step": resume_step + 1})
    writer.close()
    assert steps(path) == [*kept, resume_step + 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())  # the cut line is gone, not glued to
    assert [file.name for file in path.parent.iterdir()] == ["log.jsonl"]


def test_no_log_to_resume(tmp_path):
    writer = log(tmp_path / "log.jsonl", resume_step=5)
    writer.write({"step": 6})
    writer.close()
    assert steps(tmp_path / "log.jsonl") == [6]


@pytest.mark.parametrize("track", ["wandb", "trackio"])
def test_a_service_gets_the_numbers(path, track, monkeypatch):
    calls: list[tuple] = []
    service = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda figures, step: calls.append(("log", figures, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, track, service)
    writer = log(path, track=track)
    writer.write({"step": 3, "loss": 0.5, "by_t": [1.0], "name": "x"})
    writer.close()
    assert calls == [
        ("init", {"project": "latentprior", "name": "run", "config": {"seed": 1}}),
        ("log", {"step": 3, "loss": 0.5}, 3),
        ("finish",),
    ]
    assert read_log(path) == [{"step": 3, "loss": 0.5, "by_t": [1.0], "name": "x"}]


@pytest.mark.parametrize("track", ["wandb", "trackio"])
def test_a_missing_service_is_one_line_and_leaves_the_log(path, track, monkeypatch):
    monkeypatch.setitem(sys.modules, track, None)
    before = path.read_text()
    with pytest.raises(InputError, match=rf"^{track} is not installed: pip install 'latentprior\[track\]'$"):
        log(path, track=track)
    assert path.read_text() == before
