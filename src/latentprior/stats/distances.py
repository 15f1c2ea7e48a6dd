"""How far two sets of activations are apart beyond their first two moments: sliced Wasserstein, classifier two-sample.

The Fréchet distance compares means and covariances alone: a Gaussian fitted to the data has a perfect 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from latentprior.stats.auc import auc_by_group
from latentprior.stats.frechet import Array, rows
from latentprior.utils.errors import InputError

PROJECTION_CHUNK = 64
ROW_CHUNK = 8192

# The two-sample classifier: about two CPU seconds for 6,000 + 6,000 activations of width 576; twice the hidden units
# or epochs found no more. A linear model finds far less, and scikit-learn's network stops by accuracy, not by loss.
HIDDEN = 128
EPOCHS = 10
PATIENCE = 3
BATCH = 128
VALIDATION = 0.2


@dataclass(frozen=True)
class TwoSample:
    """Held-out AUC of telling two sets apart: 0.5 = the classifier cannot, 1 = always."""

    auc: float
    low: float
    """Lower end of the 95% interval (DeLong) over the held-out activations, or over their documents."""
    high: float


def sliced_wasserstein(a: Array, b: Array, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: root mean square, over random unit directions, of the distance along each.

    Of ``a: [N, d]`` and ``b: [M, d]``, in the units of the activations, exact along each of `projections` directions.
    Equal seeds draw equal directions and make distances comparable.
    """
    a, b = _pair(a, b, least=1)
    if projections < 1:
        raise InputError(f"projections must be positive, got {projections}")
    directions = torch.randn(projections, a.shape[1], generator=torch.Generator().manual_seed(seed))
    directions = F.normalize(directions, dim=1).to(a.device)
    # The distance ignores a common shift: taking it out first keeps float32 exact for data far from the origin.
    centre = a[:ROW_CHUNK].mean(0, dtype=torch.promote_types(a.dtype, torch.float32))
    steps_a, steps_b, widths = _quantile_steps(len(a), len(b))
    squared = 0.0
    for chunk in directions.split(PROJECTION_CHUNK):
        along_a, along_b = _sorted_projections(a, chunk, centre), _sorted_projections(b, chunk, centre)
        gaps = np.subtract(along_a[:, steps_a], along_b[:, steps_b], dtype=np.float64)
        squared += float((np.square(gaps) @ widths).sum())
    return float(np.sqrt(squared / projections))


