"""One training step: the paper's recipe written plainly in float32 against `latentprior.training.loop`.

The plain one computes the time path for every row, all in float32 (not TF32), the whole batch in one pass, uncompiled,
with torch's default AdamW, and reads every loss. It also runs under bfloat16 autocast, where the device is fast at it.
Ours is the step that `fit` takes: on a GPU compiled blocks, fused AdamW, and many steps without the host waiting. All
start from the same weights and see the same activations, which lie on the device, in the same run.

On a CPU, which others may use too, the contenders take turns. On a GPU each has the memory to itself, one after
another. A rate is that of the fastest of several runs. An MFU is the share of the matrix peak measured in this run that
the FLOPs of the matrix products make, as executed: the time path counts once for each row of the plain loop, and once
for each distinct time of ours.

python benchmarks/bench_training.py --d 4096 --blocks 6        # 3.4 B parameters
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior.config import PRESETS, DenoiserConfig, Recipe
from latentprior.data.partition import Batch, BatchPartition
from latentprior.prior import flow
from latentprior.prior.cost import parameters, training_flops_per_activation
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loop import State, TrainingLoop
from latentprior.training.loss import backward
from latentprior.training.noise import NoiseSamples
from latentprior.training.parallel import CPU_MICRO_BATCH, parallelize
from latentprior.utils.chips import matrix_peak
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.distributed import World

Call = Callable[[], object]

GPU_STEPS = 20  # between two synchronisations: the host is then ahead of the device


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
    return F.mse_loss(denoiser(z_t, t).float(), noise - z_0)


def synchronizer(device: torch.device) -> Call:
    """A function that returns once `device` has done what was asked of it."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def fastest(
    calls: dict[str, Callable[[], object]], repeats: int, synchronize: Callable[[], object]
) -> dict[str, float]:
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


@dataclass(frozen=True)
class Task:
    """What all contenders do."""

    config: DenoiserConfig
    recipe: Recipe
    x: Tensor
    """Raw activations [batch, d], bfloat16, on the device."""
    normalizer: Normalizer
    precision: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def samples(self, recipe: Recipe) -> NoiseSamples:
        """Noise and times of the first step."""
        return NoiseSamples.draw(0, 0, BatchPartition(len(self.x)), self.config.d_input, recipe, self.device)

    def denoiser(self) -> Denoiser:
        """The initial weights, the same at every call."""
        torch.manual_seed(0)
        with self.device:
            return Denoiser(self.config)


class Contender(NamedTuple):
    """A way to train, ready to be timed."""

    run: Call
    rows: int
    """Activations of a run."""
    flops: float
    """For each activation, as executed."""
    loss: float
    """Of the initial weights, on the first step's samples."""


def random_task(
    config: DenoiserConfig, recipe: Recipe, batch: int, device: torch.device, precision: torch.dtype
) -> Task:
    """A task on normal activations."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, config.d_input, generator=generator)
    std = 1 + 10 * torch.rand(1, config.d_input, generator=generator)
    x = (mean + std * torch.randn(batch, config.d_input, generator=generator)).bfloat16()
    return Task(config, recipe, x.to(device), Normalizer(mean, std**2, [0]).to(device), precision)


def plain_contender(task: Task, precision: torch.dtype, rows: int) -> Contender:
    """The plain loop, `rows` activations a step; in another precision than float32 under autocast."""
    with torch.device("meta"):
        denoiser = PlainDenoiser(task.config)
    denoiser.load_state_dict(task.denoiser().state_dict(), assign=True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=task.recipe.learning_rate)
    mean, std = task.normalizer.mean, task.normalizer.scale
    autocast = partial(torch.autocast, task.device.type, precision, enabled=precision != torch.float32)

    def step() -> None:
        t = flow.training_times(torch.rand(rows, device=task.device))
        noise = torch.randn(rows, task.config.d_input, device=task.device)
        with autocast():
            loss = plain_loss(denoiser, task.x[:rows], mean, std, t, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), task.recipe.clip)
        optimizer.step()
        loss.item()

    samples, total = task.samples(task.recipe), 0.0
    for part in torch.arange(len(task.x)).split(rows):
        with torch.no_grad(), autocast():
            t, noise = samples.t[part].to(task.device), samples.noise[part]
            total += len(part) * float(plain_loss(denoiser, task.x[part], mean, std, t, noise))
    flops = training_flops_per_activation(task.config, distinct_times=1.0)
    return Contender(step, rows, flops, total / len(task.x))


def our_contender(
    task: Task, recipe: Recipe, *, steps: int, micro_batch: int | None, compiled: bool, float8: bool
) -> Contender:
    """`steps` steps of `latentprior.training.loop`."""
    partition, denoiser = BatchPartition(len(task.x)), task.denoiser()
    model = parallelize(denoiser, World(), precision=task.precision, compiled=compiled, float8=float8)
    state, options = State.start(denoiser, recipe, model), {"precision": task.precision, "micro_batch": micro_batch}

    def run() -> None:
        loop = TrainingLoop(state, task.normalizer, recipe, state.step + steps, **options)
        for _ in loop.over(repeat(Batch(task.x))):
            pass

    samples = task.samples(recipe)
    loss = backward(model, task.normalizer, Batch(task.x), [samples], partition.rows, partition=partition, **options)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    parts = (
        slice(i, i + (micro_batch or partition.rows)) for i in range(0, partition.rows, micro_batch or partition.rows)
    )
    distinct = sum(len(samples.select(part).times()[0]) for part in parts) / partition.rows
    flops = training_flops_per_activation(task.config, distinct_times=distinct)
    return Contender(run, steps * partition.rows, flops, float(loss))


def host_waits(run: Call) -> int:
    """How often `run` makes the host wait for the GPU, as torch's synchronisation check sees it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def timed(
    contenders: dict[str, Callable[[], Contender]], repeats: int, device: torch.device
) -> tuple[dict[str, Contender], dict[str, float], dict[str, dict[str, int]]]:
    """Each contender, its seconds, and, on a GPU, its peak memory and how often it makes the host wait in a run."""
    on_gpu = device.type == "cuda"
    seconds, on_device, built = {}, {}, {}
    for group in [[name] for name in contenders] if on_gpu else [list(contenders)]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        ready = {name: contenders[name]() for name in group}
        seconds |= fastest({name: one.run for name, one in ready.items()}, repeats, synchronizer(device))
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device)
            on_device |= {name: {"peak_bytes": peak, "host_waits": host_waits(one.run)} for name, one in ready.items()}
        built |= {name: one._replace(run=lambda: None) for name, one in ready.items()}
        del ready  # and with it the weights
        torch.compiler.reset()  # the next one's shapes are no variants of this one's
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return built, seconds, on_device


