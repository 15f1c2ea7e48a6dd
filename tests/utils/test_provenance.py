"""What every result file says about how it was made."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess

import pytest
import torch
import transformers

from latentprior.config import TrainConfig, to_dict
from latentprior.utils import provenance


def test_stamp_has_all_that_repeats_a_result():
    stamp = provenance.stamp(to_dict(TrainConfig.of(store="s", output="o", seed=3)), seed=3, wall_seconds=1.23456)
    assert stamp.keys() == {"config", "versions", "git", "seed", "wall_seconds"}
    assert stamp["config"]["run"]["seed"] == stamp["seed"] == 3 and stamp["wall_seconds"] == 1.23
    assert json.loads(json.dumps(stamp))["versions"] == stamp["versions"]
    assert stamp["git"] is None or re.fullmatch(r"[0-9a-f]{40,64}\+?", stamp["git"])


def test_versions():
    found = provenance.versions()
    assert found["python"] == platform.python_version()
    assert found["transformers"] == transformers.__version__
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert found.keys() == {"python", *provenance.PACKAGES}


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package-at-all"))
    assert provenance.versions().keys() == {"python", "torch"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository whose only file is taken for the package."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "package" / "provenance.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    return module, git


def test_revision_of_a_checkout(checkout):
    module, git = checkout
    assert provenance.git_revision() is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "one")
    assert provenance.git_revision() == git("rev-parse", "HEAD")
    module.write_text("changed")
    assert provenance.git_revision() == git("rev-parse", "HEAD") + "+"


def test_an_installed_package_has_no_revision(checkout):
    """An environment inside another project's checkout must not pass that project's commit for ours."""
    module, git = checkout
    (module.parent.parent / "other.txt").write_text("")
    (module.parent.parent / ".gitignore").write_text("package\n")
    git("add", ".")
    git("commit", "-m", "one")
    assert provenance.git_revision() is None


def test_no_git_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_revision() is None
