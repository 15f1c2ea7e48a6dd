"""What a prior costs, counted exactly from shapes: parameters, FLOPs and bytes.

A multiply-add is two FLOPs. Only matrix products are counted: all else is well under a hundredth of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from latentprior.config import DenoiserConfig, Recipe
from latentprior.prior.flow import TRAIN_GRID

FLOAT32 = 4  # bytes


def parameters(config: DenoiserConfig) -> int:
    """Parameters of `Denoiser(config)`.

    With ``d, m, h, n`` = d_input, d_model, d_mlp, blocks: in and out projection ``2 d m + m + d``; two square linears
    for time, and two for layers, ``2 (m² + m)``; last LayerNorm ``2 m``; each block two linears in (up, gate)
    ``2 (m h + h)``, one out ``h m + m`` and a LayerNorm ``2 m``; and the linears of time (`_time_outputs`).
    """
    d, m, h, n = _shape(config)
    embeddings = 2 if config.multi_layer_n_layers else 1
    rest = (
        2 * d * m
        + d
        + m
        + embeddings * 2 * (m * m + m)
        + 2 * m
        + (m + 1) * (_time_outputs(config) - n * _time_width(config))
    )
    return rest + n * _block_parameters(config)


def flops_per_activation(config: DenoiserConfig, *, distinct_times: float = 0.0, distinct_layers: float = 0.0) -> float:
    """FLOPs of one forward pass for one activation, as executed.

    Each row goes through in and out projection and three linears of each block; the time path (two square linears, and
    those with the ``o`` outputs of `_time_outputs`) runs once for each *distinct* time and layer:
    ``2 (2 d m + 3 n m h) + 2 (times + layers) (2 m² + m o)``. `distinct_times` of an activation are 1 if each has its
    own (as in the official code), 0 if very many share one; `distinct_layers` are 0 for a prior of one layer.
    """
    d, m, h, n = _shape(config)
    return 2.0 * (2 * d * m + 3 * n * m * h + (distinct_times + distinct_layers) * m * (2 * m + _time_outputs(config)))


def training_flops_per_activation(
    config: DenoiserConfig, *, distinct_times: float = 0.0, distinct_layers: float = 0.0
) -> float:
    """FLOPs of one forward and backward pass for one activation, as executed.

    A linear's backward is two products of the forward's size. The first linear of each path needs no gradient of its
    input: less ``2 d m`` for each row and ``2 m²`` for each distinct time and layer.
    """
    forward = flops_per_activation(config, distinct_times=distinct_times, distinct_layers=distinct_layers)
    d, m, _, _ = _shape(config)
    return 3 * forward - 2 * d * m - (distinct_times + distinct_layers) * 2 * m * m


def paper_flops_per_activation(config: DenoiserConfig) -> float:
    """The paper's count of training, ``6 N`` with N all parameters (C = 6 N D of its scaling law)."""
    return 6.0 * parameters(config)


def muon_flops_per_step(config: DenoiserConfig) -> float:
    """FLOPs of one update of the blocks' four matrices by Muon; AdamW has no matrix products.

    Each of five Newton-Schulz iterations on a matrix [a, b], a <= b, takes its Gram matrix (``2 a² b``), squares that
    (``2 a³``) and multiplies back (``2 a² b``).
    """
    _, m, h, n = _shape(config)
    shapes = [sorted((m, width)) for width in (h, h, h, _time_width(config))]
    return n * 5 * 2.0 * sum(2 * a * a * b + a**3 for a, b in shapes)


class TrainingFlops(NamedTuple):
    """FLOPs of the matrix products of one process."""

    activation: float  # forward and backward of each activation, all of its noise samples
    update: float  # each optimizer step's


def training_flops(
    config: DenoiserConfig,
    recipe: Recipe,
    rows: int,
    *,
    layers: int = 1,
    times: int | float | None = None,
    passes: int = 1,
) -> TrainingFlops:
    """What training by a recipe executes, with `rows` activations a step from `layers` of the language model.

    The time path runs once in each of the `passes` of a step for each distinct time in it: `times`, by default as many
    as are expected of `rows`.
    """
    distinct = passes * (distinct_times(recipe, rows) if times is None else times) / rows
    several = passes * layers / rows if layers > 1 else 0.0
    once = training_flops_per_activation(config, distinct_times=distinct, distinct_layers=several)
    update = muon_flops_per_step(config) if recipe.optimizer == "muon" else 0.0
    return TrainingFlops(once * recipe.noise_samples, update)


def distinct_times(recipe: Recipe, rows: int) -> float:
    """Distinct noise levels among `rows`; of those drawn from the official grid, their expectation."""
    if recipe.times == "grid":
        return TRAIN_GRID * (1 - (1 - 1 / TRAIN_GRID) ** rows)
    return float(rows if recipe.times == "uniform" else min(recipe.distinct_times, rows))


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
    """Bytes that training takes in each process, by what they hold, with `rows` activations a step in this process.

    Weights, gradients, optimizer and average are float32: ``4 N``, ``4 N``, ``8 N`` (AdamW's two moments; Muon has one
    of the blocks' matrices), ``4 N``. DDP holds them whole in each of `world` processes, FSDP2 one part in `world` of
    each. ``copies`` are of the weights in the precision of the matrix work, of `item` bytes: all of them under DDP
    (autocast keeps them for the step); under FSDP2 all outside the blocks, the running block and the one fetched ahead,
    and float32 gradients on their way: of one block, or of everything if several micro-batches are added up first.
    ``batch`` is raw bf16 and noise float32.
    """
    whole = parameters(config)
    share = -(-whole // world) if parallel == "fsdp" else whole
    d, m, h, n = _shape(config)
    block = _block_parameters(config)
    if parallel == "fsdp" and world > 1:
        copies = (whole - max(n - 2, 0) * block) * item + FLOAT32 * (block if rows <= micro_batch else whole)
    else:
        copies = 0 if item == FLOAT32 else whole * item
    one_moment = n * m * (3 * h + _time_width(config)) * share // whole if optimizer == "muon" else 0
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
    hidden vectors (``6 s h``); the last LayerNorm keeps ``4 m + 8``, the projections ``s m`` and ``s d``, and the loss
    ``4 d``. A norm that time modulates keeps its output, too, and its gathered scale and shift, ``(4 + 2 s) m``; no
    gate is multiplied then, which saves two of the hidden vectors. Working space: gradients of three hidden vectors of
    one block, ``3 s h``. This is eager execution with few distinct times.
    """
    d, m, h, n = _shape(config)
    modulated = config.modulation == "norm"
    norm = (4 + 2 * item) * m if modulated else 0
    block = 8 * m + 8 + norm + (4 if modulated else 6) * item * h
    return rows * (n * block + (4 + item) * m + norm + 8 + (item + 4) * d + 3 * item * h)


def _block_parameters(config: DenoiserConfig) -> int:
    _, m, h, _ = _shape(config)
    return 3 * m * h + 2 * h + 3 * m + (m + 1) * _time_width(config)


def _time_width(config: DenoiserConfig) -> int:
    """Outputs of a block's linear of time: one for each hidden unit, or scale and shift of the stream."""
    return config.d_mlp if config.modulation == "gate" else 2 * config.d_model


def _time_outputs(config: DenoiserConfig) -> int:
    """Outputs of all linears of time: those of the blocks, and of the last norm if it is modulated."""
    return (config.n_layers + (config.modulation == "norm")) * _time_width(config)


def _shape(config: DenoiserConfig) -> tuple[int, int, int, int]:
    return config.d_input, config.d_model, config.d_mlp, config.n_layers