def measure(
    d: int = 576,
    d_model: int | None = None,
    d_mlp: int | None = None,
    blocks: int = 3,
    batch: int = 4096,
    plain_batch: int | None = None,
    micro_batch: int | None = None,
    steps: int | None = None,
    repeats: int = 5,
    compile: bool | None = None,
    float8: bool = False,
    stratified: bool = True,
    device: str = "auto",
) -> dict[str, Any]:
    """Activations per second of all contenders, also over the plain loop's (`ratio` is ours), MFU, and first losses.

    On a GPU also each one's peak memory and how often it made the host wait in a timed run (`host_waits`).

    Args:
        d: width of the activations.
        d_model: width of the denoiser; twice `d` by default.
        d_mlp: hidden units of a block; twice `d_model` by default.
        blocks: residual blocks.
        batch: activations of a step.
        plain_batch: activations of a step of the plain loop, `batch` by default.
        micro_batch: rows of one pass of ours; by default what `fit` takes.
        steps: our steps in one timed run; by default 1 on a CPU, `GPU_STEPS` on a GPU. (The plain loop's is one step:
            it waits for every loss.)
        repeats: timed runs; the fastest counts.
        compile: whether ours compiles its blocks; by default as `fit`, on a GPU.
        float8: whether ours multiplies in float8.
        stratified: also time our step with the time sampling of the preset `quick`: fewer distinct times.
        device: torch device.
    """
    place = resolve_device(device)
    on_gpu = place.type == "cuda"
    d_model = d_model or 2 * d
    config = DenoiserConfig(d, d_model, d_mlp or 2 * d_model, blocks)
    recipe, precision = dataclasses.replace(PRESETS["official"], batch_size=batch), fast_dtype(place)
    plain_rows = min(plain_batch or batch, batch)
    ours: dict[str, Any] = {
        "steps": steps or (GPU_STEPS if on_gpu else 1),
        "micro_batch": micro_batch or (None if on_gpu else CPU_MICRO_BATCH),
        "compiled": on_gpu if compile is None else compile,
        "float8": float8,
    }
    task = random_task(config, recipe, batch, place, precision)
    contenders = {"plain": partial(plain_contender, task, torch.float32, plain_rows)}
    if precision != torch.float32:
        contenders["autocast"] = partial(plain_contender, task, precision, plain_rows)
    contenders["ours"] = partial(our_contender, task, recipe, **ours)
    if stratified:
        fewer = dataclasses.replace(recipe, times="stratified")
        contenders["stratified"] = partial(our_contender, task, fewer, **ours)
    peak = matrix_peak(place, precision)
    built, seconds, on_device = timed(contenders, repeats, place)
    rates = {name: one.rows / seconds[name] for name, one in built.items()}
    return {
        "benchmark": "training",
        "parameters": parameters(config),
        "shape": dataclasses.asdict(config),
        "batch": batch,
        "plain_batch": plain_rows,
        **ours,
        "precision": str(precision).removeprefix("torch."),
        "device": str(place),
        "threads": torch.get_num_threads(),
        "matrix_peak": round(peak),
        "activations_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["plain"], 2),
        "over_plain": {name: round(rate / rates["plain"], 2) for name, rate in rates.items()},
        "mfu": {name: round(rate * built[name].flops / peak, 4) for name, rate in rates.items()},
        "loss": {name: one.loss for name, one in built.items()},
        "on_device": on_device,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--d", type=int, default=576, help="width of the activations (default: %(default)s)")
    parser.add_argument("--d-model", type=int, help="width of the denoiser (default: twice d)")
    parser.add_argument("--d-mlp", type=int, help="hidden units of a block (default: twice d_model)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="activations of a step (default: %(default)s)")
    parser.add_argument("--plain-batch", type=int, help="activations of a step of the plain loop (default: as ours)")
    parser.add_argument("--micro-batch", type=int, help="rows of one pass of ours (default: as fit chooses)")
    parser.add_argument("--steps", type=int, help=f"our steps in a timed run (default: 1, on a GPU {GPU_STEPS})")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the fastest counts (default: %(default)s)")
    parser.add_argument("--compile", action=switch, help="compile our blocks (default: on a GPU)")
    parser.add_argument("--float8", action="store_true", help="multiply in float8 (needs torchao)")
    parser.add_argument("--stratified", action=switch, default=True, help="also time fewer distinct times")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
