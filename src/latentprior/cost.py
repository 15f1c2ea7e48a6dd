"""What things cost, counted exactly from shapes: parameters, FLOPs and bytes of prior and language model.

A multiply-add is two FLOPs. Only matrix products are counted: all else is well under a hundredth of them. No name in
here loads or runs a model but `matrix_peak`, which multiplies two matrices.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Literal

import torch

from latentprior.config import DenoiserConfig

FLOAT32 = 4  # bytes
METADATA_BYTES = 2.4  # of a store's row: zstd parquet of document, position, token and layer, as measured on real text


@dataclass(frozen=True)
class Chip:
    """An accelerator as its vendor's data sheet describes it."""

    tflops: int
    """Dense bf16 matrix peak with float32 accumulation, TFLOP/s (the sheets' larger numbers assume sparsity)."""
    memory: int
    """Memory in GB. Taken as 10^9 bytes, which leaves some percent of the real size to driver and fragmentation."""


CHIPS: dict[str, Chip] = {  # vendor data sheets
    "A100-40": Chip(312, 40),
    "A100-80": Chip(312, 80),
    "H100": Chip(989, 80),  # SXM
    "H200": Chip(989, 141),
    "B200": Chip(2250, 180),
    "L40S": Chip(362, 48),
    "RTX-4090": Chip(165, 24),
}


# -- the prior -----------------------------------------------------------------------------------------------------


def parameters(config: DenoiserConfig) -> int:
    """Parameters of `Denoiser(config)`.

    With ``d, m, h, n`` = d_input, d_model, d_mlp, blocks: in and out projection ``2 d m + m + d``; an embedding of two
    square linears ``2 (m² + m)`` for time and one more for layers; last LayerNorm ``2 m``; each block three linears in
    (up, gate, time) ``3 (m h + h)``, one out ``h m + m`` and a LayerNorm ``2 m``.
    """
    d, m, h, n = _shape(config)
    embeddings = 2 if config.multi_layer_n_layers else 1
    block = 4 * m * h + 3 * h + 3 * m
    return 2 * d * m + d + m + embeddings * 2 * (m * m + m) + 2 * m + n * block


def flops_per_activation(config: DenoiserConfig, *, distinct_times: float = 0.0, distinct_layers: float = 0.0) -> float:
    """FLOPs of one forward pass for one activation, as executed.

    Each row goes through in and out projection and three linears of each block; the time path (two square linears, and
    one linear of each block) runs once for each *distinct* time, and once for each distinct layer of a multi-layer
    prior: ``2 (2 d m + 3 n m h) + 2 (times + layers) (2 m² + n m h)``.

    Args:
        distinct_times: distinct times for each activation: 1 if every row has its own (as the official code executes
            it), 0 if very many rows share one.
        distinct_layers: distinct layers for each activation; 0 for a prior of one layer.
    """
    d, m, h, n = _shape(config)
    return 2.0 * (2 * d * m + 3 * n * m * h + (distinct_times + distinct_layers) * (2 * m * m + n * m * h))


def training_flops_per_activation(
    config: DenoiserConfig, *, distinct_times: float = 0.0, distinct_layers: float = 0.0
) -> float:
    """FLOPs of one forward and backward pass for one activation, as executed.

    A linear's backward is two products of the forward's size, for the gradients of weight and input, so all is three
    times the forward. The first linear of each path has data as its input and needs no gradient there: less ``2 d m``
    for each row and ``2 m²`` for each distinct time and layer.
    """
    forward = flops_per_activation(config, distinct_times=distinct_times, distinct_layers=distinct_layers)
    d, m, _, _ = _shape(config)
    return 3 * forward - 2 * d * m - (distinct_times + distinct_layers) * 2 * m * m


def paper_flops_per_activation(config: DenoiserConfig) -> float:
    """The paper's count of training, ``6 N`` with N all parameters (C = 6 N D of its scaling law)."""
    return 6.0 * parameters(config)


