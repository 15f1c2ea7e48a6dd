"""Which device a command computes on, and in which precision it is fast there."""

from __future__ import annotations

from textwrap import shorten

import torch
from torch import Tensor

from latentprior.utils.errors import InputError


def resolve_device(name: torch.device | str) -> torch.device:
    """The device called `name`; "auto" is CUDA if it is there. CUDA without a number is this process's device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {str(name)!r} is not available: {shorten(str(error), 300)}") from error
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes in it (CUDA, and CPUs with AVX-512 bf16 or AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from the CPU to a GPU through pinned memory, without waiting."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