def classifier_two_sample(
    a: Array, b: Array, *, documents: tuple[Tensor | None, Tensor | None] = (None, None), seed: int = 0, folds: int = 3
) -> TwoSample:
    """Classifier two-sample test (Lopez-Paz and Oquab, 2017): the held-out AUC of telling `a` [N, d] from `b` [M, d].

    Each fold is held out once: the next one sets the principal components, a small network is trained on the others,
    stopped early on a validation part of them, and judged on the fold. It sees every dimension, the magnitude of every
    dimension and of every principal component, and the mean square of both; from plain activations a network of this
    size cannot learn what a Gaussian with the right covariance lacks. The components come from rows of their own, by a
    shrunk covariance (Ledoit and Wolf, 2004): below about 1.5 d rows a network learns which rows they were fitted to.

    Args:
        documents: for each set, which document every row is from, [N] and [M] integers; None if rows are independent.
            Rows of one document lie in one fold and count together in the interval.
        folds: at least three; together they need `least_rows` rows of each set.
    """
    if folds < 3:
        raise InputError(f"folds must be at least 3, got {folds}")
    a, b = _pair(a, b, least=10 * folds)
    width = a.shape[1]
    if (given := min(len(a), len(b))) < (least := least_rows(width, folds)):
        raise InputError(f"a two-sample test at width {width} needs at least {least} rows of each set, got {given}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([a.float(), b.float()])
    label = torch.cat([torch.ones(len(a)), torch.zeros(len(b))]).to(x.device)
    groups = [_numbered(part, of) for part, of in zip((a, b), documents, strict=True)]
    fold = torch.cat([_folds(group, folds, generator) for group in groups]).to(x.device)
    group = np.concatenate([group.numpy() for group in groups])
    aucs, variances = [], []
    for held_out in range(folds):
        test, whitening = fold == held_out, fold == (held_out + 1) % folds
        train = ~(test | whitening)
        features = _magnitude_features(x[whitening])
        score = _fit_classifier(features(x[train]), label[train], generator)
        scores, truth = score(features(x[test])).cpu().numpy(), label[test].bool().cpu().numpy()
        among = group[test.cpu().numpy()]
        auc, variance = auc_by_group(scores[truth], scores[~truth], among[truth], among[~truth])
        aucs.append(auc)
        variances.append(variance)
    auc, margin = float(np.mean(aucs)), 1.96 * float(np.sqrt(np.sum(variances))) / folds
    return TwoSample(auc, max(auc - margin, 0.0), min(auc + margin, 1.0))


def least_rows(width: int, folds: int = 3) -> int:
    """How many rows of each set `classifier_two_sample` needs: with fewer, the components are too noisy."""
    return max(10 * folds, -(-width // 4))


def _numbered(x: Tensor, documents: Tensor | None) -> Tensor:
    """Each row's document, counted from 0; without documents every row is its own."""
    if documents is None:
        return torch.arange(len(x))
    if len(documents) != len(x):
        raise InputError(f"{len(x)} rows have {len(documents)} documents: give one for each row")
    return torch.unique(documents.cpu(), return_inverse=True)[1]


def _folds(group: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Each row's fold: those of a group in one, about as many rows in each."""
    sizes = torch.bincount(group)
    order = torch.randperm(len(sizes), generator=generator)
    before = torch.empty_like(sizes)
    before[order] = sizes[order].cumsum(0) - sizes[order]
    fold = (before * folds // len(group))[group]
    if len(fold.unique()) < folds:
        raise InputError(f"{len(sizes)} documents are too few, or too unequal in length, for {folds} folds")
    return fold


def _pair(a: Array, b: Array, *, least: int) -> tuple[Tensor, Tensor]:
    a, b = rows(a, least=least), rows(b, least=least)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"both sets need the same width, got {a.shape[1]} and {b.shape[1]}")
    return a, b.to(a.device)


def _quantile_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each interval on which both quantile functions are constant: the rank in either set, and the width."""
    # In units of 1 / (n m) all ends are integers, so no interval is lost or doubled by rounding.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    return (ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0) / (n * m)


def _sorted_projections(x: Tensor, directions: Tensor, centre: Tensor) -> np.ndarray:
    """[P, N] float32, each row ascending. numpy sorts several times faster than torch on the CPU."""
    along = torch.cat([(chunk - centre).float() @ directions.T for chunk in x.split(ROW_CHUNK)])
    return np.sort(along.T.cpu().numpy(), axis=1)


def _magnitude_features(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """``[N, d] -> [N, 3 d + 2]``: standardised dimensions, their magnitudes and whitened components', log energies."""
    mean, std = reference.mean(0), reference.std(0)
    std[std <= 1e-6 * mean.abs()] = float("inf")  # constant but for float32 round-off: the dimension becomes 0
    variances, directions = np.linalg.eigh(ledoit_wolf(((reference - mean) / std).double().cpu().numpy())[0])
    scale = np.where(variances > 1e-8 * variances[-1], np.sqrt(variances.clip(min=0)), np.inf)
    whiten = torch.as_tensor(directions / scale, dtype=reference.dtype, device=reference.device)

    def features(x: Tensor) -> Tensor:
        z = (x - mean) / std
        both = (z, z @ whiten)
        magnitudes = [(v.abs() - 0.8) / 0.6 for v in both]  # mean and standard deviation of |z| for a Gaussian
        # Of unit variance for a standard normal: one number that d magnitudes would hide from the network.
        energies = [v.square().mean(1, keepdim=True).clamp(min=1e-6).log() * (v.shape[1] / 2) ** 0.5 for v in both]
        return torch.cat([z, *magnitudes, *energies], dim=1)

    return features


def _fit_classifier(x: Tensor, label: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Trains ``x: [N, k] -> logit [N]`` and returns it as it was at the lowest validation loss."""
    sizes = [x.shape[1], HIDDEN, HIDDEN, 1]
    weights = [(torch.randn(i, o, generator=generator) * (2 / i) ** 0.5).to(x.device) for i, o in pairwise(sizes)]
    biases = [torch.zeros(o, device=x.device) for o in sizes[1:]]
    weights[-1] *= 0.1  # starts undecided

    def logit(h: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = F.gelu(h @ weight + bias)
        return (h @ weights[-1] + biases[-1])[:, 0]

    def shuffled(index: Tensor) -> Tensor:
        return index[torch.randperm(len(index), generator=generator).to(index.device)]

    order = shuffled(torch.arange(len(x), device=x.device))
    validation, train = order.tensor_split([max(1, int(VALIDATION * len(x)))])
    groups = [{"params": weights, "weight_decay": 1e-2}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    best, kept, worse = float("inf"), (weights, biases), 0
    for _ in range(EPOCHS):
        for batch in shuffled(train).split(BATCH):
            with torch.enable_grad():
                loss = F.binary_cross_entropy_with_logits(logit(x[batch], weights, biases), label[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = logit(x[validation], weights, biases)
            current = F.binary_cross_entropy_with_logits(held, label[validation]).item()
        if current < best:
            best, worse = current, 0
            kept = [w.detach().clone() for w in weights], [b.detach().clone() for b in biases]
        else:
            worse += 1
            if worse == PATIENCE:
                break
    return lambda x: logit(x, *kept).detach()
