"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.assets
@pytest.mark.slow
def test_record_train_repair(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLES / "record_train_repair.py"))
    text = example["main"](["--activations", "4096", "--heldout", "500", "--folder", str(tmp_path)])
    assert text.startswith("The weather today") and len(text) > 20
    assert "Fréchet distance" in capsys.readouterr().out


@pytest.mark.assets
@pytest.mark.slow
def test_six_lines(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "six_lines.py"))
    text = example["main"](["--activations", "2048", "--folder", str(tmp_path)])
    assert "The weather today" in text and len(text) > 40