def muon_flops_per_step(config: DenoiserConfig) -> float:
    """FLOPs of one update of the blocks' four matrices by Muon, whatever the batch; AdamW has no matrix products.

    Each of five Newton-Schulz iterations on a matrix [a, b], a <= b, takes its Gram matrix (``2 a² b``), squares that
    (``2 a³``) and multiplies back (``2 a² b``).
    """
    _, m, h, n = _shape(config)
    a, b = min(m, h), max(m, h)
    return 4 * n * 5 * 2.0 * (2 * a * a * b + a**3)


def training_bytes(
    config: DenoiserConfig,
    *,
    rows: int,
    micro_batch: int,
    world: int = 1,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    optimizer: Literal["adamw", "muon"] = "adamw",
    average: bool = False,
    item: int = 2,
) -> dict[str, int]:
    """Bytes that training takes in each process, by what they hold.

    Weights, gradients, optimizer and average are float32: ``4 N``, ``4 N``, ``8 N`` (AdamW's two moments; Muon has one
    of the blocks' matrices), ``4 N``. DDP holds them whole in each of `world` processes (gradients are views of its
    buckets), FSDP2 one part in `world` of each. ``copies`` are of the weights in the precision of the matrix work: all
    of them under DDP (autocast keeps them for the step). FSDP2 gathers block by block: all outside the blocks, the
    running block and the one fetched ahead; and float32 gradients on their way to the others: of one block, or of
    everything if there are several micro-batches, which are added up first. ``activations`` are those of one
    micro-batch, see `activation_bytes`. ``batch`` is the process's part of it: raw bf16 and noise float32.

    Args:
        rows: activations of a step in this process.
        micro_batch: rows of one forward and backward pass.
        world: processes.
        average: an exponential average of the weights is kept.
        item: bytes of a number in the matrix work: 2 for bfloat16, 4 for float32.
    """
    whole = parameters(config)
    share = -(-whole // world) if parallel == "fsdp" else whole
    d, m, h, n = _shape(config)
    block = 4 * m * h + 3 * h + 3 * m
    if parallel == "fsdp" and world > 1:
        copies = (whole - max(n - 2, 0) * block) * item + FLOAT32 * (block if rows <= micro_batch else whole)
    else:
        copies = 0 if item == FLOAT32 else whole * item
    one_moment = 4 * n * m * h * share // whole if optimizer == "muon" else 0
    return {
        "weights": FLOAT32 * share,
        "gradients": FLOAT32 * share,
        "optimizer": FLOAT32 * (2 * share - one_moment),
        "average": FLOAT32 * share if average else 0,
        "copies": copies,
        "activations": activation_bytes(config, min(micro_batch, rows), item=item),
        "batch": rows * d * (2 + FLOAT32),
    }


def activation_bytes(config: DenoiserConfig, rows: int, *, item: int = 2) -> int:
    """Bytes that the backward pass of `rows` activations needs: what the forward pass saves, and working space.

    Saved for each row, with ``s`` = `item`: each block keeps its LayerNorm's input in float32 with mean and deviation
    (``4 m + 8``), the normalised input (``4 m``: float32 once, or once for each of two linears in bfloat16) and six
    hidden vectors (gate, time factor, their product, its SiLU, up, meta-neurons: ``6 s h``); the last LayerNorm keeps
    ``4 m + 8``, out projection ``s m``, in projection ``s d``, and the loss the error ``4 d``. Working space:
    gradients of three hidden vectors of one block, ``3 s h``. The time path of few distinct times is left out. This is
    eager execution; compiled blocks save less.
    """
    d, m, h, n = _shape(config)
    block = 8 * m + 8 + 6 * item * h
    return rows * (n * block + (4 + item) * m + 8 + (item + 4) * d + 3 * item * h)


def _shape(config: DenoiserConfig) -> tuple[int, int, int, int]:
    return config.d_input, config.d_model, config.d_mlp, config.n_layers


# -- the language model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LLMShape:
    """What decides the cost of a language model's forward pass."""

    width: int
    """Of the residual stream."""
    parameters: int
    """All of them, embeddings and head included."""
    block_weights: tuple[int, ...]
    """Entries of the matrices that each token is multiplied with, in each block (of a mixture of experts: the active
    ones)."""
    attention: int
    """Heads times width of a head."""
    mlp: int
    """Hidden units of a block's MLP."""

    @property
    def blocks(self) -> int:
        return len(self.block_weights)


def llama_shape(
    *, width: int, blocks: int, heads: int, kv_heads: int, head: int, mlp: int, vocabulary: int, tied: bool
) -> LLMShape:
    """A decoder of Llama's architecture: no biases, gated MLP, grouped-query attention, RMS norms.

    A block's matrices: query and output ``2 w heads head``, key and value ``2 w kv_heads head``, MLP ``3 w mlp``; its
    norms add ``2 w``. Outside the blocks: embedding ``vocabulary w``, a head of that size unless it is tied, a norm.
    """
    matrices = 2 * width * (heads + kv_heads) * head + 3 * width * mlp
    outside = (1 if tied else 2) * vocabulary * width + width
    return LLMShape(width, blocks * (matrices + 2 * width) + outside, (matrices,) * blocks, heads * head, mlp)


LLM_SHAPES: dict[str, LLMShape] = {
    "smollm2-135m": llama_shape(
        width=576, blocks=30, heads=9, kv_heads=3, head=64, mlp=1536, vocabulary=49152, tied=True
    ),
    "1B": llama_shape(width=2048, blocks=16, heads=32, kv_heads=8, head=64, mlp=8192, vocabulary=128256, tied=True),
    "8B": llama_shape(width=4096, blocks=32, heads=32, kv_heads=8, head=128, mlp=14336, vocabulary=128256, tied=False),
    "70B": llama_shape(width=8192, blocks=80, heads=64, kv_heads=8, head=128, mlp=28672, vocabulary=128256, tied=False),
}


def llm_flops_per_token(shape: LLMShape, *, blocks: int, sequence: int) -> float:
    """FLOPs of one token's forward pass through the first `blocks` blocks, in a document of `sequence` tokens.

    ``2 P + 4 blocks sequence attention``: P is the blocks' matrices; queries times keys and weights times values are
    ``2 sequence attention`` each, without a discount for the causal mask. Embeddings are looked up, which is free, and
    neither later blocks nor the head run.
    """
    return 2.0 * sum(shape.block_weights[:blocks]) + 4.0 * blocks * sequence * shape.attention


def llm_forward_bytes(shape: LLMShape, *, tokens: int, layers: int, item: int = 2) -> int:
    """Bytes of a forward pass of `tokens` without gradients, roughly: three hidden vectors of one MLP and four of the
    residual stream for each token, and the recorded states of `layers` layers."""
    return tokens * item * (3 * shape.mlp + (4 + layers) * shape.width)


# -- disk and devices ----------------------------------------------------------------------------------------------


def store_bytes_per_activation(width: int, *, item: int = 2) -> float:
    """Bytes of a row in an activation store: the activation, and `METADATA_BYTES` that say where it comes from."""
    return width * item + METADATA_BYTES


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of many square matrix products on `device`.

    What a run reaches of it is no MFU: that is a share of the chip's peak by its data sheet (`data_sheet_peak`).

    Args:
        dtype: float32 or bfloat16.
        seconds: how long to multiply; the first products, which warm up, are slower and so do not count.
    """
    size, repeats = (8192, 4) if device.type != "cpu" else (1024, 2)
    generator = torch.Generator(device).manual_seed(0)  # random numbers: zeros would draw less power and run faster
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product, fastest = torch.empty_like(a), math.inf
    began = time.perf_counter()
    while not math.isfinite(fastest) or time.perf_counter() - began < seconds:
        start = _now(device)
        for _ in range(repeats):
            torch.mm(a, b, out=product)
        fastest = min(fastest, (_now(device) - start) / repeats)
    return 2 * size**3 / fastest


_CHIP_OF = {  # by the name that a CUDA device tells; variants with other peaks (PCIe, NVL, MIG slices) have other names
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-PCIE-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA A100 80GB PCIe": "A100-80",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX-4090",
}


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of `device` by its vendor's data sheet; None unless it is one of `CHIPS` and `dtype` is bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    chip = _CHIP_OF.get(torch.cuda.get_device_name(device))
    return None if chip is None else CHIPS[chip].tflops * 1e12


def _now(device: torch.device) -> float:
    """Seconds, once `device` has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has in all; of a CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
