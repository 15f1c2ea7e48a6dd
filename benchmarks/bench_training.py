"""One training step: the paper's recipe written plainly in float32 against `latentprior.train`.

The plain one computes the time path for every row, all in float32, the whole batch in one pass, with torch's default
AdamW. Both start from the same weights and see the same activations in turn, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior import flow
from latentprior.config import PRESETS, DenoiserConfig, Recipe
from latentprior.denoiser import Denoiser
from latentprior.fit import CPU_MICRO_BATCH
from latentprior.llm import fast_dtype, resolve_device
from latentprior.normalizer import Normalizer
from latentprior.train import Draws, State, backward, train


class PlainBlock(nn.Module):
    """A gated MLP whose gate is multiplied by each row's own time factor."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.time_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.ln(x)
        return x + self.down_proj(F.silu(self.gate_proj(h) * self.time_proj(e)) * self.up_proj(h))


class PlainDenoiser(nn.Module):
    """The paper's network as one would first write it; parameters are called as those of `Denoiser`."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width = config.d_model
        self.in_proj = nn.Linear(config.d_input, width)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(PlainBlock(width, config.d_mlp) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, config.d_input)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        half = self.ln.normalized_shape[0] // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=z.device))
        angles = 1000 * t[:, None] * frequencies
        e = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.in_proj(z)
        for layer in self.layers:
            x = layer(x, e)
        return self.out_proj(self.ln(x))


def plain_loss(denoiser: PlainDenoiser, x: Tensor, mean: Tensor, std: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    z_0 = (x.float() - mean) / std
    z_t = (1 - t[:, None]) * z_0 + t[:, None] * noise
    return F.mse_loss(denoiser(z_t, t), noise - z_0)


def fastest(calls: dict[str, Callable[[], object]], repeats: int, synchronize: Callable[[], None]) -> dict[str, float]:
    """Seconds of each call's fastest run, the calls taking turns: others on the machine only ever slow them down."""
    seconds = dict.fromkeys(calls, math.inf)
    for turn in range(repeats + 1):  # the first turn warms up
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(
    d: int = 576,
    blocks: int = 3,
    batch: int = 4096,
    micro_batch: int | None = None,
    repeats: int = 5,
    device: str = "auto",
) -> dict[str, Any]:
    """Activations per second of both at d_model 2 d and d_mlp 4 d, their ratio, and both losses of the first step.

    "stratified" is our step with the time sampling of the preset `quick`: fewer distinct times, less of the time path.

    `micro_batch` is by default what `fit` takes.
    """
    place = resolve_device(device)
    micro_batch = micro_batch or (CPU_MICRO_BATCH if place.type == "cpu" else batch)
    recipe, precision = PRESETS["official"], fast_dtype(place)
    config = DenoiserConfig(d, 2 * d, 4 * d, blocks)
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(1, d, generator=generator), 1 + 10 * torch.rand(1, d, generator=generator)
    x = (mean + std * torch.randn(batch, d, generator=generator)).bfloat16()
    normalizer = Normalizer(mean, std**2, [0]).to(place)
    mean, std = mean.to(place), std.to(place)

    torch.manual_seed(0)
    state = State.start(Denoiser(config).to(place), recipe)
    plain = PlainDenoiser(config).to(place)
    plain.load_state_dict(state.denoiser.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.learning_rate)

    draws = Draws.of(0, 0, x.shape, recipe)
    with torch.no_grad():
        loss_plain = float(plain_loss(plain, x.to(place), mean, std, draws.t.to(place), draws.noise.to(place)))
    loss = backward(state.denoiser, normalizer, x, None, draws, precision=precision, micro_batch=micro_batch)
    state.optimizer.zero_grad()

    def plain_step() -> None:
        t = flow.training_times(torch.rand(batch)).to(place)
        loss = plain_loss(plain, x.to(place), mean, std, t, torch.randn(batch, d).to(place))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
        optimizer.step()
        loss.item()

    def our_step(recipe: Recipe) -> None:
        one = [(x, None)]
        train(state, normalizer, one, recipe, steps=state.step + 1, precision=precision, micro_batch=micro_batch)

    stratified = dataclasses.replace(recipe, times="stratified")

    synchronize = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    ours = {"ours": lambda: our_step(recipe), "stratified": lambda: our_step(stratified)}
    seconds = fastest({"plain": plain_step, **ours}, repeats, synchronize)
    return {
        "benchmark": "training",
        "parameters": sum(p.numel() for p in plain.parameters()),
        "d": d,
        "batch": batch,
        "micro_batch": micro_batch,
        "precision": str(precision).removeprefix("torch."),
        "device": str(place),
        "threads": torch.get_num_threads(),
        "plain_activations_per_second": round(batch / seconds["plain"], 1),
        "activations_per_second": round(batch / seconds["ours"], 1),
        "ratio": round(seconds["plain"] / seconds["ours"], 2),
        "stratified_activations_per_second": round(batch / seconds["stratified"], 1),
        "stratified_ratio": round(seconds["plain"] / seconds["stratified"], 2),
        "plain_loss": loss_plain,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=576, help="width of the activations (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="activations of a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help="rows of one pass of ours (default: as fit chooses)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the fastest counts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
