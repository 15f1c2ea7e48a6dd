"""Packages that offer priors, without pip."""

from __future__ import annotations

from pathlib import Path

from latentprior.prior.installed import GROUP


def offer(folder: Path, package: str, name: str, module: str) -> None:
    """Write into `folder`, which has to be on the path, the metadata of a package that offers a prior."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}\n")
