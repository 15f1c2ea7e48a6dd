"""`GLP`: shapes, repeatability, repair, several layers, and its files."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentprior.config import EMBEDDED, GRIDS, SOLVERS
from latentprior.data.moments import Covariance, Moments
from latentprior.prior import flow
from latentprior.prior.files import fetch
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.utils import hub
from latentprior.utils.errors import InputError

D = 8
GOLDEN = Path(__file__).parents[1] / "golden" / "official-single-layer"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NETWORKS = {"paper": {}, "skip and norms": {"skip": "normal", "modulation": "norm"}}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS)
def glp(request, tiny_glp) -> GLP:
    return tiny_glp(D, **request.param)


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS)
def several(request, tiny_glp) -> GLP:
    """A prior of layers 0, 2 and 3 of four."""
    return tiny_glp(D, (0, 2, 3), **request.param)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch):
    """As outside of tests, where no shape is checked before our own validation."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def count_evaluations(glp: GLP, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass through the denoiser from now on."""
    rows: list[int] = []
    run = glp.denoiser.run

    def counted(z_t, *args, **options):
        rows.append(len(z_t))
        return run(z_t, *args, **options)

    monkeypatch.setattr(glp.denoiser, "run", counted)
    return rows


# shapes and dtypes


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0)])
def test_leading_dimensions_are_free(glp, leading):
    x, n = draw(*leading, D), max(1, torch.Size(leading).numel())
    noise = draw(*leading, D, seed=1)
    flat = {"x": x.reshape(-1, D), "noise": noise.reshape(-1, D)}
    repaired = glp.project(x, noise=noise)
    assert repaired.shape == x.shape
    torch.testing.assert_close(repaired.reshape(-1, D), glp.project(flat["x"], noise=flat["noise"]))
    features = glp.features(x, noise=noise)
    assert features.shape == (*leading, 2, 4 * D)
    torch.testing.assert_close(features.reshape(-1, 2, 4 * D), glp.features(flat["x"], noise=flat["noise"]))
    assert glp.velocity(x, 0.3).shape == x.shape
    if x.numel():
        t = torch.linspace(0.1, 0.9, n).reshape(leading)
        loss = glp.loss(x, t=t, noise=noise)
        assert loss.shape == ()
        torch.testing.assert_close(loss, glp.loss(flat["x"], t=t.reshape(-1), noise=flat["noise"]))
        torch.testing.assert_close(glp.velocity(x, t).reshape(-1, D), glp.velocity(flat["x"], t.reshape(-1)))
        assert glp.loss(x).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_activations(glp, dtype):
    x = draw(4, D).to(dtype)
    exact = glp.project(x.double(), generator=0)
    assert exact.dtype == torch.float64
    for reference in (None, x - 1):
        assert glp.project(x, reference=reference).dtype == dtype
    torch.testing.assert_close(glp.project(x, generator=0), exact.to(dtype), atol=1e-5, rtol=1e-2)


def test_low_precision_weights(glp):
    rounded = copy.deepcopy(glp).cast(torch.bfloat16)
    assert rounded.denoiser.dtype == torch.bfloat16 and rounded.normalizer.mean.dtype == torch.float32
    x = draw(64, D)
    assert rounded.project(x).dtype == rounded.sample(3).dtype == torch.float32
    found, expected = (prior.project(x, generator=0) for prior in (rounded, glp))
    assert F.mse_loss(found, expected) < 1e-3 * F.mse_loss(x, expected)


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to like a tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "to a device and bfloat16": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a model"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_reach_the_denoiser_and_leave_the_statistics_exact(tiny_glp, cast, inside, whiten):
    glp = tiny_glp(D, (0, 2))
    glp = whitened(glp) if whiten else glp
    before = {name: tensor.clone() for name, tensor in glp.normalizer.named_buffers()}
    z = glp.normalizer.normalize(draw(4, D), 2)
    probe = cast(torch.nn.Linear(1, 1))
    cast(torch.nn.ModuleDict({"prior": glp}) if inside else glp)
    assert {p.dtype for p in glp.denoiser.parameters()} == {probe.weight.dtype}
    for name, tensor in glp.normalizer.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor.nan_to_num(-1), before[name].nan_to_num(-1))
    assert torch.equal(glp.normalizer.normalize(draw(4, D), 2), z)
    assert glp.sample(2, layer=0).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-3), (torch.float64, 1e-9)])
