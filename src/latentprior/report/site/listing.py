"""The table of all units: the index, what it searches (units.js), and the lists by block that need no script."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from latentprior.neurons.store import Unit
from latentprior.report.site.words import list_path, source_words
from latentprior.report.templating import printable, render

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
    """Columns of every unit, in order; filled by `add`. "won" holds indices into `tasks`."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self.info = info
        self.d_mlp: int = info["d_mlp"]
        names = ("unit", "description", "promoted", "top", "won", "aucs", *STATISTICS)
        self.columns: dict[str, list[Any]] = {name: [] for name in names}
        self.tasks: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.columns["unit"])

    def add(self, unit: Unit) -> None:
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

    def index_page(self) -> str:
        """The first page: the search and the lists by block."""
        won = Counter(task for tasks in self.columns["won"] for task in tasks)
        return render(
            "index.html.jinja",
            root="",
            title=f"Meta-neurons of {self.info.get('prior') or 'a prior'}",
            info=self.info,
            source=source_words(self.info),
            corpus=(self.info.get("corpus") or {}).get("dataset"),
            units=len(self),
            blocks=self.blocks(),
            tasks=[(task, won[i]) for task, i in sorted(self.tasks.items())],
            statistics=self.statistics(),
        )

    def block_pages(self) -> dict[str, str]:
        """Path and text of every page of the lists by block."""
        pages = {}
        for block, positions in self.blocks().items():
            statistics, parts = self.statistics(), -(-len(positions) // ROWS)
            for part in range(parts):
                pages[list_path(block, part)] = render(
                    "list.html.jinja",
                    title=f"Block {block} · {source_words(self.info)}",
                    block=block,
                    d_mlp=self.d_mlp,
                    part=part,
                    parts=parts,
                    statistics=statistics,
                    columns=self.columns,
                    positions=positions[part * ROWS : (part + 1) * ROWS],
                )
        return pages


def top_tokens(unit: Unit) -> list[str]:
    """Different tokens at the peaks of the top documents, highest first."""
    peaks = [example.token_strings[example.peak] for example in unit.top()]
    return list(dict.fromkeys(peaks))[:TOP_TOKENS]


def _short(value: float | None) -> float | None:
    """Four significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
