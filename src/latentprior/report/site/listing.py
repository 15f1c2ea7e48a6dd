"""The table of all units: what the index searches (units.js), and the lists by block that need no script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from latentprior.neurons.store import Unit
from latentprior.report.markup import Number, number, printable, text
from latentprior.report.site.shell import described, link, list_path, page, share, source_words, unit_path

STATISTICS = {  # key of the column, its heading, the words of the sort menu
    "kurtosis": ("Kurtosis", "excess kurtosis"),
    "variance": ("Variance", "variance"),
    "share": ("Share > {sd} sd", "share above {sd} sd"),
    "maximum": ("Maximum", "maximum"),
    "auc": ("Task AUC", "task AUC"),
    "detection": ("Detection", "detection score"),
    "consistency": ("Consist.", "consistency"),
}
TOP_TOKENS = 8
ROWS = 500  # units on one page of a block's list


class Listing:
    """Columns of every unit, in order; filled by `add`.

    Attributes:
        columns: lists of equal length, one entry a unit.
        tasks: names of the tasks that any unit wins; "won" holds indices into it.
    """

    def __init__(self, info: Mapping[str, Any]) -> None:
        self.info = info
        self.d_mlp: int = info["d_mlp"]
        names = ("unit", "description", "promoted", "top", "won", "aucs", *STATISTICS)
        self.columns: dict[str, list[Any]] = {name: [] for name in names}
        self.tasks: dict[str, int] = {}

    def __len__(self) -> int:
        """Units."""
        return len(self.columns["unit"])

    def add(self, unit: Unit) -> None:
        """Take one unit in."""
        row = unit.row
        aucs = [_short(auc) for auc in row["task_aucs"] or ()]
        entry = {
            "unit": unit.block * self.d_mlp + unit.index,
            "description": row["description"] or "",
            "promoted": list(row["promoted"] or ()),
            "top": top_tokens(unit),
            "won": [self.tasks.setdefault(task, len(self.tasks)) for task in row["tasks"] or ()],
            "aucs": aucs,
            "kurtosis": _short(row["kurtosis"]),
            "variance": _short(row["variance"]),
            "share": _short(row["share_above"][-1] if row["share_above"] else None),
            "maximum": _short(row["maximum"]),
            "auc": max((auc for auc in aucs if auc is not None), default=None),
            "detection": _short(row["detection"]),
            "consistency": row["consistency"],
        }
        for name, value in entry.items():
            self.columns[name].append(printable(value))

    def statistics(self) -> dict[str, tuple[str, str]]:
        """Heading and menu words of the statistics that any unit has."""
        sd = f"{self.info['thresholds'][-1]:g}" if self.info["thresholds"] else ""
        return {
            key: (heading.format(sd=sd), words.format(sd=sd))
            for key, (heading, words) in STATISTICS.items()
            if any(value is not None for value in self.columns[key])
        }

    def blocks(self) -> dict[int, list[int]]:
        """Positions of each block's units."""
        found: dict[int, list[int]] = {}
        for position, unit in enumerate(self.columns["unit"]):
            found.setdefault(unit // self.d_mlp, []).append(position)
        return found

    def script(self) -> str:
        """Text of units.js: the columns as ``window.UNITS``."""
        units = {"d_mlp": self.d_mlp, "tasks": [printable(task) for task in self.tasks], **self.columns}
        packed = json.dumps(units, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        for character in "<\u2028\u2029":  # harmless even inside of HTML, and in old engines
            packed = packed.replace(character, f"\\u{ord(character):04x}")
        return f"window.UNITS={packed};\n"

    def pages(self) -> dict[str, str]:
        """Path and text of every page of the lists by block."""
        return {
            list_path(block, part): self._page(block, part, -(-len(positions) // ROWS), positions)
            for block, positions in self.blocks().items()
            for part in range(-(-len(positions) // ROWS))
        }

    def _page(self, block: int, part: int, parts: int, positions: Sequence[int]) -> str:
        statistics = self.statistics()
        head = "".join(
            f'<th scope="col" class="stat{" on" if key == "kurtosis" else ""}">{text(heading)}</th>'
            for key, (heading, _) in statistics.items()
        )
        rows = "\n".join(self._row(i, statistics) for i in positions[part * ROWS : (part + 1) * ROWS])
        trail = [link("../", "index.html", "All units")]
        if part:
            trail.append(link("../", list_path(block, part - 1), "← Previous", ' rel="prev"'))
        if part + 1 < parts:
            trail.append(link("../", list_path(block, part + 1), "Next →", ' rel="next"'))
        of = f", part {part + 1} of {parts}" if parts > 1 else ""
        body = (
            f'<nav class="trail" aria-label="Site">{"".join(trail)}</nav>\n<main>\n'
            f'<h1>Units of block {block}{of}</h1>\n<table class="units">'
            f'<caption class="vh">Units of block {block}{of}</caption><thead><tr>'
            f'<th scope="col">Unit</th><th scope="col" class="what">Description</th>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody></table>\n</main>"
        )
        return page(f"Block {block}{of} · {source_words(self.info)}", body, root="../")

    def _row(self, i: int, statistics: Mapping[str, Any]) -> str:
        block, index = divmod(self.columns["unit"][i], self.d_mlp)
        cells = "".join(
            f'<td class="stat{" on" if key == "kurtosis" else ""}">{_cell(key, self.columns[key][i])}</td>'
            for key in statistics
        )
        return (
            f'<tr><th scope="row">{link("../", unit_path(block, index), f"b{block} n{index}")}</th>'
            f'<td class="what">{described(self.columns["description"][i])}</td>{cells}</tr>'
        )


def _cell(key: str, value: Number | None) -> str:
    if key == "consistency" and value is not None:
        return str(value)
    return share(value) if key == "share" else number(value)


def top_tokens(unit: Unit) -> list[str]:
    """Different tokens at the peaks of the top documents, highest first."""
    peaks = [example.pieces[example.peak] for example in unit.top()]
    return list(dict.fromkeys(peaks))[:TOP_TOKENS]


def _short(value: float | None) -> float | None:
    """Four significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
