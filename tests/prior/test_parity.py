"""Every golden value of the official implementation, and the multi-layer rule, to 1e-5 relative in float32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from latentprior.config import DenoiserConfig
from latentprior.lm.hooks import Hookpoint
from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.prior.official.checkpoint import write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "official-single-layer"
TOLERANCE = 1e-5


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    """Largest difference relative to the largest entry."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def glp() -> GLP:
    return GLP.from_pretrained(GOLDEN)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def test_every_golden_value_has_its_test(golden: dict[str, Tensor]):
    inputs = {"activations", "noise", "t", "train_t", "meta_neurons_u0.9_t"}
    sampled = {f"sample_{n}_steps" for n in (1, 4, 20)}
    projected = {f"project_{u}_20_steps{end}" for u in ("u0.5", "u0.25") for end in ("", "_start_t")}
    trained = {"train_noisy", "train_target", "train_loss"}
    assert set(golden) == inputs | sampled | projected | trained | {"standardized", "velocity", "meta_neurons_u0.9"}


def test_standardized(glp: GLP, golden: dict[str, Tensor]):
    assert_agrees(glp.normalizer.normalize(golden["activations"]), golden["standardized"])
    assert_agrees(glp.normalizer.denormalize(golden["standardized"]), golden["activations"])


def test_velocity(glp: GLP, golden: dict[str, Tensor]):
    assert_agrees(glp.velocity(golden["standardized"], golden["t"]), golden["velocity"])


def test_training(glp: GLP, golden: dict[str, Tensor]):
    z_0, noise, t = golden["standardized"], golden["noise"], golden["train_t"]
    assert_agrees(flow.interpolate(z_0, noise, t), golden["train_noisy"])
    assert_agrees(flow.target(z_0, noise), golden["train_target"])
    assert_agrees(glp.loss(golden["activations"], t=t, noise=noise)[None], golden["train_loss"])


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_sampling(glp: GLP, golden: dict[str, Tensor], steps: int):
    sample = glp.sample(6, steps=steps, grid="official", noise=golden["noise"])
    assert_agrees(glp.normalizer.normalize(sample), golden[f"sample_{steps}_steps"])
    assert glp.nfe(steps, grid="official") == steps


@pytest.mark.parametrize(("u", "t_start", "nfe"), [("u0.5", 0.5, 10), ("u0.25", 0.75, 15)])
def test_projection(glp: GLP, golden: dict[str, Tensor], u: str, t_start: float, nfe: int):
    projected = glp.project(golden["activations"], t_start=t_start, steps=20, grid="official", noise=golden["noise"])
    assert_agrees(projected, golden[f"project_{u}_20_steps"])
    first = flow.schedule(20, t_start=t_start, grid="official").knots[0]
    assert torch.equal(torch.tensor([first]), golden[f"project_{u}_20_steps_start_t"])  # bit for bit
    assert glp.nfe(20, t_start=t_start, grid="official") == nfe


def test_meta_neurons(glp: GLP, golden: dict[str, Tensor]):
    (t,) = set(golden["meta_neurons_u0.9_t"].tolist())
    features = glp.features(golden["activations"], t=t, noise=golden["noise"])
    assert_agrees(features, golden["meta_neurons_u0.9"])


# -- a multi-layer prior -------------------------------------------------------------------------------------------

CONFIG = DenoiserConfig(d_input=8, d_model=16, d_mlp=24, n_layers=2, multi_layer_n_layers=6)


