"""How well the classifier two-sample test tells known differences apart, by the number of activations.

python benchmarks/bench_two_sample.py HELDOUT TRAIN, two stores of one layer from different documents. Compared with
real held-out activations: others from other documents (nothing to tell: AUC 0.5), the same shifted by a tenth of a
standard deviation in every dimension, and Gaussians of full and of diagonal covariance fitted to TRAIN.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from latentprior.data.store.reader import ActivationStore
from latentprior.evaluation.evaluate import document_halves
from latentprior.stats.distances import classifier_two_sample
from latentprior.stats.gaussian import GaussianPrior

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)


def measure(heldout: str, train: str, ratios: tuple[float, ...] = RATIOS, repeats: int = 5) -> dict[str, Any]:
    """AUCs by kind of difference and rows of each set, one for each repetition; the mean of their half-intervals."""
    began = time.perf_counter()
    store, fitted = ActivationStore(heldout), ActivationStore(train)
    known = fitted.rows(torch.arange(len(fitted))).float()
    mean, std = known.mean(0), known.std(0)
    gaussians = {kind: GaussianPrior.fit((known - mean) / std, kind) for kind in ("full", "diagonal")}
    splits = [document_halves(store, None, seed) for seed in range(repeats)]
    most = min(len(half) for halves in splits for half in halves)
    sizes = [n for ratio in ratios if (n := int(ratio * store.width)) <= most]
    auc: dict[str, dict[int, Any]] = {kind: {} for kind in ("real", "shifted", "full", "diagonal")}
    for n in sizes:
        runs = {kind: [] for kind in auc}
        for repeat, halves in enumerate(splits):
            (real, doc), (other, other_doc) = (_drawn(store, half, n, repeat, mean, std) for half in halves)
            sets = {"real": (other, other_doc), "shifted": (other + 0.1, other_doc)}
            for kind, gaussian in gaussians.items():
                sets[kind] = gaussian.sample(n, torch.Generator().manual_seed(repeat)), None
            for kind, (rows, of) in sets.items():
                runs[kind].append(classifier_two_sample(real, rows, documents=(doc, of), seed=repeat))
        for kind, found in runs.items():
            margin = sum(result.high - result.low for result in found) / 2 / repeats
            auc[kind][n] = {"auc": [round(result.auc, 3) for result in found], "margin": round(margin, 3)}
    seconds = round(time.perf_counter() - began, 1)
    return {"benchmark": "two_sample", "width": store.width, "fitted_to": len(fitted), "auc": auc, "seconds": seconds}


def _drawn(store: ActivationStore, rows: Tensor, n: int, seed: int, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """`n` of `rows`, standardised, and their documents."""
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]
    return (store.rows(chosen).float() - mean) / std, store.metadata(chosen)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", help="store of held-out activations")
    parser.add_argument("train", help="store that the Gaussians are fitted to")
    parser.add_argument("--repeats", type=int, default=5, help="splits of the documents (default: %(default)s)")
    options = parser.parse_args()
    print(json.dumps(measure(options.heldout, options.train, repeats=options.repeats)))
