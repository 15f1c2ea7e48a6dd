"""How a denoiser lies on devices: compiled, in float8, copied to every process (DDP) or sharded over them (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from latentprior.prior.denoiser import Denoiser
from latentprior.utils.distributed import World
from latentprior.utils.errors import InputError

CPU_MICRO_BATCH = 1024  # rows of a pass by default: their hidden units fit the cache
SHARD_FROM = 1_000_000_000  # parameters; their float32 weights, gradients and AdamW moments take 16 GB


def parallelize(
    denoiser: Denoiser,
    world: World,
    *,
    parallel: Literal["auto", "ddp", "fsdp"] = "auto",
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
    float8: bool = False,
) -> nn.Module:
    """What to call instead of `denoiser` while training; the denoiser itself is changed in place.

    Blocks are compiled and sharded one by one: all alike, they share one compiled code, and weights are gathered
    while the block before computes. "auto" shards from `SHARD_FROM` parameters on; sharded weights travel in
    `precision`. `denoiser` is on its device, with the same weights in every process.
    """
    device = denoiser.in_proj.weight.device
    if float8:
        _use_float8(denoiser, device)
    if compiled:
        for block in denoiser.layers:
            block.compile()
    if world.size == 1:
        return denoiser
    if parallel == "auto":
        parallel = "fsdp" if sum(p.numel() for p in denoiser.parameters()) >= SHARD_FROM else "ddp"
    if parallel == "ddp":
        return DistributedDataParallel(denoiser, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world.size,))
    dtype = None if precision == torch.float32 else precision
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*denoiser.layers, denoiser):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return denoiser


def check_float8(device: torch.device) -> None:
    """Raise `InputError` unless torchao is there and `device` multiplies in float8 (compute capability 8.9 on)."""
    try:
        import torchao  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("float8 needs torchao: pip install torchao") from error
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(f"float8 needs a GPU of compute capability 8.9 or more, not {device}")


def _use_float8(denoiser: Denoiser, device: torch.device) -> None:
    check_float8(device)
    from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]

    def wide(module: nn.Module, name: str) -> bool:
        # time_proj sees few rows; float8 kernels want multiples of 16.
        fits = isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
        return fits and name.startswith("layers.") and not name.endswith("time_proj")

    convert_to_float8_training(denoiser, module_filter_fn=wide)


@contextmanager
def gradients_stay(model: nn.Module, stay: bool) -> Iterator[None]:
    """While `stay`, gradients are added up in each process and not reduced: for all but a step's last micro-batch."""
    if isinstance(model, DistributedDataParallel) and stay:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not stay)
    yield


def whole_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """All weights on the CPU; called by every process, and if they are sharded only the first one gets them."""
    weights = get_model_state_dict(denoiser, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}
