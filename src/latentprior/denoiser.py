"""The network: a gated MLP that predicts the flow's velocity at one noisy activation (paper, architecture).

The time factor ``W_time e`` of a block depends on ``t`` alone. With one row for each activation it is a quarter of
the matrix work, so it is computed once for each *distinct* time (`Denoiser.factors`) and gathered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentprior.config import DenoiserConfig
from latentprior.errors import InputError

TIME_SCALE = 1000.0  # the sinusoid is taken of 1000 t; of the layer's relative depth it is taken unscaled


def sinusoid(value: Float[Tensor, " n"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "n {width}"]:
    """Sinusoidal features of a scalar, cosines first, float32."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, device=value.device, dtype=torch.float32))
    angle = value.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """``x + W_down( SiLU( (W_gate h) * (W_time e) ) * (W_up h) )`` with ``h = LN(x)``."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.time_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)

    def hidden(self, x: Float[Tensor, "n d_model"], factor: Float[Tensor, "m d_mlp"]) -> Float[Tensor, "n d_mlp"]:
        """The meta-neurons: post-gate hidden units, the input of ``W_down``. `factor` has n rows or one."""
        h = self.ln(x).to(self.up_proj.weight.dtype)
        return F.silu(self.gate_proj(h) * factor) * self.up_proj(h)

    def forward(self, x: Float[Tensor, "n d_model"], factor: Float[Tensor, "m d_mlp"]) -> Float[Tensor, "n d_model"]:
        return x + self.down_proj(self.hidden(x, factor))


def _embedding(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class Denoiser(nn.Module):
    """Velocity ``u_hat(z_t, t)`` of one standardised activation, optionally conditioned on its layer."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_input, config.d_model)
        self.time_embed = _embedding(config.d_model)
        self.layer_embed = _embedding(config.d_model) if config.multi_layer_n_layers else None
        self.layers = nn.ModuleList(Block(config.d_model, config.d_mlp) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_input)

    @property
    def dtype(self) -> torch.dtype:
        return self.in_proj.weight.dtype

    def factors(self, t: Float[Tensor, " u"]) -> list[Float[Tensor, "u d_mlp"]]:
        """The time factor ``W_time e`` of each block at `t`: all that depends on time."""
        e = self.time_embed(sinusoid(TIME_SCALE * t, self.config.d_model).to(self.dtype))
        return [block.time_proj(e) for block in self._blocks()]

    def layer_factors(self, layer: Int[Tensor, " u"]) -> list[Float[Tensor, "u d_mlp"]]:
        """What a layer adds to each block's factor; ``W_time`` is linear, so time and layer add up.

        Raises:
            InputError: the denoiser serves one layer only, or a layer lies outside the language model.
        """
        n_layers = self.config.multi_layer_n_layers
        if n_layers is None or self.layer_embed is None:
            raise InputError("this prior has one layer: call it without `layer`")
        if layer.numel() and not (0 <= int(layer.min()) and int(layer.max()) < n_layers):
            raise InputError(f"layer must lie in 0..{n_layers - 1}, got {sorted(set(layer.tolist()))}")
        depth = layer.float() / max(n_layers - 1, 1)
        e = self.layer_embed(sinusoid(depth, self.config.d_model).to(self.dtype))
        return [F.linear(e, block.time_proj.weight) for block in self._blocks()]

    def run(
        self,
        z_t: Float[Tensor, "n d"],
        factors: list[Float[Tensor, "m d_mlp"]],
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Velocity with given factors (n rows or one each); `hidden` collects every block's meta-neurons."""
        x = self.in_proj(z_t.to(self.dtype))
        for block, factor in zip(self._blocks(), factors, strict=True):
            units = block.hidden(x, factor)
            if hidden is not None:
                hidden.append(units)
            x = x + block.down_proj(units)
        return self.out_proj(self.ln(x).to(self.dtype)).to(z_t.dtype)

    def forward(
        self,
        z_t: Float[Tensor, "n d"],
        t: Float[Tensor, ...],
        layer: Int[Tensor, ...] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Velocity at `z_t` [N, d] and time `t` (scalar or [N]); `layer` (scalar or [N]) for a multi-layer prior."""
        return self.run(z_t, self.gathered(t, layer))

    def gathered(self, t: Float[Tensor, ...], layer: Int[Tensor, ...] | None) -> list[Float[Tensor, "m d_mlp"]]:
        """Each block's factor for every row (or one row for a scalar `t` and `layer`)."""
        factors = _per_row(self.factors, t)
        if layer is None:
            if self.layer_embed is not None:
                raise InputError("this prior serves several layers: say which with `layer`")
            return factors
        return [a + b for a, b in zip(factors, self.gathered_layers(layer), strict=True)]

    def gathered_layers(self, layer: Int[Tensor, ...]) -> list[Float[Tensor, "m d_mlp"]]:
        """What its layer adds to every row's factor (or to all, for a scalar)."""
        return _per_row(self.layer_factors, layer)

    def _blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]


def _per_row(factors, value: Tensor) -> list[Tensor]:
    """`factors` of every row of `value`, computed once for each distinct one."""
    if value.ndim == 0 or value.shape[0] == 1:
        return factors(value.reshape(1))
    distinct, index = torch.unique(value, return_inverse=True)
    return [table.index_select(0, index) for table in factors(distinct)]


def flops_per_activation(config: DenoiserConfig, *, distinct_times: float = 0.0) -> float:
    """Multiply-adds times two of one forward pass for one activation.

    `distinct_times` is the number of distinct times for each activation: 1 if every row has its own time (as the
    official code executes it), 0 if the time path is shared by very many rows.
    """
    d, m, h, n = config.d_input, config.d_model, config.d_mlp, config.n_layers
    time_path = 2 * m * m + n * m * h
    return 2.0 * (2 * d * m + 3 * n * m * h + distinct_times * time_path)
