"""What a training run will need before anything runs: parameters, FLOPs, memory of each process, days and disk."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from latentprior.config import DenoiserConfig, LLMConfig, PlanConfig, Recipe, to_dict
from latentprior.config.base import size_of
from latentprior.lm.hooks import check_in_range
from latentprior.prior.cost import (
    flops_per_activation,
    paper_flops_per_activation,
    parameters,
    training_bytes,
    training_flops,
)
from latentprior.scaling.cost import (
    LLMShape,
    llm_flops_per_token,
    llm_forward_bytes,
    llm_shape,
    named,
    store_bytes_per_activation,
)
from latentprior.training.parallel import CPU_MICRO_BATCH, SHARD_FROM
from latentprior.training.times import most_distinct
from latentprior.utils.chips import CHIPS, device_memory, matrix_peak
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.formatting import BYTES, COUNTS, FLOPS, duration, scaled
from latentprior.utils.provenance import stamp

MEASURED = "measured"
DAY = 86_400
LAYER_NUMBER = 4  # bytes of an activation's layer in the buffer, if there are several layers

ASSUMPTIONS = (
    "llm_mfu and prior_mfu are assumptions: shares of the chip's matrix peak",
    "each process runs the language model and the prior in turn on its own chip, and they do not overlap",
    "the language model is loaded whole; its blocks up to the last hookpoint run",
    "documents are full length: shorter ones cost less attention and more first tokens, which are no activations",
    "communication between processes, reading text and saving are not counted",
)


@dataclass(frozen=True)
class PlannedChip:
    """What a plan counts with."""

    name: str
    llm_peak: float
    """FLOP/s in the language model's precision."""
    prior_peak: float
    memory: int
    llm_item: int = 2
    """Bytes of a number in the language model."""
    prior_item: int = 2
    micro_batch: int | None = None
    """Most rows of a pass by default; None is all."""


