"""`latentprior plan` against runs: seconds and peak memory of training and recording, predicted and measured here.

Trains a prior of SmolLM2-135M's width on random activations (or a store) and records embedded text with that model
(packages of requirements-assets.txt), then plans the same work for this device's measured matrix peak. The prediction
takes the plan's assumed MFU; the MFU that the run reached is beside it. Memory is what a GPU allocated; of a CPU (on
Linux) it is the growth of the process's resident size, which also holds what the system's allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from bench_recording import whole_batches

from latentprior.config import DenoiserConfig, LLMConfig, PlanConfig, Recipe
from latentprior.data.activations import activations
from latentprior.data.moments import Moments
from latentprior.data.store.reader import ActivationStore
from latentprior.lm.loading import load_llm
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.scaling.plan import plan
from latentprior.training.loop import State, TrainingLoop
from latentprior.utils.devices import fast_dtype, resolve_device


class Meter:
    """Seconds and peak memory since it was made, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts anew from the present one
            self.held = largest_resident()
        self.restart()

    def restart(self) -> None:
        """Time from here."""
        self._synchronize()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        self._synchronize()
        return time.perf_counter() - self.began

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.held
        return largest_resident() - self.held

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def largest_resident() -> int:
    """Bytes of this process at its largest (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def trained(
    device: torch.device, config: DenoiserConfig, recipe: Recipe, steps: int, micro_batch: int | None, store: str | None
) -> tuple[float, int]:
    """Seconds for each activation, the first steps left out, and peak bytes, of a training run without compilation."""
    if store:
        opened = ActivationStore(store)
        batches, moments = opened.batches(recipe.batch_size), opened.moments()
    else:
        x = torch.randn(recipe.batch_size, config.d_input, generator=torch.Generator().manual_seed(0)).bfloat16()
        batches, moments = repeat((x, None)), Moments([0], config.d_input)
        moments.update(x)
        moments.median_norm[:] = x.float().norm(dim=1).median()
    meter, warm = Meter(device), max(1, steps // 10)
    state = State.start(Denoiser(config).to(device), recipe)
    loop = TrainingLoop(
        state,
        Normalizer.from_moments(moments).to(device),
        recipe,
        steps,
        precision=fast_dtype(device),
        micro_batch=micro_batch,
    )
    for _ in loop.over(batches):
        if state.step == warm:
            meter.restart()
    return meter.seconds() / ((steps - warm) * recipe.batch_size), meter.bytes()


def recorded(device: torch.device, layer: int, batches: int, batch_tokens: int, length: int) -> tuple[float, int]:
    """Seconds for each activation and peak bytes, weights included, of recording whole documents."""
    memory = Meter(device)
    model, tokenizer = load_llm(LLMConfig(), device)
    tokens = whole_batches(tokenizer, batches + 1, batch_tokens, length)
    next(activations(model, tokens[:1], [layer]))  # warms up
    clock = Meter(device)
    rows = sum(len(batch) for batch in activations(model, tokens[1:], [layer]))
    return clock.seconds() / rows, memory.bytes()


def compared(seconds: float, predicted: float, mfu: float, held: int, planned: int) -> dict[str, Any]:
    return {
        "microseconds_per_activation": round(seconds * 1e6, 3),
        "predicted_microseconds_per_activation": round(predicted * 1e6, 3),
        "assumed_mfu": mfu,
        "mfu": round(predicted * mfu / seconds, 3),
        "peak_bytes": held,
        "predicted_peak_bytes": planned,
    }


def measure(
    steps: int = 300,
    blocks: int = 3,
    batch: int = 1024,
    micro_batch: int | None = None,
    store: str | None = None,
    layer: int = 15,
    batches: int = 8,
    batch_tokens: int = 4096,
    length: int = 128,
    device: str = "auto",
) -> dict[str, Any]:
    """Predicted and measured figures of training and recording; `ratio` is measured over predicted seconds of both."""
    options = PlanConfig(
        llm=LLMConfig(),
        layers=[layer],
        max_length=length,
        batch_tokens=batch_tokens,
        blocks=blocks,
        buffer=str(batch),
        micro_batch=micro_batch,
        recipe={"batch_size": batch},
        chip="measured",
        device=device,
    )
    planned = plan(options)
    predicted = {part: planned["time"][f"{part}_seconds"] / options.activations for part in ("llm", "prior")}
    parts = planned["memory"]["bytes"]
    of_prior = sum(size for part, size in parts.items() if part.startswith("prior"))
    place = resolve_device(device)
    shape = DenoiserConfig(**planned["prior"]["shape"])
    train_seconds, train_bytes = trained(
        place, shape, options.resolved_recipe(), steps, planned["prior"]["micro_batch"], store
    )
    record_seconds, record_bytes = recorded(place, layer, batches, batch_tokens, length)
    of_llm = parts["LLM weights"] + parts["LLM forward pass"]
    return {
        "benchmark": "plan",
        "device": planned["chip"]["name"],
        "threads": torch.get_num_threads(),
        "matrix_peak": round(planned["chip"]["prior_peak"]),
        "training": compared(train_seconds, predicted["prior"], options.prior_mfu, train_bytes, of_prior),
        "recording": compared(record_seconds, predicted["llm"], options.llm_mfu, record_bytes, of_llm),
        "ratio": round((train_seconds + record_seconds) / sum(predicted.values()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="activations of a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help="rows of one pass (default: as train chooses)")
    parser.add_argument("--store", help="train on this store of SmolLM2-135M (default: random activations)")
    parser.add_argument("--layer", type=int, default=15, help="block to record (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="token batches to record (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
