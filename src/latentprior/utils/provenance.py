"""What a result was made with: versions, revision and machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("latentprior", "torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, with "+" if files differ; None outside a checkout."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "--", __file__)  # an environment inside some other checkout is not ours
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", here).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp(
    config: dict[str, Any], *, seed: int, wall_seconds: float, packages: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The part that every result file has; `packages` are the versions of further ones that decide numbers."""
    made = {"config": config, "versions": versions() | dict(packages or {}), "git": git_revision()}
    return made | {"seed": seed, "wall_seconds": round(wall_seconds, 2)}
