"""Fréchet distance against the usual one with scipy's matrix square root: time and difference, same data, same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
from scipy import linalg

from latentprior.evaluate import frechet_distance


def with_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov1 + cov2) - 2 * np.trace(linalg.sqrtm(cov1 @ cov2)).real)


def correlated(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """[n, d] Gaussian rows in a random basis, variances falling as 1/k, like those of activations."""
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((n, d)) / np.sqrt(np.arange(1, d + 1)) @ basis.T


def timed(call: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The call's value and its seconds."""
    start = time.perf_counter()
    value = call(a, b)
    return value, time.perf_counter() - start


def measure(d: int = 1024, n: int = 4096, repeats: int = 5) -> dict[str, float]:
    """Seconds of both, from activations [n, d] to the distance; how many times faster; relative difference.

    Both run in turn, and the fastest run of each counts: other work on the machine only ever slows one down.
    """
    rng = np.random.default_rng(0)
    a, b = correlated(n, d, rng), correlated(n, d, rng)
    runs = [(timed(frechet_distance, a, b), timed(with_sqrtm, a, b)) for _ in range(repeats)]
    (ours, _), (theirs, _) = runs[0]
    seconds, seconds_sqrtm = (min(run[i][1] for run in runs) for i in (0, 1))
    return {
        "d": d,
        "n": n,
        "seconds": seconds,
        "seconds_sqrtm": seconds_sqrtm,
        "times_faster": seconds_sqrtm / seconds,
        "relative_difference": abs(ours - theirs) / theirs,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
