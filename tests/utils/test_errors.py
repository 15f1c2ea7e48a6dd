"""One-line messages that name what was wrong and the nearest valid names."""

from __future__ import annotations

import pytest

from latentprior.utils.errors import InputError, nearest_path, unknown


def test_nearest_names_are_offered():
    assert str(unknown("solver", "eular", ["euler", "heun"])) == (
        "unknown solver 'eular'; did you mean 'euler'? (valid: euler, heun)"
    )


def test_nearest_files_are_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "prior").mkdir(parents=True)
    (tmp_path / "texts.jsonl").touch()
    assert nearest_path("runs/pri") == " (did you mean 'runs/prior'?)"
    assert nearest_path("text.jsonl") == " (did you mean 'texts.jsonl'?)"
    assert nearest_path("elsewhere/prior") == nearest_path("zzz") == ""


def test_far_names_are_not_offered():
    assert "did you mean" not in str(unknown("solver", "rk45", ["euler", "heun"]))


def test_long_lists_are_cut():
    message = str(unknown("column", "x", (f"column{i}" for i in range(30)), most=3))
    assert "valid: column0, column1, column2, ... (30 in all)" in message


def test_nothing_valid():
    assert str(unknown("layer", 3, [])) == "unknown layer '3' (valid: none)"


def test_is_a_value_error_of_one_line():
    error = unknown("file", "a", ["b", "c"])
    assert isinstance(error, InputError) and isinstance(error, ValueError) and "\n" not in str(error)
    with pytest.raises(ValueError):
        raise error
