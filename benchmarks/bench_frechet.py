"""Fréchet distance against the usual one with scipy's matrix square root: time and difference, same data, same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import linalg

from latentprior.stats.frechet import frechet_distance, frechet_from_moments


def with_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    return sqrtm_from_moments(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def sqrtm_from_moments(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    gap = mean1 - mean2
    return float(gap @ gap + np.trace(cov1 + cov2) - 2 * np.trace(linalg.sqrtm(cov1 @ cov2)).real)


def correlated(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """[n, d] Gaussian rows in a random basis, variances falling as 1/k, like those of activations."""
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((n, d)) / np.sqrt(np.arange(1, d + 1)) @ basis.T


def timed(call: Callable[..., float], *arguments: np.ndarray) -> tuple[float, float]:
    """The call's value and its seconds."""
    start = time.perf_counter()
    value = call(*arguments)
    return value, time.perf_counter() - start


def measure(d: int = 1024, n: int = 4096, repeats: int = 5) -> dict[str, Any]:
    """Seconds of both, from moments to the distance; how many times faster; relative difference.

    `ratio_with_moments` also counts the means and covariances of activations [n, d], the same work for both. They run
    in turn, and the fastest run of each counts: other work on the machine only ever slows one down.
    """
    rng = np.random.default_rng(0)
    a, b = correlated(n, d, rng), correlated(n, d, rng)
    moments = (a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    calls = (
        (frechet_from_moments, moments),
        (sqrtm_from_moments, moments),
        (frechet_distance, (a, b)),
        (with_sqrtm, (a, b)),
    )
    runs = [[timed(call, *arguments) for call, arguments in calls] for _ in range(repeats)]
    ours, theirs = runs[0][2][0], runs[0][3][0]
    seconds, seconds_sqrtm, whole, whole_sqrtm = (min(run[i][1] for run in runs) for i in range(4))
    return {
        "benchmark": "frechet",
        "d": d,
        "n": n,
        "seconds": round(seconds, 4),
        "seconds_sqrtm": round(seconds_sqrtm, 4),
        "ratio": round(seconds_sqrtm / seconds, 2),
        "ratio_with_moments": round(whole_sqrtm / whole, 2),
        "relative_difference": abs(ours - theirs) / theirs,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
