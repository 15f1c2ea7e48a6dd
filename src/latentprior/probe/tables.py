"""A probing result as tables of plain text, and the look-ups that these share with the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentprior.utils.formatting import MISSING, Table, decimals, estimate, signed

Json = Mapping[str, Any]

LEAST_TASKS = 10
TOO_FEW = "too few tasks to compare"


def tables(result: Json) -> list[Table]:
    """Sources, paired differences, families, and what was skipped, of what is in ``probe.json``."""
    skipped = [[str(entry["task"]), str(entry["reason"])] for entry in result.get("skipped") or []]
    last = Table("Skipped tasks", ("task", "reason"), skipped)
    return [table for table in (_sources(result), _paired(result), _families(result), last) if table.rows]


def labels(result: Json) -> dict[str, str]:
    """What each source is called, by name."""
    return {source["name"]: source.get("label") or source["name"] for source in result["sources"]}


def scores(result: Json) -> dict[tuple[str, str], Json]:
    """Mean test AUC of each (source, selection)."""
    return {(score["source"], score["selection"]): score for score in result["summary"]["scores"]}


def leading(result: Json) -> str | None:
    """The source that the result is about, the first prior's meta-neurons; None without a prior.

    The AUC has no say: a prior chosen by its test AUC would look better than it is.
    """
    names = [source["name"] for source in result["sources"] if source["kind"] == "prior"]
    return "meta-neurons" if "meta-neurons" in names else next(iter(names), None)


def difference(result: Json, a: str, b: str, selection: str = "screened") -> Json | None:
    """The paired difference of `a` from `b`, whichever way round the result has it; None if it has neither."""
    for row in result["summary"].get("paired") or []:
        if row["selection"] != selection:
            continue
        if (row["a"], row["b"]) == (a, b):
            return row
        if (row["a"], row["b"]) == (b, a):
            ends = row["interval"] and [-end for end in reversed(row["interval"])]
            lost = row["tasks"] - row["wins"] - row["ties"]
            return {**row, "a": a, "b": b, "difference": -row["difference"], "interval": ends, "wins": lost}
    return None


def verdict(row: Json) -> str:
    """What the interval of a paired difference allows to say; a bootstrap over few tasks allows nothing."""
    if row["tasks"] < LEAST_TASKS:
        return TOO_FEW
    low, high = row["interval"] or (0.0, 0.0)
    return "above" if low > 0 else "below" if high < 0 else "not told from zero"


def best_of(aucs: Mapping[str, float | None]) -> list[str]:
    """The sources whose AUC is highest to three decimals, as many as tables show."""
    shown = {name: round(auc, 3) for name, auc in aucs.items() if auc is not None}
    return [name for name, auc in shown.items() if auc == max(shown.values())]


def draws_sd(score: Json) -> str:
    """The standard deviation of the mean test AUC over draws; a dash for a source that is not drawn."""
    return decimals((score.get("draws") or {}).get("sd"), 4)


def has_draws(result: Json) -> bool:
    return any(source.get("draws") for source in result["sources"])


def _sources(result: Json) -> Table:
    found = scores(result)
    rows, drawn = [], has_draws(result)
    for source in result["sources"]:
        screened, every, chance = (found.get((source["name"], kind), {}) for kind in ("screened", "all", "chance"))
        units = MISSING if source.get("units") is None else f"{source['units']:,}"
        estimates = [estimate(score.get("auc"), score.get("interval"), decimals) for score in (screened, every)]
        plain = [decimals(screened.get("validation")), decimals(chance.get("auc"))]
        row = [labels(result)[source["name"]], units, estimates[0], plain[0], estimates[1], plain[1]]
        rows.append(row + [draws_sd(screened)] * drawn)
    count = len(result["tasks"])
    title = f"Mean test AUC over {count} tasks, 95% intervals" if count > 1 else "Test AUC of the one task"
    header = ("source", "units", "screened", "validation", "all units", "chance", *["SD of draws"] * drawn)
    return Table(title, header, rows)


def _paired(result: Json) -> Table:
    named = labels(result)
    paired = result["summary"].get("paired") or []
    firsts = list(dict.fromkeys(named.get(row["a"], row["a"]) for row in paired))
    rows = [
        [
            ("" if len(firsts) == 1 else f"{named.get(row['a'], row['a'])} less ") + str(named.get(row["b"], row["b"])),
            str(row["selection"]),
            estimate(row["difference"], row.get("interval"), signed),
            f"{row['wins']}, {row['ties']}, {row['tasks'] - row['wins'] - row['ties']}",
            verdict(row),
        ]
        for row in paired
    ]
    header = ("source", "units", "difference, 95% interval", "won, tied, lost", "verdict")
    return Table(f"{firsts[0] if len(firsts) == 1 else 'Sources'} less others, task by task", header, rows)


def _families(result: Json) -> Table:
    """Each family's best source beside the leading one: a column for each source fits no terminal."""
    named, lead = labels(result), leading(result)
    rows = []
    for family in sorted(result["summary"].get("families") or [], key=lambda family: -family["tasks"]):
        aucs = family["scores"]
        best = best_of(aucs)
        first = [str(family["family"]), str(family["tasks"]), *([decimals(aucs.get(lead))] if lead else [])]
        shown = ", ".join(named.get(name, name) for name in best) or MISSING
        rows.append([*first, decimals(aucs[best[0]] if best else None), shown])
    return Table("By task family", ("family", "tasks", *([named[lead]] if lead else []), "best AUC", "of"), rows)
