"""Writing the site: a page a unit, lists by block, and an index that searches them all."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path

from latentprior.neurons.store import NeuronStore
from latentprior.report.site.listing import Listing
from latentprior.report.site.unit import render_unit
from latentprior.report.site.words import unit_path
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text, replaced
from latentprior.utils.progress import Report, silent

# The site's style sheet first: it marks a folder whose index is not there yet as ours.
STYLE = "site.css"
ASSETS = (STYLE, "base.css", "site.js")
GENERATOR = '<meta name="generator" content="latentprior neurons">'
MARK = "/* latentprior neurons"
PAGES = re.compile(r"(units/b\d+/n\d+|blocks/\d+(-\d+)?)\.html(\.partial)?")
REPORTED = 50  # units between reports


def write_site(store: NeuronStore, folder: str | Path, *, report: Report = silent) -> Path:
    """Write a static site of a neuron store: it is read from disk, without a server and without a network.

    The index is written last, so that an interrupted run leaves the old one or none; the same call makes it whole.
    Pages of units that the store no longer has are removed then.
    Returns the site's ``index.html``.

    Raises:
        InputError: `folder` is a file, or holds something else than an earlier site.
    """
    folder = Path(folder)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        asset = resources.files("latentprior.report").joinpath("templates", name)
        replace_text(folder / name, asset.read_text("utf-8"))
    listing, written = _write_units(store, folder, report)
    (folder / "blocks").mkdir(exist_ok=True)
    for path, page in listing.block_pages().items():
        _write_page(folder / path, page)
        written.add(path)
    if hasattr(os, "sync"):  # once, because a flush for each of thousands of pages takes longer than making them
        os.sync()
    replace_text(folder / "units.js", listing.script())
    replace_text(folder / "index.html", listing.index_page())
    _remove_others(folder, written)
    return folder / "index.html"


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; a site is written to a folder")
    found = {path.name for path in folder.iterdir()} - {f"{STYLE}.partial"}
    index, style = folder / "index.html", folder / STYLE
    ours = GENERATOR in _start(index) if index.exists() else _start(style).startswith(MARK)
    if found and not ours:
        raise InputError(f"{folder} holds something else than a site of neurons: give an empty or a new folder")


def _start(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(1000)


def _write_units(store: NeuronStore, folder: Path, report: Report) -> tuple[Listing, set[str]]:
    info, d_mlp, total = store.info, store.info["d_mlp"], len(store)
    said: list[str | None] = store.units["description"].to_pylist()
    listing, written = Listing(info), set[str]()
    for block in range(info["blocks"]):
        (folder / unit_path(block, 0)).parent.mkdir(parents=True, exist_ok=True)
    for i, unit in enumerate(store):
        before, after = (divmod(j, d_mlp) if 0 <= j < total else None for j in (i - 1, i + 1))
        numbers, correlations = unit.row["neighbours"] or (), unit.row["neighbour_correlations"] or ()
        near = [(divmod(j, d_mlp), r, said[j]) for j, r in zip(numbers, correlations, strict=True)]
        path = unit_path(unit.block, unit.index)
        _write_page(folder / path, render_unit(unit, info, near, before, after))
        written.add(path)
        listing.add(unit)
        if (i + 1) % REPORTED == 0 or i + 1 == total:
            report(i + 1, total, {})
    return listing, written


def _write_page(path: Path, page: str) -> None:
    """Whole or not at all, but not flushed."""
    with replaced(path, flush=False) as partial:
        partial.write_bytes(page.encode("utf-8"))


def _remove_others(folder: Path, written: set[str]) -> None:
    for pattern in ("units/*/*", "blocks/*"):
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if PAGES.fullmatch(name) and name not in written:
                path.unlink()
