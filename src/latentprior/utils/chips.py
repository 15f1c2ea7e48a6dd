"""What accelerators can do: by their data sheets, and measured."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """An accelerator as its vendor's data sheet describes it."""

    tflops: int  # dense bf16 matrix peak with float32 accumulation (the sheets' larger numbers assume sparsity)
    memory: int  # GB, taken as 10^9 bytes: some percent of the real size are left to driver and fragmentation
    names: tuple[str, ...]  # as CUDA tells; variants with other peaks (PCIe, NVL, MIG slices) have other names


CHIPS: dict[str, Chip] = {  # vendor data sheets
    "A100-40": Chip(312, 40, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "A100-80": Chip(312, 80, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "H100": Chip(989, 80, ("NVIDIA H100 80GB HBM3",)),  # SXM
    "H200": Chip(989, 141, ("NVIDIA H200",)),
    "B200": Chip(2250, 180, ("NVIDIA B200",)),
    "L40S": Chip(362, 48, ("NVIDIA L40S",)),
    "RTX-4090": Chip(165, 24, ("NVIDIA GeForce RTX 4090",)),
}


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of many square matrix products on `device`.

    What a run reaches of it is no MFU: that is a share of the chip's peak by its data sheet (`data_sheet_peak`).
    """
    size, repeats = (8192, 4) if device.type != "cpu" else (1024, 2)
    generator = torch.Generator(device).manual_seed(0)  # random numbers: zeros would draw less power and run faster
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product, fastest = torch.empty_like(a), math.inf
    began = time.perf_counter()
    while not math.isfinite(fastest) or time.perf_counter() - began < seconds:
        start = time_on(device)
        for _ in range(repeats):
            torch.mm(a, b, out=product)
        fastest = min(fastest, (time_on(device) - start) / repeats)
    return 2 * size**3 / fastest


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of `device` by its vendor's data sheet; None unless it is one of `CHIPS` and `dtype` is bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((chip.tflops * 1e12 for chip in CHIPS.values() if name in chip.names), None)


def time_on(device: torch.device) -> float:
    """Seconds, once `device` has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has in all; of a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
