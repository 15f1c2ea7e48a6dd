"""The network: a gated MLP that predicts the flow's velocity at one noisy activation (paper, architecture).

What time does to a block, ``W_time e``, depends on ``t`` alone and would be a quarter of the matrix work with one row
for each activation, so it is computed once for each *distinct* time (`Denoiser.factors`) and gathered.

`DenoiserConfig` describes two departures from the paper's network: the velocity of a standard normal as a skip around
the network, and time that scales and shifts the normalised stream in place of the gates (adaptive layer norm, Peebles
and Xie, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentprior.config import DenoiserConfig
from latentprior.prior import flow
from latentprior.utils.errors import InputError

CPU_CHUNK = 1024  # rows integrated together on a CPU: their hidden units stay in its cache
CACHE_SIZE = 64  # lists of times, such as those of an adaptive repair's noise levels
# The sinusoid is taken of t times this; of the layer's relative depth it is taken unscaled. What scales and shifts the
# norms turns slowly with t, as the optimal velocity does: fast features gain nothing there.
TIME_SCALE = {"gate": 1000.0, "norm": 30.0}


def sinusoid(value: Float[Tensor, " n"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "n {width}"]:
    """Sinusoidal features of a scalar, cosines first, float32."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, device=value.device, dtype=torch.float32))
    angle = value.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Condition(NamedTuple):
    """A batch's distinct times, embeddings of them and of layers, and each row's index (None: all rows share one)."""

    t: Float[Tensor, " u"]
    time: Float[Tensor, "u d_model"]
    time_index: Int[Tensor, " n"] | None = None
    layer: Float[Tensor, "v d_model"] | None = None
    layer_index: Int[Tensor, " n"] | None = None


def modulation(proj: nn.Linear, condition: Condition) -> Float[Tensor, "m k"]:
    """``W e`` for every row, with ``e`` the sum of the embeddings of its time and layer."""
    factor = _gather(proj(condition.time), condition.time_index)
    if condition.layer is None:
        return factor
    # W is linear, so time and layer add up; the bias is in the first term.
    return factor + _gather(F.linear(condition.layer, proj.weight), condition.layer_index)


def modulated(h: Float[Tensor, "n d_model"], factor: Float[Tensor, "m k"]) -> Float[Tensor, "n d_model"]:
    """``h (1 + scale) + shift``, the halves of `factor`."""
    scale, shift = factor.chunk(2, dim=-1)
    return torch.addcmul(h + shift, h, scale)