def test_cast_priors_compute_what_the_exact_one_does(glp, dtype, tolerance):
    x, rounded = draw(64, D), copy.deepcopy(glp).to(dtype)
    found, expected = (prior.project(x, generator=0) for prior in (rounded, glp))
    assert F.mse_loss(found, expected) < tolerance * F.mse_loss(x, expected)
    assert rounded.score(x, generator=0).dtype == torch.float32


def test_float16_is_not_written(tiny_glp, tmp_path):
    glp = tiny_glp(D)
    glp.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="float16.*bfloat16"):
        tiny_glp(D).half().save_pretrained(tmp_path)
    assert_equal(GLP.from_pretrained(tmp_path), glp)


def test_a_moved_prior_takes_its_statistics_along(tiny_glp):
    glp = tiny_glp(D).to("meta", torch.bfloat16)
    assert {(b.device.type, b.dtype) for b in glp.normalizer.buffers()} == {
        ("meta", torch.float32), ("meta", torch.int64)
    }  # fmt: skip


# what the methods compute


def test_loss_is_the_papers(glp):
    x, noise, t = draw(6, D), draw(6, D, seed=1), torch.linspace(0.05, 0.95, 6)
    z_0 = glp.normalizer.normalize(x)
    z_t = (1 - t[:, None]) * z_0 + t[:, None] * noise
    expected = (glp.velocity(z_t, t) - (noise - z_0)).square().mean()
    torch.testing.assert_close(glp.loss(x, t=t, noise=noise), expected)
    torch.testing.assert_close(glp.loss(x, t=0.5, noise=noise), glp.loss(x, t=torch.full((6,), 0.5), noise=noise))


def test_loss_trains_the_denoiser(tiny_glp):
    glp = tiny_glp(D).requires_grad_(True)
    glp.loss(draw(16, D)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in glp.denoiser.parameters())


def test_loss_draws_times_over_the_whole_range(glp, monkeypatch):
    seen = []
    interpolate = flow.interpolate
    monkeypatch.setattr(flow, "interpolate", lambda z, e, t: seen.append(t) or interpolate(z, e, t))
    glp.loss(draw(2000, D))
    assert seen[0].min() < 0.01 and seen[0].max() > 0.99 and abs(float(seen[0].mean()) - 0.5) < 0.03


def test_sample_is_euler_from_noise(glp):
    noise = draw(3, D)
    z = noise
    for i in range(5):
        z = z - 0.2 * glp.velocity(z, 1 - 0.2 * i)
    torch.testing.assert_close(glp.sample(3, steps=5, noise=noise), glp.normalizer.denormalize(z))


def test_project_is_noise_and_euler_back(glp):
    x, noise = draw(3, D), draw(3, D, seed=1)
    z = 0.4 * glp.normalizer.normalize(x) + 0.6 * noise
    for i in range(3):
        z = z - 0.2 * glp.velocity(z, 0.6 - 0.2 * i)
    found = glp.project(x, t_start=0.6, steps=3, noise=noise)
    torch.testing.assert_close(found, glp.normalizer.denormalize(z), atol=1e-5, rtol=1e-5)


def test_features_are_the_inputs_of_down_proj(glp, monkeypatch):
    x, noise = draw(5, D), draw(5, D, seed=1)
    z_t = 0.9 * glp.normalizer.normalize(x) + 0.1 * noise
    seen = []
    hooks = [b.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for b in glp.denoiser.layers]
    glp.velocity(z_t, 0.1)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(glp.features(x, noise=noise), torch.stack(seen, dim=1))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.sampled_from(SOLVERS),
    st.sampled_from(GRIDS),
    st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
)
def test_nfe_is_what_runs(glp, steps, solver, grid, t_start):
    options = {"steps": steps, "solver": solver, "grid": grid}
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows = count_evaluations(glp, monkeypatch)
        glp.sample(2, **options)
        assert len(rows) == glp.nfe(**options)
        rows.clear()
        glp.project(draw(2, D), t_start=t_start, **options)
        assert len(rows) == glp.nfe(t_start=t_start, **options)
    if grid == "uniform":
        assert glp.nfe(**options) == steps


def test_the_time_path_runs_once_for_all_steps(glp):
    rows = []
    hook = glp.denoiser.time_embed.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    glp.sample(3000, steps=6)
    hook.remove()
    assert rows == [6]


# repeatability


