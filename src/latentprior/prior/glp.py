"""`GLP`, the generative latent prior: normalizer, denoiser and provenance in one object.

Raw activations have free leading dimensions; standardised ones are called ``z``, and noise is always standardised. What
draws takes `generator`: a seed repeats exactly, a `torch.Generator` advances, and None draws fresh numbers, which
`torch.manual_seed` makes repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from latentprior.config import Grid, Solver
from latentprior.lm.hooks import Hookpoint
from latentprior.prior import files as pretrained
from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.prior.repair import Attachable
from latentprior.utils.errors import InputError
from latentprior.utils.hub import upload
from latentprior.utils.random import Seed, generator_of, normal

SCORE_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
Layer = Int[Tensor, "..."] | int | None
P = ParamSpec("P")


def _on_priors_device(method: Callable[Concatenate[GLP, P], Tensor]) -> Callable[Concatenate[GLP, P], Tensor]:
    """Compute on the prior's device whatever device the arguments are on; the result is back on the first one's."""

    call: Callable[..., Tensor] = method

    @wraps(method)
    def moved(glp: GLP, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        def here(value: Any) -> Any:
            return value.to(glp.device) if isinstance(value, Tensor) else value

        given = args[0] if args else kwargs.get("x", kwargs.get("z_t"))
        result = call(glp, *map(here, args), **{name: here(value) for name, value in kwargs.items()})
        return result.to(given.device) if isinstance(given, Tensor) else result

    return moved


class GLP(Attachable):
    """A generative latent prior over a language model's activations at `hookpoints`.

    Activations may be on any device: methods compute where the prior is and give the result back where they were.
    `provenance` is corpus, training summary and versions, as JSON-ready values.

    Examples:
        >>> glp = lp.GLP.from_pretrained("runs/prior")
        >>> x = glp.sample(4, steps=8, generator=0)  # raw activations [4, d]
        >>> closer = glp.project(x + 1, t_start=0.5, generator=0)  # back to where activations live
        >>> closer.shape == x.shape, glp.score(x, generator=0).shape
        (True, torch.Size([4]))
    """

    def __init__(
        self,
        denoiser: Denoiser,
        normalizer: Normalizer,
        hookpoints: Sequence[Hookpoint] = (),
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if denoiser.config.d_input != normalizer.width:
            raise InputError(f"denoiser of width {denoiser.config.d_input}, statistics of width {normalizer.width}")
        self.denoiser = denoiser
        self.normalizer = normalizer
        self.hookpoints = tuple(hookpoints)
        self.provenance = dict(provenance or {})

    def __repr__(self) -> str:
        shape, size = self.denoiser.config, sum(p.numel() for p in self.denoiser.parameters())
        layers = self.normalizer.layers.tolist()
        place = f"{self.hookpoints[0].model or 'some model'} layers {layers}" if self.hookpoints else "some model"
        blocks = f"{shape.n_layers} blocks, d_model {shape.d_model}, {size / 1e6:.1f} M parameters"
        return f"GLP({place}, width {self.width}: {blocks})"

    @property
    def width(self) -> int:
        return self.normalizer.width

    @property
    def device(self) -> torch.device:
        return self.normalizer.mean.device

    def cast(self, dtype: torch.dtype) -> GLP:
        """The denoiser's weights in `dtype`, in place; statistics and the flow's state stay float32."""
        self.denoiser.to(dtype)
        return self

    @_on_priors_device
    def velocity(
        self, z_t: Float[Tensor, "*n d"], t: Float[Tensor, " ..."] | float, layer: Layer = None
    ) -> Float[Tensor, "*n d"]:
        """Velocity ``u_hat(z_t, t)`` at standardised `z_t` [..., d]; `t` is a scalar or [...]."""
        self.normalizer.check_width(z_t)
        times, layers = self._times(t, z_t.shape[:-1]), self._layers(layer, z_t.shape[:-1])
        return self.denoiser(z_t.reshape(-1, self.width), times, layers).reshape(z_t.shape)

    @_on_priors_device
    def loss(
        self,
        x: Float[Tensor, "*n d"],
        *,
        t: Float[Tensor, " ..."] | float | None = None,
        noise: Float[Tensor, "*n d"] | None = None,
        layer: Layer = None,
        generator: Seed = None,
    ) -> Float[Tensor, ""]:
        """The training loss ``mean((u_hat(z_t, t) - (eps - z_0))^2)`` (paper, flow matching), differentiable.

        Times left out are drawn from the official training grid. Losses that are to be compared need the same seed, or
        the same `t` and `noise`.
        """
        z_0 = self.normalizer.normalize(x, layer).reshape(-1, self.width)
        if t is None:
            generator = generator_of(generator)  # goes on to draw the noise
            t = flow.training_times(torch.rand(x.shape[:-1], generator=generator, device=generator.device))
        t = self._times(t, x.shape[:-1])
        eps = self._noise(x.shape, noise, generator).reshape(z_0.shape)
        predicted = self.denoiser(flow.interpolate(z_0, eps, t), t, self._layers(layer, x.shape[:-1]))
        return F.mse_loss(predicted, flow.target(z_0, eps))

    @_on_priors_device
    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        steps: int = 20,
        solver: Solver = "euler",
        grid: Grid = "uniform",
        noise: Float[Tensor, "n d"] | None = None,
        layer: Layer = None,
        generator: Seed = None,
    ) -> Float[Tensor, "n d"]:
        """Draw `n` raw activations [n, d] by integrating the flow from noise (t = 1) to data (t = 0).

        Args:
            steps: denoiser evaluations; see `nfe`.
            solver: euler, midpoint, heun or ab2.
            grid: "uniform", or "official" for the official sampler's times bit for bit.
            noise: standardised noise to start from.
            layer: which layer, for a multi-layer prior: a number, or [n].
        """
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")
        start = self._noise((n, self.width), noise, generator)
        schedule = flow.schedule(steps, solver=solver, grid=grid)
        layers = self._layers(layer, (n,))
        return self.normalizer.denormalize(self.denoiser.integrate(start, schedule, layers), layers)

    @_on_priors_device
    @torch.no_grad()
    def project(
        self,
        x: Float[Tensor, "*n d"],
        *,
        reference: Float[Tensor, "*n d"] | None = None,
        t_start: float = 0.5,
        steps: int = 4,
        solver: Solver = "euler",
        grid: Grid = "uniform",
        noise: Float[Tensor, "*n d"] | None = None,
        layer: Layer = None,
        generator: Seed = None,
        hold: Float[Tensor, "*m d"] | None = None,
    ) -> Float[Tensor, "*n d"]:
        """Bring activations back to where the language model's activations live (paper, on-manifold steering).

        Standardise, noise to `t_start`, integrate back to 0, de-standardise. Larger `t_start` corrects more and keeps
        less. Attention sinks (norm over 10 times the training median) come back untouched, and so does everything at
        ``t_start=0``. The result has `x`'s dtype. Other arguments are as in `sample`.

        Args:
            reference: the activations before they were edited. Then the answer is
                ``reference + project(x) - project(reference)`` with the same noise: what projecting costs an unedited
                activation cancels, and an edit of zero changes nothing.
            t_start: noise level to start from, 0 (data) to 1 (noise).
            steps: denoiser evaluations (as the official code counts them with ``grid="official"``); see `nfe`.
            hold: directions [d] or [..., d]; the result has the component along them that `x` has (and the projected
                reference that of the reference), while the flow adapts all others to it.
        """
        schedule = flow.schedule(steps, t_start=t_start, solver=solver, grid=grid)
        self.normalizer.check_width(x)
        shape, flat = x.shape, x.reshape(-1, x.shape[-1])
        layers = self._layers(layer, shape[:-1])
        if t_start == 0:
            return x.clone()
        eps = self._noise(shape, noise, generator).reshape(flat.shape)
        keep = self.normalizer.sinks(flat, layers)
        held = None if hold is None else _by_row("hold", torch.atleast_1d(hold), shape).reshape(flat.shape)
        if reference is None:
            projected = self._project(flat, eps, schedule, layers, held)
        else:
            if reference.shape != shape:
                raise InputError(f"reference has shape {tuple(reference.shape)}, x has {tuple(shape)}")
            clean = reference.reshape(flat.shape)
            keep = keep | self.normalizer.sinks(clean, layers)
            keep = keep | (flat == clean).all(dim=-1)  # exact, while two rows of one product may round differently
            both_layers = None if layers is None else layers if layers.ndim == 0 else layers.repeat(2)
            both_held = None if held is None else held.repeat(2, 1)
            both = self._project(torch.cat([flat, clean]), eps.repeat(2, 1), schedule, both_layers, both_held)
            edited, unedited = both.chunk(2)
            projected = clean + (edited - unedited)
        return torch.where(keep[:, None], flat, projected.to(x.dtype)).reshape(shape)

    @_on_priors_device
    @torch.no_grad()
    def features(
        self,
        x: Float[Tensor, "*n d"],
        *,
        t: Float[Tensor, " ..."] | float = 0.1,
        noise: Float[Tensor, "*n d"] | None = None,
        layer: Layer = None,
        generator: Seed = None,
    ) -> Float[Tensor, "*n blocks d_mlp"]:
        """Meta-neurons of raw activations: the post-gate hidden units of every block.

        One denoiser pass at noise level `t`, a scalar or [...] (paper, 1-D probing: t = 0.1 with fixed noise). Features
        that are to be compared need the same seed or `noise`.
        """
        z_0 = self.normalizer.normalize(x, layer).reshape(-1, self.width)
        eps = self._noise(x.shape, noise, generator).reshape(z_0.shape)
        times = self._times(t, x.shape[:-1])
        z_t = flow.interpolate(z_0, eps, times)
        factors = self.denoiser.row_factors(times, self._layers(layer, x.shape[:-1]))
        stacked = torch.stack(list(self.denoiser.units(z_t, factors)), dim=1)
        return stacked.reshape(*x.shape[:-1], *stacked.shape[1:])

    @_on_priors_device
    @torch.no_grad()
    def score(
        self,
        x: Float[Tensor, "*n d"],
        *,
        times: Sequence[float] = SCORE_TIMES,
        layer: Layer = None,
        generator: Seed = None,
    ) -> Float[Tensor, "*n"]:
        """How unusual each activation is: its own denoising loss, ``mean_d (u_hat(z_t, t) - (eps - z_0))^2``.

        The mean over `times`, one noise and one denoiser pass each: near the held-out loss for ordinary activations,
        larger off the data. Scores that are to be compared need the same seed: then row i has the same noise in every
        call of as many rows.
        """
        z_0 = self.normalizer.normalize(x, layer).reshape(-1, self.width)
        layers, generator = self._layers(layer, x.shape[:-1]), generator_of(generator)
        total = torch.zeros(len(z_0), device=z_0.device)
        for t in times:
            eps = self._noise(z_0.shape, None, generator)
            z_t = flow.interpolate(z_0, eps, t)
            predicted = self.denoiser(z_t, torch.tensor(t, device=z_0.device), layers)
            total += (predicted - flow.target(z_0, eps)).square().mean(dim=-1)
        return (total / len(times)).reshape(x.shape[:-1])

    @staticmethod
    def nfe(steps: int, *, t_start: float = 1.0, solver: Solver = "euler", grid: Grid = "uniform") -> int:
        """Denoiser evaluations that `sample` (``t_start=1``) or `project` executes for each activation."""
        schedule = flow.schedule(steps, t_start=t_start, solver=solver, grid=grid)
        return schedule.nfe if t_start > 0 else 0

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a model card into the folder `path`.

        `dtype` is that of the denoiser's weights in the file, their own by default: bfloat16 halves it, and
        `from_pretrained` gives float32 again. Statistics stay float32.
        """
        parts = pretrained.Parts(self.denoiser, self.normalizer, self.hookpoints, self.provenance)
        pretrained.write(Path(path), parts, dtype=dtype)
        return Path(path)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        checkpoint: str = "final",
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GLP:
        """Load a prior by the name of an installed one, such as "smollm2-135m-layer15", from a folder, or from the Hub.

        Folders and repositories may be of this project's format or the official one; an existing folder comes first.
        `checkpoint` is "final" or the name of one under ``checkpoints/``; `dtype` is that of the denoiser's weights, by
        default the one that they had when they were saved: float32 for this project's installed priors.
        """
        folder = pretrained.fetch(path_or_repo, revision=revision, checkpoint=checkpoint)
        parts = pretrained.read(folder, checkpoint)
        glp = cls(parts.denoiser, parts.normalizer, parts.hookpoints, parts.provenance)
        if dtype is not None:
            glp.cast(dtype)
        return glp.to(device or "cpu").eval().requires_grad_(False)

    def push_to_hub(self, repo: str, *, private: bool = False, revision: str | None = None) -> str:
        """Save to a temporary folder and upload it to the Hub repository `repo`; returns the commit's address."""
        return upload(self.save_pretrained, repo, private=private, revision=revision)

    def _noise(self, shape: Sequence[int], noise: Tensor | None, generator: Seed) -> Tensor:
        if noise is None:
            return normal(*shape, seed=generator, device=self.device)
        if tuple(noise.shape) != tuple(shape):
            raise InputError(f"noise has shape {tuple(noise.shape)}, activations have {tuple(shape)}")
        return noise.to(self.device, torch.float32)

    def _times(self, t: Tensor | float, leading: Sequence[int]) -> Tensor:
        return _by_row("t", torch.as_tensor(t, dtype=torch.float32, device=self.device), leading)

    def _layers(self, layer: Layer, leading: Sequence[int]) -> Tensor | None:
        """Layer numbers as the denoiser wants them: None, a scalar, or one for each row."""
        self.normalizer.rows(layer)  # refuses a layer without statistics, and none where it is needed
        if self.denoiser.layer_embed is None:
            return None
        layers = self.normalizer.layers[0] if layer is None else torch.as_tensor(layer, device=self.device)
        return _by_row("layer", layers, leading)

    def _project(
        self, x: Tensor, eps: Tensor, schedule: flow.Schedule, layers: Tensor | None, held: Tensor | None
    ) -> Tensor:
        """Standardise, noise to the first knot, integrate, de-standardise: [N, d] -> [N, d]."""
        z_0 = self.normalizer.normalize(x, layers)
        z = flow.interpolate(z_0, eps, schedule.knots[0])
        if held is None:
            return self.normalizer.denormalize(self.denoiser.integrate(z, schedule, layers), layers)
        g = self.normalizer.covector(held.to(z), layers).expand_as(z)
        value = (g * z_0).sum(dim=-1)
        z = self.denoiser.integrate(z, schedule, layers, (g, value))
        return self.normalizer.denormalize(flow.hold(z, g, value), layers)  # solvers but Euler end a little beside it


def _by_row(name: str, value: Tensor, leading: Sequence[int]) -> Tensor:
    """`value` itself if it is a scalar, else one entry for each activation of shape [*leading, d]: [N]."""
    if value.ndim == 0:
        return value
    try:
        return value.expand(*leading).reshape(-1)
    except RuntimeError as error:
        raise InputError(f"{name} has shape {list(value.shape)}, activations have {list(leading)}") from error
