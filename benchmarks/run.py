"""All comparisons in one run: prints a table and writes a dated JSON file into ``benchmarks/results/``.

python benchmarks/run.py [--only training sampling] [--quick]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_frechet
import bench_loading
import bench_plan
import bench_ranks
import bench_recording
import bench_sampling
import bench_steering
import bench_training
import torch

from latentprior.utils.provenance import stamp

RESULTS = Path(__file__).parent / "results"

Measure = Callable[[], dict[str, Any]]
BENCHMARKS: dict[str, tuple[Measure, Measure]] = {  # full size, quick
    "training": (lambda: bench_training.measure(repeats=3), lambda: bench_training.measure(d=64, batch=256, repeats=1)),
    "loading": (bench_loading.measure, lambda: bench_loading.measure(8192)),
    "sampling": (bench_sampling.measure, lambda: bench_sampling.measure(d=64, n=64, repeats=1)),
    "steering": (
        bench_steering.measure,
        lambda: bench_steering.measure(rows=2, new_tokens=3, d_model=64, blocks=1, repeats=1),
    ),
    "ranks": (
        bench_ranks.measure,
        lambda: bench_ranks.measure(units=256, rows=256, test_rows=256, plain_units=16),
    ),
    "recording": (
        lambda: bench_recording.measure(batches=4),
        lambda: bench_recording.measure(batches=1, batch_tokens=512, repeats=1),
    ),
    "plan": (
        bench_plan.measure,
        lambda: bench_plan.measure(steps=4, blocks=1, batch=128, batches=1, batch_tokens=512),
    ),
    "frechet": (bench_frechet.measure, lambda: bench_frechet.measure(d=64, n=256)),
}


def processor() -> str:
    """Name of the chip that the benchmarks ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that everything runs")
    options = parser.parse_args()
    began = time.perf_counter()
    results = {}
    for name in options.only:
        results[name] = BENCHMARKS[name][options.quick]()
        print(f"{name:10} ratio {results[name]['ratio']:6.2f}  {json.dumps(results[name])}", file=sys.stderr)
    today = datetime.date.today().isoformat()
    record = {"date": today, "processor": processor(), "results": results}
    record |= stamp(vars(options), seed=0, wall_seconds=time.perf_counter() - began)
    if not options.quick:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{today}-{kind}.json"
        if path.exists():  # of the day's runs, the last of each benchmark
            record["results"] = json.loads(path.read_text())["results"] | results
        path.write_text(json.dumps(record, indent=2) + "\n")
    print("| benchmark | ratio |\n|---|---|")
    for name, result in results.items():
        print(f"| {name} | {result['ratio']} |")


if __name__ == "__main__":
    main()