def official_velocity(weights: dict[str, Tensor], z_t: Tensor, t: Tensor, layer: Tensor) -> Tensor:
    """The rule of the official denoiser written down directly: time and layer embeddings are added, then projected."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def embed(name: str, value: Tensor) -> Tensor:
        angles = torch.stack([value / 10_000 ** (i / 8) for i in range(8)], dim=1)
        return linear(f"{name}.2", F.silu(linear(f"{name}.0", torch.cat([angles.cos(), angles.sin()], dim=1))))

    e = embed("time_embed", 1000 * t) + embed("layer_embed", layer / (6 - 1))
    x = linear("in_proj", z_t)
    for block in ("layers.0", "layers.1"):
        h = norm(f"{block}.ln", x)
        gate = F.silu(linear(f"{block}.gate_proj", h) * linear(f"{block}.time_proj", e))
        x = x + linear(f"{block}.down_proj", gate * linear(f"{block}.up_proj", h))
    return linear("out_proj", norm("ln", x))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Denoiser(CONFIG).state_dict().items()}
    weights = {name: torch.randn(s, generator=generator) / math.sqrt(s[-1]) for name, s in shapes.items()}
    weights["layer_embed.2.weight"] *= 20  # so that layers differ by far more than the tolerance
    return weights


@pytest.fixture(scope="module")
def statistics() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 8, generator=generator), torch.rand(6, 8, generator=generator) + 0.1


@pytest.fixture(scope="module")
def multi(tmp_path_factory, weights: dict[str, Tensor], statistics: tuple[Tensor, Tensor]) -> GLP:
    """A multi-layer prior, written and read in the official format."""
    mean, var = statistics
    hookpoints = [Hookpoint("a/model", layer, 8, path=f"model.layers.{layer}") for layer in range(6)]
    folder = tmp_path_factory.mktemp("multi")
    write_checkpoint(folder, config=CONFIG, weights=weights, mean=mean, var=var, hookpoints=hookpoints)
    return GLP.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise, t and layer of 32 rows: every layer, repeated times."""
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 32, 8, generator=generator)
    return x, noise, torch.randint(1, 11, (32,), generator=generator) / 10, torch.arange(32) % 6


def test_multi_layer_prior_is_read_back_identically(
    multi: GLP, weights: dict[str, Tensor], statistics: tuple[Tensor, Tensor]
):
    state = multi.denoiser.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    assert torch.equal(multi.normalizer.mean, statistics[0]) and torch.equal(multi.normalizer.var, statistics[1])
    assert [h.layer for h in multi.hookpoints] == multi.normalizer.layers.tolist() == list(range(6))


def test_layer_embedding_rule(multi: GLP, weights: dict[str, Tensor], rows: tuple[Tensor, ...]):
    z_t, _, t, layer = rows
    expected = official_velocity(weights, z_t, t, layer)
    assert_agrees(multi.velocity(z_t, t, layer), expected)
    for i in (0, 5):  # a scalar layer and time, the path that sampling takes
        everywhere = torch.full((32,), i)
        half = torch.full((32,), 0.5)
        assert_agrees(multi.velocity(z_t, 0.5, i), official_velocity(weights, z_t, half, everywhere))
    swapped = official_velocity(weights, z_t, t, 5 - layer)
    assert (swapped - expected).abs().max() > 1000 * TOLERANCE * expected.abs().max()  # the layer matters


def test_multi_layer_projection_standardises_each_row_by_its_layer(
    multi: GLP, weights: dict[str, Tensor], statistics: tuple[Tensor, Tensor], rows: tuple[Tensor, ...]
):
    x, noise, _, layer = rows
    mean, std = statistics[0][layer], statistics[1][layer].sqrt()
    knots = [1 - i * 0.999 / 7 for i in range(8)][4:] + [0.0]
    z = (1 - knots[0]) * (x - mean) / std + knots[0] * noise
    for t, t_next in zip(knots, knots[1:], strict=False):
        z = z + (t_next - t) * official_velocity(weights, z, torch.full((32,), t), layer)
    projected = multi.project(x, t_start=0.5, steps=8, grid="official", noise=noise, layer=layer)
    assert_agrees(projected, z * std + mean)
    one = multi.project(x[:1], t_start=0.5, steps=8, grid="official", noise=noise[:1], layer=int(layer[0]))
    assert_agrees(one, projected[:1])
