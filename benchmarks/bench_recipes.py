"""Training recipes at a fixed budget of activations, each one change away from the preset "fast".

python benchmarks/bench_recipes.py --store STORE --heldout HELDOUT --output DIR [--figure recipes.png]

Every recipe is trained by `latentprior.training.fit` in ``DIR/<name>-<seed>``; the same command continues an
interrupted comparison. ``DIR/recipes.json`` gets, for each run, the held-out loss against
activations and FLOPs, the seconds of training, and the Fréchet distance of samples to the held-out activations. FLOPs
are those of the matrix products as executed: forward, backward, the time path once for each distinct time of a step,
and Muon's Newton-Schulz iterations.

The loss of "whitened" is left out of table and curves. Its noise is white in another space: mapped back, it has the
covariance of the data instead of the identity, so the two losses average over different noisy activations, and no map
of the predictions makes them one objective. Its Fréchet distance, in raw space, compares with everybody's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

from latentprior.config import TrainConfig
from latentprior.data.store.reader import ActivationStore
from latentprior.prior.cost import training_flops
from latentprior.stats.frechet import GaussianMoments, frechet_distance
from latentprior.training.fit import fit
from latentprior.training.tracking import read_log
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_json
from latentprior.utils.provenance import stamp

PAPER = {
    "skip": "none",
    "modulation": "gate",
    "init": "default",
    "time_rate": 1.0,
    "learning_rate": 4e-3,
    "times": "stratified",
}
# Name -> changes to the preset "fast". The part before the first dash is the panel of the figure.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "paper": PAPER,  # the paper's network with its best recipe of 2026-11-22
    "paper-skip": PAPER | {"skip": "normal"},
    "paper-noises-2": PAPER | {"noise_samples": 2},
    "official": {"preset": "official"},
    "official-4e-3": {"preset": "official", "learning_rate": 4e-3},
    "network-no-skip": {"skip": "none"},
    "network-gate": {"modulation": "gate"},
    "init-default": {"init": "default"},
    "init-scaled": {"init": "scaled"},
    "time-rate-0.3": {"time_rate": 0.3},
    "time-rate-1": {"time_rate": 1.0},
    "times-stratified": {"times": "stratified"},
    "times-scale-0.7": {"logit_scale": 0.7},
    "times-scale-1.2": {"logit_scale": 1.2},
    "times-unbiased": {"weighting": "unbiased"},
    "rate-1e-3": {"learning_rate": 1e-3},
    "rate-4e-3": {"learning_rate": 4e-3},
    "batch-128": {"batch_size": 128},
    "batch-512": {"batch_size": 512},
    "batch-1024": {"batch_size": 1024},
    "noises-2": {"noise_samples": 2},
    "muon-0.02-batch-1024": {"optimizer": "muon", "matrix_rate": 0.02, "batch_size": 1024},
    "schedule-cosine": {"schedule": "cosine"},
    "ema-0.999": {"ema": 0.999},
    "decay-0.1": {"weight_decay": 0.1},
    "betas-0.95-0.99": {"betas": (0.95, 0.99)},
    "whitened": {"normalizer": "whitened"},
    "shape-1-block": {"blocks": 1, "d_mlp": 3456},  # as many hidden units as three blocks of 1152
    "shape-2-blocks": {"blocks": 2, "d_mlp": 1728},
    "shape-6-blocks": {"blocks": 6, "d_mlp": 576},
}
OTHER_SPACE = ("whitened",)  # losses that do not compare
HELDOUT = 16384  # activations of the held-out loss
SAMPLES = 8192  # of the Fréchet distance, 20 evaluations each


def run_config(name: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    given = {
        "preset": "fast",
        "store": options.store,
        "heldout": options.heldout,
        "output": str(Path(options.output) / f"{name}-{seed}"),
        "activations": options.activations,
        "heldout_activations": HELDOUT,
        "blocks": options.blocks,
        "d_model": options.d_model,
        "seed": seed,
    }
    return TrainConfig.of(**given | RECIPES[name])


def measure(config: TrainConfig, heldout: ActivationStore) -> dict[str, Any]:
    """Train as `config` says, or read what an earlier call found: loss by activations and FLOPs, seconds, distance."""
    path = Path(config.run.output) / "recipe.json"
    wanted = json.loads(json.dumps(config.without_groups()))
    if path.is_file() and (found := json.loads(path.read_text()))["config"] == wanted:
        return found
    glp = fit(config)  # continues, or refuses a folder with another run
    recipe, log = config.resolved_recipe(), read_log(Path(config.run.output) / "log.jsonl")
    cost = training_flops(glp.denoiser.config, recipe, recipe.batch_size)
    flops = cost.activation + cost.update / recipe.batch_size
    curve = [
        {"activations": line["activations"], "flops": flops * line["activations"], "heldout_loss": line["heldout_loss"]}
        for line in log
        if "heldout_loss" in line
    ]
    real = next(heldout.batches(min(SAMPLES, len(heldout)), seed=0))[0]
    found = {
        "config": wanted,
        "curve": curve,
        "seconds": training_seconds(log),
        "frechet_distance": frechet_distance(GaussianMoments.of(real), glp.sample(len(real), steps=20, generator=0)),
    }
    replace_json(path, found, indent=None)
    return found


def collected(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All finished runs of this comparison in its folder, by recipe: also those of earlier calls with other names."""
    results: dict[str, list[dict[str, Any]]] = {}
    files = sorted(Path(options.output).glob("*/recipe.json"))
    for name in RECIPES:
        for path in files:
            if path.parent.name.rpartition("-")[0] == name:
                run = json.loads(path.read_text())
                wanted = run_config(name, run["config"]["seed"], options)
                if run["config"] == json.loads(json.dumps(wanted.without_groups())):
                    results.setdefault(name, []).append(run)
    return results