class Block(nn.Module):
    """``x + W_down( SiLU( (W_gate h) * (W_time e) ) * (W_up h) )`` with ``h = LN(x)``.

    With modulation "norm" it is ``x + W_down( SiLU(W_gate h) * (W_up h) )`` with ``h = LN(x) (1 + scale) + shift``, the
    two halves of ``W_time e``.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        d_model, d_mlp = config.d_model, config.d_mlp
        self.gated = config.modulation == "gate"
        self.ln = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.time_proj = nn.Linear(d_model, d_mlp if self.gated else 2 * d_model)
        self.down_proj = nn.Linear(d_mlp, d_model)

    def hidden(self, x: Float[Tensor, "n d_model"], factor: Float[Tensor, "m k"]) -> Float[Tensor, "n d_mlp"]:
        """The meta-neurons: post-gate hidden units, the input of ``W_down``. `factor` has n rows or one."""
        h = self.ln(x)
        if not self.gated:
            h = modulated(h, factor)
        h = h.to(self.up_proj.weight.dtype)
        gate = self.gate_proj(h)
        return F.silu(gate * factor if self.gated else gate) * self.up_proj(h)

    def forward(self, x: Float[Tensor, "n d_model"], condition: Condition) -> Float[Tensor, "n d_model"]:
        """One whole block, so that its weights may be sharded or compiled together."""
        return x + self.down_proj(self.hidden(x, modulation(self.time_proj, condition)))


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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(config.d_model)
        # The last norm is modulated like the blocks'.
        self.time_proj = nn.Linear(config.d_model, 2 * config.d_model) if config.modulation == "norm" else None
        self.out_proj = nn.Linear(config.d_model, config.d_input)
        self._caching = 0  # contexts open
        self._cache: dict[tuple[Any, ...], list[Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.in_proj.weight.dtype

    def factors(self, t: Float[Tensor, " u"]) -> list[Float[Tensor, "u k"]]:
        """``W_time e`` at `t` for each block, and for the last norm if it is modulated."""
        e = self.embedded_time(t)
        return [proj(e) for proj in self._time_projections()]

    @contextmanager
    def caching(self) -> Iterator[None]:
        """While it is open, `cached_factors` computes each list of times once; the weights must not be changed.

        A decoding step projects a few rows at the same times as the one before, and the time path would be most of its
        work. Contexts may be nested.
        """
        self._caching += 1
        try:
            yield
        finally:
            self._caching -= 1
            if not self._caching:
                self._cache.clear()

    def cached_factors(self, times: Sequence[float]) -> list[Float[Tensor, "u d_mlp"]]:
        """`factors` at `times`, from the cache while `caching` is open; never cached under autograd."""
        weight = self.in_proj.weight
        if not self._caching or torch.is_grad_enabled():
            return self.factors(torch.tensor(times, device=weight.device))
        versions = (p._version for p in self.parameters() if not p.is_inference())  # counts in-place writes
        key = (weight.device, weight.dtype, *versions, *times)  # `attach` may move the prior to the model's device
        if key not in self._cache:
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            self._cache[key] = self.factors(torch.tensor(times, device=weight.device))
        return self._cache[key]

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with an empty cache: the open contexts are the original's."""
        return {**self.__dict__, "_caching": 0, "_cache": {}}

    def embedded_time(self, t: Float[Tensor, " u"]) -> Float[Tensor, "u d_model"]:
        return self.time_embed(sinusoid(TIME_SCALE[self.config.modulation] * t, self.config.d_model).to(self.dtype))

    def embedded_layer(self, layer: Int[Tensor, " u"]) -> Float[Tensor, "u d_model"]:
        if self.config.multi_layer_n_layers is None or self.layer_embed is None:
            raise InputError("this prior has one layer: call it without `layer`")
        depth = layer.float() / max(self.config.multi_layer_n_layers - 1, 1)
        return self.layer_embed(sinusoid(depth, self.config.d_model).to(self.dtype))

    def run(
        self, z_t: Float[Tensor, "n d"], t: Float[Tensor, " ..."], factors: list[Float[Tensor, "m k"]]
    ) -> Float[Tensor, "n d"]:
        """Velocity at time `t`, a scalar or [n], with its factors (n rows or one each)."""
        x, blocks = self.in_proj(z_t.to(self.dtype)), self._blocks()
        for block, factor in zip(blocks, factors, strict=False):
            x = x + block.down_proj(block.hidden(x, factor))
        return self._velocity(x, z_t, t, factors[-1])

    def _velocity(
        self, x: Float[Tensor, "n d_model"], z_t: Float[Tensor, "n d"], t: Float[Tensor, " ..."], factor: Tensor | None
    ) -> Float[Tensor, "n d"]:
        """The velocity from the last stream; `factor` is of the last norm, if that is modulated."""
        h = self.ln(x)
        if self.time_proj is not None and factor is not None:
            h = modulated(h, factor)
        u = self.out_proj(h.to(self.dtype)).to(z_t.dtype)
        if self.config.skip == "normal":
            scale = flow.network_scale(t)[..., None].to(z_t.dtype)
            skip = flow.normal_skip(t)[..., None].to(z_t.dtype)
            u = scale * u + skip * z_t
        return u

    def integrate(
        self,
        z: Float[Tensor, "n d"],
        schedule: flow.Schedule,
        layers: Tensor | None,
        held: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Integrate along the schedule; the time path is computed once for all rows and steps.

        `layers` are a scalar or [N]; `held` are directions [N, d], and the components [N] along them that the data
        prediction keeps.
        """
        times = sorted(set(schedule.times()))
        tables = self.cached_factors(times)
        row_of = {t: i for i, t in enumerate(times)}

        def integrate_part(part: Tensor, part_layers: Tensor | None, *part_held: Tensor) -> Tensor:
            extra = None if part_layers is None else self.layer_factors(part_layers)

            def velocity(z_t: Tensor, t: float) -> Tensor:
                i = row_of[t]
                factors = [table[i : i + 1] for table in tables]
                if extra is not None:
                    factors = [a + b for a, b in zip(factors, extra, strict=True)]
                return self.run(z_t, torch.tensor(t, device=z_t.device), factors)

            return flow.integrate(flow.holding(velocity, *part_held) if part_held else velocity, part, schedule)

        chunk = CPU_CHUNK if z.device.type == "cpu" else max(len(z), 1)
        layer_parts = repeat(layers) if layers is None or layers.ndim == 0 else layers.split(chunk)
        held_parts = (part.split(chunk) for part in held or ())
        return torch.cat(
            [integrate_part(*part) for part in zip(z.split(chunk), layer_parts, *held_parts, strict=False)]
        )

    def units(
        self, z_t: Float[Tensor, "n d"], factors: list[Float[Tensor, "m k"]]
    ) -> Iterator[Float[Tensor, "n d_mlp"]]:
        """Each block's meta-neurons with given factors, one block at a time; what follows the last is not computed."""
        blocks, x = self._blocks(), self.in_proj(z_t.to(self.dtype))
        for block, factor in zip(blocks, factors, strict=False):
            hidden = block.hidden(x, factor)
            yield hidden
            if block is not blocks[-1]:
                x = x + block.down_proj(hidden)

    def forward(
        self,
        z_t: Float[Tensor, "n d"],
        t: Float[Tensor, " ..."],
        layer: Int[Tensor, " ..."] | None = None,
        *,
        time_index: Int[Tensor, " n"] | None = None,
        layer_index: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n d"]:
        """Velocity at `z_t` [N, d] and time `t` (scalar or [N]); `layer` (scalar or [N]) for a multi-layer prior.

        With `time_index`, `t` [U] holds the distinct times and the index says which one each row has; so with
        `layer_index`. Finding them in the data would make the host wait for a GPU.
        """
        condition = self._condition(t, layer, time_index, layer_index)
        x = self.in_proj(z_t.to(self.dtype))
        for block in self.layers:
            x = block(x, condition)
        factor = None if self.time_proj is None else modulation(self.time_proj, condition)
        return self._velocity(x, z_t, _gather(condition.t, condition.time_index), factor)

    def _condition(
        self, t: Tensor, layer: Tensor | None, time_index: Tensor | None = None, layer_index: Tensor | None = None
    ) -> Condition:
        if layer is None and self.layer_embed is not None:
            raise InputError("this prior serves several layers: say which with `layer`")
        if time_index is None:
            t, time_index = _distinct(t)
        time = self.embedded_time(t)
        if layer is None:
            return Condition(t, time, time_index)
        if layer_index is None:
            layer, layer_index = self._distinct_layers(layer)
        return Condition(t, time, time_index, self.embedded_layer(layer), layer_index)

    def row_factors(self, t: Float[Tensor, " ..."], layer: Int[Tensor, " ..."] | None) -> list[Float[Tensor, "m k"]]:
        """`factors` for every row (or one row for a scalar `t` and `layer`)."""
        condition = self._condition(t, layer)
        return [modulation(proj, condition) for proj in self._time_projections()]

    def layer_factors(self, layer: Int[Tensor, " ..."]) -> list[Float[Tensor, "m k"]]:
        """What its layer adds to every row's factors (or to all, for a scalar)."""
        distinct, index = self._distinct_layers(layer)
        e = self.embedded_layer(distinct)
        return [_gather(F.linear(e, proj.weight), index) for proj in self._time_projections()]

    def _distinct_layers(self, layer: Int[Tensor, " ..."]) -> tuple[Tensor, Tensor | None]:
        distinct, index = _distinct(layer)
        n_layers = self.config.multi_layer_n_layers
        if n_layers is not None and distinct.numel() and not 0 <= int(distinct.min()) <= int(distinct.max()) < n_layers:
            raise InputError(f"layer must lie in 0..{n_layers - 1}, got {distinct.tolist()}")
        return distinct, index

    def _time_projections(self) -> list[nn.Linear]:
        last = [] if self.time_proj is None else [self.time_proj]
        return [block.time_proj for block in self._blocks()] + last

    def _blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]


def _distinct(value: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct values, and each row's place among them; no index for a single one."""
    if value.ndim == 0 or value.shape[0] == 1:
        return value.reshape(1), None
    distinct, index = torch.unique(value, return_inverse=True)
    return distinct, index


def _gather(table: Tensor, index: Tensor | None) -> Tensor:
    return table if index is None else table.index_select(0, index)
