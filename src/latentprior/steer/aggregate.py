"""The rows of steered texts, aggregated to figures of each method and prompt against the prompt's unsteered text.

A text's *gain* is how far the concept moved the way it was pushed, ``sign(strength) * (concept - unsteered concept)``,
and its *increase* is how much its negative log-likelihood (NLL) rose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from latentprior.utils.errors import InputError, unknown

UNSTEERED = "none"
MEASURED = ("concept", "nll")
DESCRIBED = ("distinct_2", "distinct_3", "longest_repeat", "tokens", "retention", "off_before", "off_after", "moved")
SIGNS = np.array([1.0, -1.0])


class Key(NamedTuple):
    direction: str
    method: str
    prior: str  # "" where the rows name none


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One condition, P prompts by S strengths, with the signs of a strength taken together."""

    strengths: np.ndarray  # [S] absolute, increasing
    gain: np.ndarray  # [P, S] mean over the signs that were run; NaN if a text or its unsteered one is unrated
    increase: np.ndarray  # [P, S] of the NLL, nats a token; NaN where `gain` is
    unsteered: Mapping[str, np.ndarray]  # [P] each column of numbers, of the unsteered texts
    columns: Mapping[str, np.ndarray]  # [P, S, 2] each column of numbers, for positive and negative strengths
    failed: int  # texts without concept or NLL
    missing: int  # texts that other prompts have and some lack


def aggregate(rows: pa.Table) -> dict[Key, Aggregate]:
    """The aggregates of all conditions but the unsteered ones.

    The rows, one for each text, have columns direction, method ("none" is unsteered), strength (signed), prompt,
    concept (probability, not flipped), nll (nats a token), and where they were measured those of `DESCRIBED`. With a
    column "prior", rows without a value there (null or "") hold for all priors.
    """
    data = _columns(rows)
    keys = [Key(*key) for key in zip(data["direction"], data["method"], data["prior"], strict=True)]
    members: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    found = {}
    for direction in dict.fromkeys(key.direction for key in members):
        prompts = np.unique(data["prompt"][data["direction"] == direction])
        own = {key: np.array(chosen) for key, chosen in members.items() if key.direction == direction}
        unsteered = {key.prior: chosen for key, chosen in own.items() if key.method == UNSTEERED}
        for key, chosen in own.items():
            if key.method != UNSTEERED:
                found[key] = _aggregate(data, key, prompts, chosen, unsteered.get(key.prior, unsteered.get("")))
    return found


def _columns(rows: pa.Table) -> dict[str, np.ndarray]:
    numeric = ("strength", *MEASURED, *(name for name in DESCRIBED if name in rows.column_names))
    for name in ("direction", "method", "prompt", *numeric):
        if name not in rows.column_names:
            raise unknown("column of steering results", name, rows.column_names)
    data = {name: np.array(rows[name].to_pylist(), dtype=object) for name in ("direction", "method")}
    priors = rows["prior"].to_pylist() if "prior" in rows.column_names else [""] * len(rows)
    data |= {"prior": np.array([prior or "" for prior in priors], dtype=object), "prompt": rows["prompt"].to_numpy()}
    data |= {name: rows[name].to_numpy().astype(np.float64) for name in numeric}
    if not np.isfinite(data["strength"]).all():
        raise InputError("every strength must be finite")
    if (data["concept"] < 0).any() or (data["concept"] > 1).any():
        raise InputError("concept must be a probability: scale the judge's ratings to [0, 1]")
    return data


def _aggregate(
    data: Mapping[str, np.ndarray], key: Key, prompts: np.ndarray, chosen: np.ndarray, unsteered: np.ndarray | None
) -> Aggregate:
    if unsteered is None:
        raise InputError(f"direction {key.direction!r} has no unsteered texts (method {UNSTEERED!r})")
    signed = data["strength"][chosen]
    strengths, column = np.unique(np.abs(signed), return_inverse=True)
    at = (np.searchsorted(prompts, data["prompt"][chosen]), column, (signed < 0).astype(int))
    shape = (len(prompts), len(strengths), len(SIGNS))
    texts = np.zeros(shape, int)
    np.add.at(texts, at, 1)
    base_at = np.searchsorted(prompts, data["prompt"][unsteered])
    if texts.max() > 1 or len(np.unique(base_at)) < len(base_at):
        raise InputError(f"{', '.join(filter(None, key))}: two rows of the same prompt and strength")

    names = [name for name in (*MEASURED, *DESCRIBED) if name in data]
    columns = {name: np.full(shape, np.nan) for name in names}
    base = {name: np.full(len(prompts), np.nan) for name in names}
    for name in names:
        columns[name][at] = data[name][chosen]
        base[name][base_at] = data[name][unsteered]
    run = texts.any(axis=0)

    def over_signs(values: np.ndarray) -> np.ndarray:
        return np.where(run, values, 0).sum(axis=2) / run.sum(axis=1)

    sign = SIGNS * np.sign(strengths)[:, None]
    gain = over_signs(sign * (columns["concept"] - base["concept"][:, None, None]))
    increase = over_signs(columns["nll"] - base["nll"][:, None, None])
    absent = np.isnan(gain) | np.isnan(increase)
    failed = np.isnan(data["concept"][chosen]) | np.isnan(data["nll"][chosen])
    return Aggregate(
        strengths,
        np.where(absent, np.nan, gain),
        np.where(absent, np.nan, increase),
        base,
        columns,
        int(failed.sum()),
        int(run.sum()) * len(prompts) - len(chosen),
    )