CALLS = {
    "sample": lambda glp, **o: glp.sample(4, **o),
    "project": lambda glp, **o: glp.project(draw(4, D), **o),
    "features": lambda glp, **o: glp.features(draw(4, D), **o),
    "loss": lambda glp, **o: glp.loss(draw(4, D), **o),
    "score": lambda glp, **o: glp.score(draw(4, D), **o),
}
TAKES_NOISE = [call for name, call in CALLS.items() if name != "score"]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_seed_gives_the_same_answer_before_and_after_any_other_call(glp, call):
    state = torch.get_rng_state()
    first = call(glp, generator=0)
    for other in CALLS.values():
        other(glp, generator=5)
    assert torch.equal(call(glp, generator=0), first)
    assert not torch.equal(call(glp, generator=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in CALLS.values():
        other(glp)
    assert torch.equal(call(glp, generator=0), first)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_a_seed_every_call_is_fresh_and_torchs_seed_rules_it(glp, call):
    torch.manual_seed(1)
    first, second = call(glp), call(glp)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(glp), first) and torch.equal(call(glp), second)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_generator_is_a_seed_that_advances(glp, call):
    generator = torch.Generator().manual_seed(3)
    first, second = call(glp, generator=generator), call(glp, generator=generator)
    assert torch.equal(first, call(glp, generator=3)) and not torch.equal(first, second)


@pytest.mark.parametrize("call", TAKES_NOISE)
def test_given_noise_decides(glp, call):
    state = torch.get_rng_state()
    options = {"noise": draw(4, D, seed=9)} | ({"t": 0.3} if call is CALLS["loss"] else {})
    assert torch.equal(call(glp, generator=1, **options), call(glp, generator=2, **options))
    assert not torch.equal(call(glp, **options), call(glp, **options | {"noise": draw(4, D, seed=8)}))
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_change_nothing_beyond_rounding(glp, several):
    x, noise = draw(2500, D), draw(2500, D, seed=1)
    whole = glp.project(x, noise=noise)
    torch.testing.assert_close(whole[::500], glp.project(x[::500], noise=noise[::500]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(glp.sample(2500, noise=noise)[2400:], glp.sample(100, noise=noise[2400:]))
    layer = torch.tensor([0, 2, 3, 2, 0]).repeat(500)
    whole = several.project(x, noise=noise, layer=layer, reference=x - 1)
    part = slice(2000, 2100)
    expected = several.project(x[part], noise=noise[part], layer=layer[part], reference=x[part] - 1)
    torch.testing.assert_close(whole[part], expected, atol=1e-5, rtol=1e-5)


# repair


def test_no_noise_is_the_identity(glp):
    x = draw(5, D)
    found = glp.project(x, t_start=0.0)
    assert torch.equal(found, x)
    found.zero_()
    assert x.any()


def test_more_noise_moves_further(glp):
    x = draw(500, D)
    moved = [float((glp.project(x, t_start=t) - x).norm(dim=1).mean()) for t in (0.05, 0.2, 0.5, 0.8, 1.0)]
    assert moved == sorted(moved) and moved[0] < 0.3 * moved[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 1030])
def test_paired_repair_of_no_edit_is_exact(glp, dtype, n):
    x = draw(n, D).to(dtype)
    assert torch.equal(glp.project(x, reference=x.clone(), t_start=0.9), x)
    edited = x.clone()
    edited[0] += 1
    found = glp.project(edited, reference=x)
    assert torch.equal(found[1:], x[1:]) and not torch.equal(found[0], x[0])


def test_paired_repair_of_no_edit_is_exact_even_if_products_round_by_position(glp, monkeypatch):
    x, run = draw(8, D), glp.denoiser.run
    monkeypatch.setattr(glp.denoiser, "run", lambda z, *a, **k: run(z, *a, **k) + 1e-6 * torch.arange(len(z))[:, None])
    assert torch.equal(glp.project(x, reference=x.clone()), x)


def test_paired_repair_is_its_definition(glp):
    x, noise = draw(6, D), draw(6, D, seed=1)
    edited = x + 2 * draw(D, seed=2)
    found = glp.project(edited, reference=x, noise=noise)
    expected = x + glp.project(edited, noise=noise) - glp.project(x, noise=noise)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sinks_come_back_bit_for_bit(glp):
    x = draw(6, D)
    x[2] *= 1e5
    found = glp.project(x)
    moved = (found != x).any(dim=1)
    assert moved.tolist() == [True, True, False, True, True, True]
    edited = x + 1
    edited[2] /= 1e5  # a sink was edited away,
    edited[4] *= 1e5  # and an edit made another
    found = glp.project(edited, reference=x)
    assert torch.equal(found[[2, 4]], edited[[2, 4]]) and not (found == edited).all(dim=1)[[0, 1, 3, 5]].any()


def test_arguments_are_not_written_to(glp):
    x, reference, noise = draw(4, D), draw(4, D, seed=1), draw(4, D, seed=2)
    copies = x.clone(), reference.clone(), noise.clone()
    glp.project(x, reference=reference, noise=noise)
    glp.loss(x, noise=noise), glp.features(x, noise=noise), glp.sample(4, noise=noise)
    assert all(map(torch.equal, (x, reference, noise), copies))


# several layers


def test_each_row_goes_by_its_layer(several):
    layer = torch.tensor([[3, 0, 2], [2, 2, 0]])
    x, noise, t = draw(2, 3, D), draw(2, 3, D, seed=1), torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    reference = x - 1
    found = {
        "velocity": several.velocity(x, t, layer),
        "project": several.project(x, noise=noise, layer=layer),
        "paired": several.project(x, reference=reference, noise=noise, layer=layer),
        "features": several.features(x, noise=noise, layer=layer),
        "sample": several.sample(6, noise=noise.reshape(6, D), layer=layer.reshape(6)).reshape(2, 3, D),
    }
    losses = []
    for i in range(2):
        for j in range(3):
            one = {"noise": noise[i, j], "layer": int(layer[i, j])}
            expected = {
                "velocity": several.velocity(x[i, j], t[i, j], one["layer"]),
                "project": several.project(x[i, j], **one),
                "paired": several.project(x[i, j], reference=reference[i, j], **one),
                "features": several.features(x[i, j], **one),
                "sample": several.sample(1, noise=noise[i, j][None], layer=one["layer"])[0],
            }
            for name, value in expected.items():
                torch.testing.assert_close(found[name][i, j], value, atol=1e-5, rtol=1e-5, msg=name)
            losses.append(several.loss(x[i, j], t=t[i, j], **one))
    torch.testing.assert_close(several.loss(x, t=t, noise=noise, layer=layer), torch.stack(losses).mean())
    assert not torch.allclose(several.project(x, noise=noise, layer=0), several.project(x, noise=noise, layer=2))


LAYERED = {
    "sample": lambda glp, layer: glp.sample(3, layer=layer, generator=0),
    "project": lambda glp, layer: glp.project(draw(3, D), layer=layer, generator=0),
    "identity": lambda glp, layer: glp.project(draw(3, D), layer=layer, t_start=0.0, generator=0),
    "features": lambda glp, layer: glp.features(draw(3, D), layer=layer, generator=0),
    "loss": lambda glp, layer: glp.loss(draw(3, D), layer=layer, generator=0),
    "velocity": lambda glp, layer: glp.velocity(draw(3, D), 0.5, layer),
}


@pytest.mark.parametrize("call", LAYERED.values(), ids=LAYERED)
def test_layers_are_checked_before_anything_runs(glp, several, call, monkeypatch):
    rows = [count_evaluations(prior, monkeypatch) for prior in (several, glp)]
    with pytest.raises(InputError, match=r"\[0, 2, 3\]"):
        call(several, None)
    for layer in (1, 4, -1, torch.tensor([0, 1, 2])):  # layer 1 exists in the model, but has no statistics
        with pytest.raises(InputError, match=r"unknown layer.*valid: 0, 2, 3"):
            call(several, layer)
    with pytest.raises(InputError, match="unknown layer '2'.*valid: 1"):
        call(glp, 2)
    assert rows == [[], []]
    assert torch.equal(call(glp, 1), call(glp, None))


def test_a_multi_layer_prior_with_statistics_of_one_layer(tiny_glp):
    glp = tiny_glp(D, (2,), llm_layers=4)
    for call in LAYERED.values():
        assert torch.equal(call(glp, None), call(glp, 2))


# messages


WRONG = {
    "width": (lambda g: g.project(draw(3, D + 1)), "width 9.*width 8"),
    "width, unchanged": (lambda g: g.project(draw(3, D + 1), t_start=0.0), "width 9"),
    "width of velocity": (lambda g: g.velocity(draw(3, D + 1), 0.5), "width 9"),
    "width of features": (lambda g: g.features(draw(3, D + 1)), "width 9"),
    "width of loss": (lambda g: g.loss(draw(3, D + 1)), "width 9"),
    "noise": (lambda g: g.project(draw(3, D), noise=draw(2, D)), r"noise.*\(2, 8\).*\(3, 8\)"),
    "noise of sample": (lambda g: g.sample(3, noise=draw(2, D)), r"noise.*\(2, 8\)"),
    "reference": (lambda g: g.project(draw(3, D), reference=draw(2, D)), r"reference.*\(2, 8\)"),
    "layer": (lambda g: g.velocity(draw(3, D), 0.5, torch.tensor([0, 2])), r"layer.*\[2\].*\[3\]"),
    "t": (lambda g: g.loss(draw(3, D), t=torch.rand(2), layer=0), r"t has.*\[2\].*\[3\]"),
    "n": (lambda g: g.sample(0), "n must.*0"),
    "steps": (lambda g: g.sample(1, steps=0), "steps"),
    "solver": (lambda g: g.sample(1, solver="eulr"), "eulr.*euler"),
    "grid": (lambda g: g.project(draw(1, D), grid="offical"), "offical.*official"),
    "t_start": (lambda g: g.project(draw(1, D), t_start=1.5), "t_start"),
    "nfe": (lambda g: g.nfe(0, t_start=0.0), "steps"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused_in_one_line(tiny_glp, call, message):
    glp = tiny_glp(D, (0, 2)) if "layer" in message or "t has" in message else tiny_glp(D)
    with pytest.raises(InputError, match=message) as caught:
        call(glp)
    assert "\n" not in str(caught.value)


def test_parts_of_different_widths(glp, tiny_glp):
    with pytest.raises(InputError, match="8.*6"):
        GLP(glp.denoiser, tiny_glp(6).normalizer)


# files


@pytest.fixture
def saved(tiny_glp, tmp_path) -> Path:
    return tiny_glp(D, (0, 2), "someone/model").save_pretrained(tmp_path / "prior")


def assert_equal(a: GLP, b: GLP) -> None:
    assert a.denoiser.config == b.denoiser.config
    assert a.hookpoints == b.hookpoints and a.provenance == b.provenance
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other and x.dtype == y.dtype and torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)), name


@pytest.mark.compat
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_priors_are_equal(tiny_glp, tmp_path, layers, dtype):
    glp = tiny_glp(D, layers, "someone/model").cast(dtype)
    glp.normalizer.mean_norm.fill_(torch.nan)
    assert glp.save_pretrained(tmp_path / "new" / "prior") == tmp_path / "new" / "prior"
    loaded = GLP.from_pretrained(tmp_path / "new" / "prior")
    assert_equal(loaded, glp)
    options = {"layer": layers[0], "generator": 0}
    assert torch.equal(loaded.sample(3, **options), glp.sample(3, **options))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    names = {file.name for file in (tmp_path / "new" / "prior").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def whitened(glp: GLP) -> GLP:
    """The same prior with another normalizer, of strongly correlated activations."""
    layers = glp.normalizer.layers.tolist()
    x, layer = draw(400, D) @ (torch.eye(D) + draw(D, D, seed=1)), torch.tensor(layers).repeat(400)[:400]
    moments, products = Moments(layers, D), Covariance(layers, D)
    moments.update(x, layer)
    products.update(x, layer)
    normalizer = Normalizer.whitened(moments, products.covariance())
    return GLP(glp.denoiser, normalizer, glp.hookpoints, glp.provenance)


@pytest.mark.compat
@pytest.mark.parametrize(("own", "stored"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_weights_stored_in_another_precision_are_read_in_their_own(tiny_glp, tmp_path, own, stored):
    glp = tiny_glp(D, (0, 2), "someone/model").cast(own)
    loaded = GLP.from_pretrained(glp.save_pretrained(tmp_path, dtype=stored))
    state = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for name, weight in state.items() if name.startswith("denoiser")} == {stored}
    assert state["normalizer.mean"].dtype == torch.float32
    assert_equal(loaded, glp.cast(stored).cast(own))
    assert f"stored in {str(stored).removeprefix('torch.')}" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="float16"):
        glp.save_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.compat
def test_files_of_the_papers_network_are_as_before_and_others_say_what_departs(tiny_glp, tmp_path):
    shape = {"d_input": D, "d_model": 2 * D, "d_mlp": 4 * D, "n_layers": 2, "multi_layer_n_layers": None}
    for network in NETWORKS.values():
        glp = tiny_glp(D, **network)
        folder = glp.save_pretrained(tmp_path / str(len(network)))
        assert json.loads((folder / "config.json").read_text())["denoiser"] == shape | network
        torch.testing.assert_close(GLP.from_pretrained(folder).velocity(draw(5, D), 0.3), glp.velocity(draw(5, D), 0.3))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_whitened_priors_are_saved_and_loaded(tiny_glp, tmp_path, layers):
    glp = whitened(tiny_glp(D, layers, "someone/model"))
    loaded = GLP.from_pretrained(glp.save_pretrained(tmp_path))
    assert_equal(loaded, glp)
    x = draw(6, D)
    layer = None if len(layers) == 1 else torch.tensor(layers).repeat(3)
    options = {"layer": layer, "generator": 0}
    assert torch.equal(loaded.project(x, **options), glp.project(x, **options))
    plain = GLP(glp.denoiser, tiny_glp(D, layers).normalizer)
    assert not torch.allclose(plain.project(x, **options), glp.project(x, **options))


def test_a_reader_that_knows_no_whitening_refuses_a_whitened_prior(tiny_glp, tmp_path):
    plain, white = tiny_glp(D).save_pretrained(tmp_path / "a"), whitened(tiny_glp(D)).save_pretrained(tmp_path / "b")
    formats = [json.loads((folder / "config.json").read_text())["format"] for folder in (plain, white)]
    assert formats == [1, 2]


def test_a_whitened_prior_repairs_in_raw_space(tiny_glp):
    glp = whitened(tiny_glp(D))
    x = draw(6, D) + 3
    assert torch.equal(glp.project(x, t_start=0.0), x)
    assert torch.equal(glp.project(x, reference=x.clone()), x)
    nearly = glp.project(x, t_start=1e-4, steps=1)
    torch.testing.assert_close(nearly, x, atol=1e-2, rtol=0)


def test_the_card_says_what_it_was_trained_on(saved):
    card = (saved / "README.md").read_text()
    assert "| someone/model | 2 | output | 8 |" in card and '"corpus": "none"' in card


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("hookpoints", [True, False])
def test_the_cards_code_runs(tiny_glp, tiny_llm, tiny_tokenizer, tmp_path, layers, hookpoints):
    glp = tiny_glp(32, layers, "tiny-llama")
    if not hookpoints:
        glp.hookpoints = ()
    folder = glp.save_pretrained(tmp_path)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"model": tiny_llm(), "tokenizer": tiny_tokenizer}
    names["model"].generation_config.max_new_tokens = 3
    exec(code.replace("this folder or repository", str(folder)), names)
    assert names["activations"].shape == (16, 32) and ("attach" in code) == hookpoints


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_card_loads_an_embedded_model(tiny_glp, tmp_path, name):
    card = (tiny_glp(32, (1,), name).save_pretrained(tmp_path) / "README.md").read_text()
    assert "from latentprior import GLP, load_llm\n" in card and f'load_llm("{name}")' in card


def test_a_prior_without_provenance(glp, tmp_path):
    bare = GLP(glp.denoiser, glp.normalizer)
    loaded = GLP.from_pretrained(bare.save_pretrained(tmp_path))
    assert loaded.hookpoints == () and loaded.provenance == {}


def test_saving_over_a_prior_replaces_it(saved, tiny_glp):
    other = tiny_glp(D, seed=5)
    other.save_pretrained(saved)
    assert_equal(GLP.from_pretrained(saved), other)


def test_a_prior_that_cannot_be_written_leaves_the_old_one(saved, tiny_glp):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    other = tiny_glp(D, seed=5)
    other.provenance["when"] = object()
    with pytest.raises(TypeError):
        other.save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.compat
def test_dtype_and_device(saved):
    glp = GLP.from_pretrained(str(saved), device="cpu", dtype=torch.bfloat16)
    assert glp.denoiser.dtype == torch.bfloat16 and glp.normalizer.mean.dtype == torch.float32
    assert glp.device == torch.device("cpu") and glp.width == D


@pytest.mark.compat
def test_intermediate_checkpoints(saved, tiny_glp):
    early = tiny_glp(D, (0, 2), "someone/model", seed=1)
    early.save_pretrained(saved / "checkpoints" / "4096")
    assert_equal(GLP.from_pretrained(saved, checkpoint="4096"), early)
    assert GLP.from_pretrained(saved).provenance["seed"] == 0
    with pytest.raises(InputError, match="4069.*4096.*final"):
        GLP.from_pretrained(saved, checkpoint="4069")


@pytest.mark.parametrize("name", ["..", ".", "", "../other", "../../other", "a/../../other", "*", "$(id)", "/tmp"])
def test_checkpoint_names_cannot_lead_out(saved, tiny_glp, name):
    tiny_glp(D).save_pretrained(saved.parent / "other")
    tiny_glp(D).save_pretrained(saved / "other")
    for checkpoint in (name, str(saved.parent / "other")):
        with pytest.raises(InputError, match="unknown checkpoint.*valid: final"):
            GLP.from_pretrained(saved, checkpoint=checkpoint)


@pytest.mark.compat
def test_official_folders_are_read():
    glp = GLP.from_pretrained(GOLDEN)
    assert glp.provenance["format"] == "official" and not glp.training
    with pytest.raises(InputError, match="finall.*final"):
        GLP.from_pretrained(GOLDEN, checkpoint="finall")


@pytest.mark.compat
def test_official_priors_become_ours(tmp_path):
    glp = GLP.from_pretrained(GOLDEN)
    assert_equal(GLP.from_pretrained(glp.save_pretrained(tmp_path)), glp)


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


SHAPE = {"d_input": 8, "d_model": 16, "d_mlp": 32, "n_layers": 2, "multi_layer_n_layers": 4}
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no prior: neither config.json nor"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no readable prior"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors", 2000), "holds no readable prior"),
    "empty weights": (lambda f: truncate(f / "model.safetensors", 0), "holds no readable prior"),
    "truncated config": (lambda f: truncate(f / "config.json", 40), "holds no readable prior"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "holds no readable prior"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "format None"),
    "unknown precision": (lambda f: rewrite_config(f, load_dtype="float8"), "config.json.*load_dtype 'float8'"),
    "other format": (lambda f: rewrite_config(f, format=3), "format 3"),
    "no basis": (lambda f: rewrite_config(f, format=2), "basis"),
    "no denoiser": (lambda f: rewrite_config(f, denoiser=None), "config.json.*denoiser"),
    "no hookpoints": (lambda f: rewrite_config(f, hookpoints=None), "config.json.*hookpoints"),
    "no provenance": (lambda f: rewrite_config(f, provenance=None), "config.json.*provenance"),
    "denoiser without width": (lambda f: rewrite_config(f, denoiser={"d_model": 4}), "no configuration.*d.input"),
    "unknown key": (lambda f: rewrite_config(f, denoiser=SHAPE | {"d_modle": 1}), "d_modle"),
    "odd width": (lambda f: rewrite_config(f, denoiser=SHAPE | {"d_model": 15}), "d_model"),
    "width of words": (lambda f: rewrite_config(f, denoiser=SHAPE | {"d_model": "x"}), "no configuration"),
    "denoiser is a number": (lambda f: rewrite_config(f, denoiser=3), "no configuration"),
    "hookpoints are a number": (lambda f: rewrite_config(f, hookpoints=3), "no configuration"),
    "other shape": (lambda f: rewrite_config(f, denoiser=SHAPE | {"d_mlp": 64}), "do not fit its configuration"),
    "more blocks": (lambda f: rewrite_config(f, denoiser=SHAPE | {"n_layers": 3}), "do not fit its configuration"),
    "no mean": (lambda f: change_weights(f, **{"normalizer.mean": None}), "mean"),
    "no layers": (lambda f: change_weights(f, **{"normalizer.layers": None}), "layers"),
    "nan mean": (lambda f: change_weights(f, **{"normalizer.mean": torch.full((2, 8), torch.nan)}), "must be finite"),
    "other layers": (lambda f: change_weights(f, **{"normalizer.layers": torch.tensor([3])}), "do not fit layers"),
    "missing weight": (lambda f: change_weights(f, **{"denoiser.ln.bias": None}), r"do not fit.*ln\.bias"),
    "extra weight": (lambda f: change_weights(f, **{"denoiser.extra": torch.ones(1)}), "do not fit.*extra"),
    "width of statistics": (
        lambda f: change_weights(f, **{"normalizer.mean": torch.zeros(2, 6), "normalizer.var": torch.ones(2, 6)}),
        "8.*6",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.usefixtures("unchecked")
def test_damaged_priors_are_refused_in_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(InputError, match=message) as caught:
        GLP.from_pretrained(saved)
    assert "\n" not in str(caught.value) and saved.name in str(caught.value) or "of width" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["someone/no-such-prior", "/no/such/folder", "no/such/../folder", "", "../..", "a b; rm -rf x", "x" * 200]
)
def test_what_is_not_there_is_said_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no prior") as caught:
        GLP.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_repositories_are_downloaded_without_intermediate_weights(saved, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(saved))
    assert GLP.from_pretrained("someone/prior", revision="v1").width == D
    with pytest.raises(InputError, match="unknown checkpoint '4096'"):
        GLP.from_pretrained("someone/prior", checkpoint="4096")
    assert [(repo, options["revision"]) for repo, options in asked] == [
        ("someone/prior", "v1"),
        ("someone/prior", None),
    ]


OWN = [
    "config.json",
    "model.safetensors",
    *(f"checkpoints/{n}/{f}" for n in (64, 128) for f in ("config.json", "model.safetensors")),
]
OFFICIAL = [
    "config.yaml",
    "rep_statistics.pt",
    "final.safetensors",
    "checkpoints/epoch_1.safetensors",
    "checkpoints/epoch_2.safetensors",
]
OTHERS = [
    "README.md",
    "steps/64/shard.safetensors",
    "optimizer.pt",
    "log.jsonl",
    "samples/1.safetensors",
    "checkpoints/64/optimizer.pt",
]


@pytest.mark.parametrize(
    ("repository", "checkpoint", "weights"),
    [
        (OWN, "final", "model.safetensors"),
        (OWN, "64", "checkpoints/64/model.safetensors"),
        (OFFICIAL, "final", "final.safetensors"),
        (OFFICIAL, "epoch_2", "checkpoints/epoch_2.safetensors"),
    ],
)
def test_only_what_is_needed_is_downloaded(repository, checkpoint, weights, tmp_path, monkeypatch):
    """The patterns decide what the Hub's own client takes of a list of files."""
    taken = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        taken.extend(filter_repo_objects(repository + OTHERS, allow_patterns=allow_patterns))
        for name in taken:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert fetch("someone/prior", revision=None, checkpoint=checkpoint) == tmp_path
    assert [name for name in taken if name.endswith(".safetensors")] == [weights]
    described = [name for name in repository if not name.endswith(".safetensors")]
    assert [name for name in taken if not name.endswith(".safetensors")] == described


def test_weights_that_an_official_repository_does_not_have(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    for name in ("epoch_9", "*", "../x", "/etc/x"):
        with pytest.raises(InputError, match="someone/prior has no checkpoint"):
            fetch("someone/prior", revision=None, checkpoint=name)


def test_push_uploads_what_save_writes(glp, tmp_path, monkeypatch):
    class Api:
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
            assert (repo, private, exist_ok) == ("someone/prior", True, True)

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None):
            shutil.copytree(folder_path, tmp_path / "hub")
            return type("Commit", (), {"commit_url": f"hub/{repo_id}/{revision}"})

    monkeypatch.setattr(hub, "HfApi", Api)
    assert glp.push_to_hub("someone/prior", private=True, revision="main") == "hub/someone/prior/main"
    assert_equal(GLP.from_pretrained(tmp_path / "hub"), glp)


def test_checkpoint_of_a_run_that_is_not_finished(tmp_path, tiny_glp):
    glp = tiny_glp(8)
    glp.save_pretrained(tmp_path / "checkpoints" / "65536")
    found = GLP.from_pretrained(tmp_path, checkpoint="65536")
    assert torch.equal(found.sample(2, generator=0), glp.sample(2, generator=0))
    with pytest.raises(InputError, match="unknown checkpoint 'final'.*65536"):
        GLP.from_pretrained(tmp_path)


def test_features_at_one_time_for_each_activation(tiny_glp):
    glp = tiny_glp(8)
    x, t = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.1, 0.5, 0.9]] * 2)
    noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    together = glp.features(x, t=t, noise=noise)
    for column in range(3):
        alone = glp.features(x[:, column], t=float(t[0, column]), noise=noise[:, column])
        assert torch.allclose(together[:, column], alone, atol=1e-5)


def test_a_projection_holds_the_component_along_a_direction(glp):
    x = glp.sample(5, steps=4) + 3.0
    w = torch.randn(5, glp.width, generator=torch.Generator().manual_seed(1))
    repaired = glp.project(x, hold=w, steps=6, solver="ab2")
    torch.testing.assert_close((repaired * w).sum(1), (x * w).sum(1), atol=1e-3, rtol=1e-4)
    assert (repaired - x).norm(dim=1).min() > 1e-2
    one = glp.project(x[:1], hold=w[0], steps=6, solver="ab2", generator=0)
    torch.testing.assert_close(one, glp.project(x[:1], hold=w[:1], steps=6, solver="ab2", generator=0))
    with pytest.raises(InputError, match=r"hold.*\[2, \d+\].*\[5, \d+\]"):
        glp.project(x, hold=w[:2])


def test_the_score_is_each_activations_own_loss(glp):
    x = glp.sample(6, steps=4)
    scores = glp.score(x, times=(0.3,), generator=2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    expected = [glp.loss(x[i : i + 1], t=0.3, noise=noise[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(scores, torch.stack(expected))
    assert glp.score(x.view(2, 3, -1)).shape == (2, 3)
