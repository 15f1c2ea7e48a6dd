"""Sampling and projection: the paper's sampler written plainly in float32 against `GLP`.

The plain sampler computes the time path for every row at every step, all rows at once. Both use Euler steps on the
official grid and start from the same noise, in turn, in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import numpy as np
import torch
from bench_training import PlainDenoiser, fastest, synchronizer
from torch import Tensor

from latentprior.config import DenoiserConfig
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.devices import fast_dtype, resolve_device

PROJECTED_ROWS, PROJECTION_STEPS = 32, 4


@torch.no_grad()
def plain_sample(denoiser: PlainDenoiser, noise: Tensor, mean: Tensor, std: Tensor, steps: int) -> Tensor:
    times = [*np.linspace(1, 0.001, steps).tolist(), 0.0]
    z = noise
    for t, t_next in zip(times, times[1:], strict=False):
        z = z + (t_next - t) * denoiser(z, torch.full((len(z),), t, device=z.device))
    return z * std + mean


def measure(
    d: int = 576,
    d_model: int | None = None,
    blocks: int = 3,
    n: int = 2048,
    steps: int = 20,
    repeats: int = 3,
    device: str = "auto",
) -> dict[str, Any]:
    """Samples per second of both, their ratio, and how far the samples lie apart; d_model is 2 d, d_mlp twice that.

    `difference_float32` and `difference` are root-mean-square differences from the plain samples, in units of those
    samples' root mean square; ours run in float32 and in the device's fast precision. `projection_ms` is the latency
    of repairing 32 rows in 4 steps in the fast precision.
    """
    place = resolve_device(device)
    precision = fast_dtype(place)
    d_model = d_model or 2 * d
    config = DenoiserConfig(d, d_model, 2 * d_model, blocks)
    torch.manual_seed(0)
    mean, std = torch.randn(1, d), 1 + 10 * torch.rand(1, d)
    with place:  # drawing billions of weights on a CPU takes minutes
        denoiser = Denoiser(config)
    exact = GLP(denoiser, Normalizer(mean, std**2, [0])).to(place).eval().requires_grad_(False)
    glp = copy.deepcopy(exact).cast(precision)
    with torch.device("meta"):
        plain = PlainDenoiser(config)
    plain.load_state_dict(exact.denoiser.state_dict(), assign=True)
    mean, std = mean.to(place), std.to(place)
    noise = torch.randn(n, d).to(place)
    x = mean + std * torch.randn(PROJECTED_ROWS, d).to(place)

    expected = plain_sample(plain, noise, mean, std, steps)

    def difference(ours: GLP) -> float:
        samples = ours.sample(n, steps=steps, grid="official", noise=noise)
        return float((samples - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    synchronize = synchronizer(place)
    seconds = fastest(
        {
            "plain": lambda: plain_sample(plain, noise, mean, std, steps),
            "ours": lambda: glp.sample(n, steps=steps, grid="official", noise=noise),
        },
        repeats,
        synchronize,
    )
    project = fastest({"project": lambda: glp.project(x, steps=PROJECTION_STEPS)}, 10 * repeats, synchronize)
    return {
        "benchmark": "sampling",
        "d": d,
        "d_model": d_model,
        "blocks": blocks,
        "n": n,
        "nfe": GLP.nfe(steps, grid="official"),
        "precision": str(precision).removeprefix("torch."),
        "device": str(place),
        "threads": torch.get_num_threads(),
        "plain_samples_per_second": round(n / seconds["plain"], 1),
        "samples_per_second": round(n / seconds["ours"], 1),
        "ratio": round(seconds["plain"] / seconds["ours"], 2),
        "projection_ms": round(1000 * project["project"], 2),
        "difference_float32": difference(exact),
        "difference": difference(glp),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=576, help="width of the activations (default: %(default)s)")
    parser.add_argument("--d-model", type=int, help="width of the denoiser (default: twice d)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--n", type=int, default=2048, help="samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoiser evaluations (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
