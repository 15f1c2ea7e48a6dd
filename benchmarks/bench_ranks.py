"""1-D probes of every unit on one task: scikit-learn's AUC unit by unit against rank statistics, on CPU and device.

Synthetic gated units, a third of each unit's values 0, so that ties count. Both screen nothing: all units, five folds,
selection and the test AUC of the best one, in turn, in the same run.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from bench_training import fastest, synchronizer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from latentprior.stats.auc import probe_1d
from latentprior.utils.devices import resolve_device

FOLDS = 5


def gated_units(rows: int, units: int) -> tuple[Tensor, Tensor]:
    """Units [rows, units], each a little larger or smaller in class 1, and labels."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(rows) % 2)[torch.randperm(rows, generator=generator)]
    shift = 0.3 * torch.randn(units, generator=generator)
    x = torch.randn(rows, units, generator=generator) + y[:, None] * shift
    return torch.where(x > -0.43, x, 0.0), y


def plain_best(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> tuple[list[float], float]:
    """Validation AUC of each unit, and the test AUC of the best one."""

    def sign(rows: np.ndarray, unit: int) -> float:
        values, labels = x[rows, unit], y[rows]
        return np.sign(values[labels == 1].mean() - values[labels == 0].mean())

    folds = list(StratifiedKFold(FOLDS).split(x, y))
    validation = [
        float(np.mean([roc_auc_score(y[held], sign(rest, unit) * x[held, unit]) for rest, held in folds]))
        for unit in range(x.shape[1])
    ]
    best = int(np.argmax(validation))
    return validation, float(roc_auc_score(y_test, sign(np.arange(len(y)), best) * x_test[:, best]))


def rank_best(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> tuple[Tensor, float]:
    """The same by rank statistics, on the device of `x`."""
    probes = probe_1d(x, y, candidates=None, folds=FOLDS)
    best = torch.tensor([probes.best()], device=x.device)
    return probes.validation_auc[probes.units.argsort()], probes.test_auc(best, x_test, y_test).item()


def measure(
    units: int = 20736, rows: int = 1024, test_rows: int = 1024, plain_units: int = 512, device: str = "auto"
) -> dict[str, Any]:
    """Seconds of a task for each, the plain ones scaled up from `plain_units`; ratios; the largest difference of AUC.

    The default is a prior of 6 blocks of 3,456 units.
    """
    place = resolve_device(device)
    x, y = gated_units(rows + test_rows, units)
    split = x[:rows], y[:rows], x[rows:], y[rows:]
    moved = tuple(part.to(place) for part in split)
    few = tuple(part[:, :plain_units] if part.ndim == 2 else part for part in split)
    arrays = tuple(part.double().numpy() if part.ndim == 2 else part.numpy() for part in few)
    wanted, wanted_test = plain_best(*arrays)
    found, found_test = rank_best(*(part.to(place) for part in few))
    seconds = fastest({"plain": lambda: plain_best(*arrays)}, 1, synchronizer(torch.device("cpu")))
    seconds |= fastest({"cpu": lambda: rank_best(*split), "device": lambda: rank_best(*moved)}, 3, synchronizer(place))
    plain = seconds["plain"] * units / plain_units
    return {
        "benchmark": "ranks",
        "units": units,
        "rows": rows,
        "test_rows": test_rows,
        "device": str(place),
        "threads": torch.get_num_threads(),
        "plain_seconds": round(plain, 3),
        "cpu_seconds": round(seconds["cpu"], 4),
        "device_seconds": round(seconds["device"], 4),
        "cpu_ratio": round(plain / seconds["cpu"], 1),
        "device_ratio": round(plain / seconds["device"], 1),
        "difference": max(float(np.abs(found.cpu().numpy() - wanted).max()), abs(found_test - wanted_test)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=20736, help="units to probe (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="training rows (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=1024, help="test rows (default: %(default)s)")
    parser.add_argument("--plain-units", type=int, default=512, help="units probed plainly (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