def training_seconds(log: list[dict[str, Any]]) -> float:
    """Seconds of the steps in a log, also of a run that was interrupted (pauses do not count)."""
    lines = [line for line in log if "per_second" in line]
    starts = [0, *(line["activations"] for line in lines[:-1])]
    return sum((line["activations"] - start) / line["per_second"] for line, start in zip(lines, starts, strict=True))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: final losses over seeds, their distance from the baseline's with the same seeds, and the cost."""
    rows = [
        "| recipe | seeds | held-out loss | less baseline | FD | seconds | TFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = {run["config"]["seed"]: final(run) for run in results.get("baseline", [])}
    for name, runs in results.items():
        losses = [final(run) for run in runs]
        shared = [final(run) - reference[s] for run in runs if (s := run["config"]["seed"]) in reference]
        comparable = name not in OTHER_SPACE
        cells = [
            name,
            str(len(runs)),
            spread(losses) if comparable else "other space",
            f"{statistics.mean(shared):+.4f}" if shared and comparable else "",
            spread([run["frechet_distance"] for run in runs]),
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
            f"{statistics.mean(run['curve'][-1]['flops'] for run in runs) / 1e12:.4g}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def final(run: dict[str, Any]) -> float:
    return run["curve"][-1]["heldout_loss"]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.5g}{deviation}"


def draw(results: dict[str, list[dict[str, Any]]], path: str, against: str) -> None:
    """One panel for each option: held-out loss against activations or FLOPs, mean over seeds, baseline in grey."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[str]] = {}
    for name in results:
        if name != "baseline" and name not in OTHER_SPACE:
            panels.setdefault(name.partition("-")[0], []).append(name)
    panels = panels or {"baseline": []}
    columns = min(4, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(height, columns, figsize=(4 * columns, 3 * height), squeeze=False, sharey=True)
    for axis, (panel, names) in zip(axes.flat, panels.items(), strict=False):
        for name in ["baseline"] * ("baseline" in results) + names:
            style = {"color": "0.6", "linewidth": 3} if name == "baseline" else {"marker": "o", "markersize": 3}
            axis.plot(*mean_curve(results[name], against), label=name, **style)
        axis.set(title=panel, xscale="log", xlabel=against)
        axis.legend(fontsize="x-small")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out loss")
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def mean_curve(runs: list[dict[str, Any]], against: str) -> tuple[list[float], list[float]]:
    """Points after the start, which a logarithmic axis cannot show; seeds share their activations."""
    points = [points for points in zip(*(run["curve"] for run in runs), strict=True) if points[0]["activations"]]
    across = [statistics.mean(point[against] for point in seeds) for seeds in points]
    return across, [statistics.mean(point["heldout_loss"] for point in seeds) for seeds in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="activation store to train on, of one layer")
    parser.add_argument("--heldout", required=True, help="activation store of held-out documents")
    parser.add_argument("--output", required=True, help="folder of the runs and of recipes.json")
    parser.add_argument("--activations", type=int, default=1_000_000, help="budget of a run (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(RECIPES)}")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=576, help="width of the denoiser (default: %(default)s)")
    parser.add_argument("--figure", help="draw the curves into this PNG")
    parser.add_argument("--against", choices=("activations", "flops"), default="activations", help="the curves' axis")
    options = parser.parse_args()
    began = time.perf_counter()
    names = options.only.split(",") if options.only else list(RECIPES)
    if strange := [name for name in names if name not in RECIPES]:
        parser.error(f"unknown recipe {strange[0]!r}: {', '.join(RECIPES)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    try:
        heldout = ActivationStore(options.heldout)
        if len(heldout.layers) > 1:
            parser.error(f"{options.heldout} holds layers {list(heldout.layers)}: recipes are compared on one")
        for seed in seeds:  # all recipes with the first seed first: an interrupted comparison is then already one
            for name in names:
                run = measure(run_config(name, seed, options), heldout)
                line = f"{name:24} seed {seed}  loss {final(run):.4f}  FD {run['frechet_distance']:.4g}"
                print(f"{line}  {run['seconds']:.0f} s", file=sys.stderr)
                record = {"benchmark": "recipes", "threads": torch.get_num_threads(), "results": collected(options)}
                record |= stamp(vars(options), seed=seeds[0], wall_seconds=time.perf_counter() - began)
                replace_json(Path(options.output) / "recipes.json", record, indent=2)
    except InputError as error:
        parser.error(str(error))
    results = collected(options)
    print(table(results))
    if options.figure:
        draw(results, options.figure, options.against)


if __name__ == "__main__":
    main()