def plan(config: PlanConfig) -> dict[str, Any]:
    """What the run of `config` needs, as plain JSON values: counts, bytes of a process, seconds and disk.

    All counts are those of `prior.cost` and `scaling.cost`; "assumptions" in the result names what they rest on.
    """
    began = time.perf_counter()
    shape = llm_shape(config.llm)
    for layer in config.layers:
        check_in_range(layer, shape.blocks, config.llm.model)
    layers = sorted(set(config.layers)) or [max(shape.blocks // 2 - 1, 0)]
    chip = chip_of(config)
    denoiser = config.prior().denoiser(shape.width, shape.blocks if len(layers) > 1 else None)
    llm = _llm(config, shape, layers)
    prior = _prior(config, denoiser, chip, layers)
    llm_seconds = llm["flops"] / (config.chips * chip.llm_peak * config.llm_mfu)
    prior_seconds = prior["flops"] / (config.chips * chip.prior_peak * config.prior_mfu)
    seconds = llm_seconds + prior_seconds
    times = {"llm_seconds": llm_seconds, "prior_seconds": prior_seconds, "seconds": seconds, "days": seconds / DAY}
    return {
        "kind": "plan",
        "llm": llm,
        "prior": prior,
        "chip": asdict(chip) | {"count": config.chips},
        "memory": _memory(config, shape, denoiser, chip, layers),
        "time": times | {"activations_per_second": config.activations / seconds},
        "disk_bytes": round(config.activations * store_bytes_per_activation(shape.width)),
        "assumptions": list(ASSUMPTIONS),
        **stamp(to_dict(config), seed=0, wall_seconds=time.perf_counter() - began),
    }


def _llm(config: PlanConfig, shape: LLMShape, layers: list[int]) -> dict[str, Any]:
    per_token = llm_flops_per_token(shape, blocks=layers[-1] + 1, sequence=config.max_length)
    # A token gives one activation of each layer; the first of a document gives none.
    per_activation = per_token * config.max_length / (config.max_length - 1) / len(layers)
    return {
        "model": config.llm.model,
        "width": shape.width,
        "blocks": shape.blocks,
        "layers": layers,
        "parameters": shape.parameters,
        "flops_per_token": per_token,
        "flops_per_activation": per_activation,
        "flops": per_activation * config.activations,
    }


def _prior(config: PlanConfig, denoiser: DenoiserConfig, chip: PlannedChip, layers: list[int]) -> dict[str, Any]:
    recipe = config.resolved_recipe()
    rows, micro_batch = _rows(config, chip)
    passes = math.ceil(rows / micro_batch)
    times = distinct_times(recipe, rows, micro_batch)
    several = passes * len(layers) / rows if len(layers) > 1 else 0.0
    forward = flops_per_activation(denoiser, distinct_times=passes * times / rows, distinct_layers=several)
    cost = training_flops(denoiser, recipe, rows, layers=len(layers), times=times, passes=passes)
    update = cost.update / rows  # every process makes the whole one
    return {
        "shape": to_dict(denoiser),
        "parameters": parameters(denoiser),
        "batch_size": recipe.batch_size,
        "micro_batch": micro_batch,
        "parallel": _parallel(config, denoiser),
        "forward_flops_per_activation": forward,
        "flops_per_activation": cost.activation,
        "paper_flops_per_activation": paper_flops_per_activation(denoiser),
        "update_flops_per_activation": update,
        "flops": (cost.activation + update) * config.activations,
    }


def _parallel(config: PlanConfig, denoiser: DenoiserConfig) -> Literal["ddp", "fsdp"]:
    if config.parallel != "auto":
        return config.parallel
    return "fsdp" if config.chips > 1 and parameters(denoiser) >= SHARD_FROM else "ddp"


def _rows(config: PlanConfig, chip: PlannedChip) -> tuple[int, int]:
    """Activations of a step in each process, and of one of its passes."""
    rows = config.resolved_recipe().batch_size // config.chips
    return rows, min(config.micro_batch or chip.micro_batch or rows, rows)


def distinct_times(recipe: Recipe, rows: int, micro_batch: int) -> int:
    """For how many times the time path runs in one pass: as many as there can be among `rows`, on a GPU always."""
    return most_distinct(recipe, micro_batch if recipe.times == "uniform" else rows)


def _memory(
    config: PlanConfig, shape: LLMShape, denoiser: DenoiserConfig, chip: PlannedChip, layers: list[int]
) -> dict[str, Any]:
    """Bytes of each process, by what they hold, and whether they fit the chip."""
    recipe = config.resolved_recipe()
    rows, micro_batch = _rows(config, chip)
    training = training_bytes(
        denoiser,
        rows=rows,
        micro_batch=micro_batch,
        world=config.chips,
        parallel=_parallel(config, denoiser),
        optimizer=recipe.optimizer,
        average=recipe.ema is not None,
        item=chip.prior_item,
    )
    forward = llm_forward_bytes(shape, tokens=config.batch_tokens, layers=len(layers), item=chip.llm_item)
    buffer = _buffer_bytes(config, shape.width * chip.llm_item, several=len(layers) > 1)
    parts = {"LLM weights": shape.parameters * chip.llm_item, "LLM forward pass": forward, "buffer": buffer}
    parts |= {f"prior {name}": taken for name, taken in training.items()}
    total = sum(parts.values())
    return {"bytes": parts, "total": total, "fits": total <= chip.memory, "verdict": _verdict(parts, total, chip)}


def _buffer_bytes(config: PlanConfig, row: int, *, several: bool) -> int:
    """A process's share of the mixing buffer, which holds whole batches of activations of `row` bytes."""
    batch = config.resolved_recipe().batch_size
    size, in_bytes = size_of("buffer", config.buffer)
    batches = (size // row if in_bytes else size) // batch
    if not batches:
        raise InputError(f"a buffer of {config.buffer} does not hold a batch of {batch} activations: raise buffer")
    return batches * (batch // config.chips) * (row + (LAYER_NUMBER if several else 0))


def _verdict(parts: dict[str, int], total: int, chip: PlannedChip) -> str:
    """One line: whether a process fits, and what is too big if not."""
    needs = f"a process needs {scaled(total, BYTES)}, {chip.name} has {scaled(chip.memory, BYTES)}"
    if total <= chip.memory:
        return f"fits: {needs}"
    largest = max(parts, key=lambda part: parts[part])
    return f"does not fit: {needs}; the largest part is the {largest}, {scaled(parts[largest], BYTES)}"


def chip_of(config: PlanConfig) -> PlannedChip:
    """The chip that `config` names, by its data sheet or measured here."""
    if config.chip.lower() == MEASURED:
        return _measured(config.llm, config.device)
    name = named(config.chip, CHIPS)
    if name is None:
        raise unknown("chip", config.chip, [*CHIPS, MEASURED])
    if config.llm.dtype == "float32":
        raise InputError(f"data sheets say bfloat16 peaks: plan {name} in bfloat16, or a measured chip in float32")
    peak = CHIPS[name].tflops * 1e12
    return PlannedChip(name, peak, peak, round(CHIPS[name].memory * 1e9))


def _measured(config: LLMConfig, name: str) -> PlannedChip:
    """The device called `name`, in the precisions that model and prior would have on it."""
    device = resolve_device(name)
    prior = fast_dtype(device)
    llm = prior if config.dtype == "auto" else getattr(torch, config.dtype)
    peaks = {dtype: matrix_peak(device, dtype) for dtype in {llm, prior}}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    micro_batch = CPU_MICRO_BATCH if device.type == "cpu" else None
    return PlannedChip(name, peaks[llm], peaks[prior], device_memory(device), llm.itemsize, prior.itemsize, micro_batch)


def tables(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """A plan as readable figures: rows by table and name."""
    llm, prior, chip, memory, times = (result[key] for key in ("llm", "prior", "chip", "memory", "time"))
    shape, config = prior["shape"], result["config"]
    processes = "the one process" if chip["count"] == 1 else f"each of {chip['count']} processes"
    layers = ", ".join(map(str, llm["layers"]))
    return {
        f"{scaled(config['activations'], COUNTS)} activations": {
            "language model": f"{llm['model']}, {scaled(llm['parameters'], COUNTS)} parameters, layer {layers}",
            "LLM, for each activation": scaled(llm["flops_per_activation"], FLOPS),
            "prior": f"{scaled(prior['parameters'], COUNTS)} parameters: "
            f"{shape['n_layers']} blocks, d_model {shape['d_model']}, d_mlp {shape['d_mlp']}",
            "training, for each activation": scaled(prior["flops_per_activation"], FLOPS),
            "the same by the paper's 6 N": scaled(prior["paper_flops_per_activation"], FLOPS),
            "LLM in all": scaled(llm["flops"], FLOPS),
            "training in all": scaled(prior["flops"], FLOPS),
            "disk, if stored instead": scaled(result["disk_bytes"], BYTES),
        },
        f"Memory of {processes} ({prior['parallel']}, batch {prior['batch_size']})": {
            **{name: scaled(size, BYTES) for name, size in memory["bytes"].items() if size},
            "total": scaled(memory["total"], BYTES),
        },
        f"Time on {chip['count']} x {chip['name']}": {
            f"language model (assumed MFU {config['llm_mfu']})": duration(times["llm_seconds"]),
            f"prior (assumed MFU {config['prior_mfu']})": duration(times["prior_seconds"]),
            "together": duration(times["seconds"]),
            "activations a second": f"{times['activations_per_second']:,.0f}",
        },
    }
