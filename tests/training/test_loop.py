"""The training loop: it reaches the known optimum, micro-batches change nothing, and what goes wrong stops it first."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from latentprior.config import DenoiserConfig, Recipe
from latentprior.data.partition import Batch, BatchPartition
from latentprior.prior import flow
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.loop import Diverged, State, TrainingLoop
from latentprior.training.loss import BINS, backward, heldout_errors, heldout_loss, squared_errors
from latentprior.training.noise import NoiseSamples
from latentprior.utils.errors import InputError

WIDTH = 6
LAYERS = [1, 3]


def denoiser(width: int = WIDTH, layers: int | None = None, seed: int = 0) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(DenoiserConfig(width, 16, 32, 2, layers))


def normalizer(width: int = WIDTH, layers: list[int] | None = None) -> Normalizer:
    layers = layers or [0]
    row = torch.arange(1.0, len(layers) + 1)[:, None]
    return Normalizer(row * torch.ones(width), row**2 * torch.linspace(0.5, 2, width), layers)


def batches(rows: int = 32, width: int = WIDTH, layers: list[int] | None = None, start: int = 0):
    """Endless batches, each a function of its number alone."""
    for number in itertools.count(start):
        generator = torch.Generator().manual_seed(1000 + number)
        x = 1 + torch.randn(rows, width, generator=generator)
        layer = None
        if layers is not None:
            layer = torch.tensor(layers)[torch.randint(len(layers), (rows,), generator=generator)]
        yield x, layer


def train(state: State, normalizer: Normalizer, batches, recipe: Recipe, steps: int, **options) -> State:
    """The state after the whole loop."""
    for _ in TrainingLoop(state, normalizer, recipe, steps, **options).over(batches):
        pass
    return state


def weights(state: State) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.denoiser.parameters()])


def averaged(state: State) -> Denoiser:
    """The denoiser with its averaged weights."""
    with state.evaluated() as net:
        return copy.deepcopy(net)


# --- The optimum


def normal_data(rows: int):
    unit = Normalizer(torch.zeros(1, 2), torch.ones(1, 2), [0])
    generator = torch.Generator().manual_seed(7)
    return unit, ((torch.randn(rows, 2, generator=generator), None) for _ in itertools.count())


@pytest.mark.parametrize("times", ["grid", "stratified"])
def test_learns_the_optimal_velocity_of_normal_data(times):
    """The least loss is the integral over t of Var(u | z_t) = 1 / ((1-t)^2 + t^2), which is pi / 2."""
    recipe = Recipe(batch_size=512, learning_rate=4e-3, warmup=0.05, final_rate=0.0, ema=0.99, times=times)
    unit, data = normal_data(512)
    state = train(State.start(denoiser(2), recipe), unit, data, recipe, steps=400)

    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(8))
    loss, by_t = heldout_loss(averaged(state), unit, x)
    assert 0.99 * math.pi / 2 < loss < 1.03 * math.pi / 2
    t = (torch.arange(1000) + 0.5) / 1000
    optimum = (1 / ((1 - t) ** 2 + t**2)).reshape(BINS, -1).mean(1)
    torch.testing.assert_close(torch.tensor(by_t), optimum, rtol=0.06, atol=0)

    variance = (1 - t) ** 2 + t**2
    z_t = variance.sqrt()[:, None] * torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        excess = averaged(state)(z_t, t) - ((2 * t - 1) / variance)[:, None] * z_t  # over E[u | z_t]
    assert excess.square().mean() < 0.02


# --- Gradients


def whitened(layers: list[int]) -> Normalizer:
    plain = normalizer(layers=layers)
    return Normalizer(plain.mean, plain.var, layers, basis=torch.eye(WIDTH).expand(len(layers), -1, -1))


@pytest.mark.parametrize(
    ("statistics", "layers_on"),
    [(normalizer, "cpu"), (normalizer, "meta"), (whitened, "cpu")],
    ids=["each dimension", "layers on the device", "whitened"],
)
def test_the_host_never_waits_for_the_device(statistics, layers_on, monkeypatch):
    """The meta device has no numbers at all: whatever would wait for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # knows no such device
    known, net = statistics(layers=LAYERS).to("meta"), denoiser(layers=5).to("meta")
    x, layer = next(batches(layers=LAYERS))
    drawn = NoiseSamples(torch.empty(len(x), WIDTH, device="meta"), torch.rand(len(x)))
    rows = torch.arange(len(x))
    errors = squared_errors(net, known, Batch(x, layer.to(layers_on)), drawn.select(rows), slice(0, 16))
    errors.mean().backward()
    assert errors.shape == (16,) and all(p.grad is not None for p in net.parameters())


def test_layers_that_the_prior_does_not_serve_are_refused():
    x, layer = next(batches(layers=LAYERS))
    layer[3] = 1 + max(LAYERS)
    drawn = NoiseSamples(torch.zeros(len(x), WIDTH), torch.rand(len(x)))
    with pytest.raises(InputError, match="unknown layer"):
        squared_errors(denoiser(layers=5), normalizer(layers=LAYERS), Batch(x, layer), drawn)


def samples_of(seed: int, step: int, rows: int, width: int, recipe: Recipe, shards: int = 1) -> NoiseSamples:
    return NoiseSamples.draw(seed, step, BatchPartition(rows, shards), width, recipe, torch.device("cpu"))


def gradient(
    net: Denoiser, layers: list[int] | None, micro_batch: int | None, steps: tuple[int, ...] = (0,), **options
) -> tuple[float, Tensor]:
    net.zero_grad()
    batch = Batch(*next(batches(layers=layers)))
    loss = backward(
        net,
        normalizer(layers=layers),
        batch,
        [samples_of(0, step, 32, WIDTH, Recipe()) for step in steps],
        32,
        partition=BatchPartition(32),
        micro_batch=micro_batch,
        precision=torch.float32,
        **options,
    )
    return float(loss), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("micro_batch", [1, 5, 16, 32, 100])
def test_micro_batches_give_the_gradient_of_the_whole_batch(layers, micro_batch):
    net = denoiser(layers=5 if layers else None)
    loss, whole = gradient(net, layers, None)
    loss_in_parts, parts = gradient(net, layers, micro_batch)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_gradient_is_that_of_the_papers_loss(layers):
    net, scale = denoiser(layers=5 if layers else None), normalizer(layers=layers)
    loss, ours = gradient(net, layers, 8)
    x, layer = next(batches(layers=layers))
    samples = samples_of(0, 0, 32, WIDTH, Recipe())
    row = torch.zeros(len(x), dtype=torch.long) if layer is None else (layer == LAYERS[1]).long()
    z_0 = (x - scale.mean[row]) / scale.var[row].sqrt()
    t = samples.t[:, None]
    net.zero_grad()
    expected = (net((1 - t) * z_0 + t * samples.noise, samples.t, layer) - (samples.noise - z_0)).square().mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_several_noise_samples_give_the_mean_of_their_gradients(micro_batch):
    net = denoiser()
    alone = [gradient(net, None, None, (step,)) for step in range(3)]
    loss, together = gradient(net, None, micro_batch, (0, 1, 2))
    assert loss == pytest.approx(sum(loss for loss, _ in alone) / 3, rel=1e-5)
    torch.testing.assert_close(together, sum(g for _, g in alone) / 3, atol=1e-5, rtol=1e-5)


def test_bfloat16_work_keeps_float32_weights_and_gradients():
    net = denoiser()
    _, exact = gradient(net, None, None)
    net.zero_grad()
    batch, samples = Batch(*next(batches())), samples_of(0, 0, 32, WIDTH, Recipe())
    backward(
        net, normalizer(), batch, [samples], 32, partition=BatchPartition(32), precision=torch.bfloat16, micro_batch=8
    )
    rounded = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


# --- Noise samples


@pytest.mark.parametrize("times", ["grid", "stratified"])
def test_noise_samples_are_a_function_of_seed_and_step(times):
    recipe = Recipe(batch_size=256, times=times)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = samples_of(3, 10, 256, WIDTH, recipe)
    samples_of(3, 11, 256, WIDTH, recipe)
    again = samples_of(3, 10, 256, WIDTH, recipe)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.t, again.t)
    assert torch.equal(torch.get_rng_state(), before)
    for seed, step in [(3, 11), (4, 10), (0, 10)]:
        other = samples_of(seed, step, 256, WIDTH, recipe)
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t, other.t)


@pytest.mark.parametrize("times", ["grid", "stratified"])
def test_times_cover_the_unit_interval_evenly(times):
    recipe = Recipe(batch_size=512, times=times)
    drawn = [samples_of(0, step, 512, 1, recipe).t for step in range(400)]
    t = torch.cat(drawn)
    assert 0 <= t.min() < 0.01 and 0.99 < t.max() <= 1
    share = torch.histc(t, 20, 0, 1) / len(t)
    torch.testing.assert_close(share, torch.full((20,), 0.05), atol=0.003, rtol=0)
    assert float(t.mean()) == pytest.approx(0.5, abs=0.005) and float(t.var()) == pytest.approx(1 / 12, rel=0.02)
    for one in drawn[:20]:
        assert (one.diff() >= 0).all()  # neighbours share their times


def test_grid_times_lie_on_the_official_grid():
    t = samples_of(0, 0, 4096, 1, Recipe()).t
    assert torch.isin(t, flow.official_knots(1000)).all() and len(t.unique()) > 900


def test_stratified_times_have_one_draw_a_stratum():
    recipe = Recipe(batch_size=512, times="stratified", distinct_times=64)
    t = samples_of(0, 0, 512, 1, recipe).t
    assert torch.equal((t * 64).long(), torch.arange(64).repeat_interleave(8))
    assert len(t.unique()) == 64


def test_times_and_noise_are_not_paired_with_rows():
    """Sorting the times must not tie a row's noise to its time."""
    samples = samples_of(0, 0, 20_000, 1, Recipe())
    correlation = torch.corrcoef(torch.stack([samples.t, samples.noise[:, 0]]))[0, 1]
    assert abs(float(correlation)) < 0.03


# --- The loop


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_a_run_in_two_parts_is_one_run(layers):
    recipe = Recipe(batch_size=32, learning_rate=1e-2, ema=0.9)

    def start() -> State:
        return State.start(denoiser(layers=5 if layers else None), recipe)

    norm = normalizer(layers=layers)
    whole = train(start(), norm, batches(layers=layers), recipe, steps=9, micro_batch=8, seed=2)
    # The schedule belongs to the whole run, so the first part stops by running out of data.
    part = start()
    with pytest.raises(InputError, match="^the activations ended after 4 of 9 steps$"):
        train(part, norm, itertools.islice(batches(layers=layers), 4), recipe, steps=9, micro_batch=8, seed=2)
    assert part.step == 4
    train(part, norm, batches(layers=layers, start=4), recipe, steps=9, micro_batch=8, seed=2)
    assert torch.equal(weights(part), weights(whole)) and part.step == whole.step == 9
    for name, value in whole.average.state_dict().items():
        assert torch.equal(part.average.state_dict()[name], value)
    other = train(start(), norm, batches(layers=layers), recipe, steps=9, micro_batch=8, seed=3)
    assert not torch.equal(weights(other), weights(whole))


def test_the_layer_is_used():
    recipe = Recipe(batch_size=32, learning_rate=1e-2)
    state = train(
        State.start(denoiser(layers=5), recipe), normalizer(layers=LAYERS), batches(layers=LAYERS), recipe, steps=3
    )
    z, t = torch.zeros(4, WIDTH), torch.tensor(0.5)
    with torch.no_grad():
        one, three = (state.denoiser(z, t, torch.tensor(layer)) for layer in LAYERS)
    assert not torch.allclose(one, three, atol=1e-4)


def test_figures_of_a_step():
    recipe = Recipe(batch_size=32, learning_rate=1e-2, warmup=0.5, clip=1e-3)
    state = State.start(denoiser(), recipe)
    before = weights(state)
    loop = TrainingLoop(state, normalizer(), recipe, 4)
    steps, figures = zip(*((state.step, made) for made in loop.over(batches())), strict=True)
    assert steps == (1, 2, 3, 4)
    assert [f.learning_rate for f in figures[:3]] == pytest.approx([1e-4, 5.05e-3, 1e-2])
    loss, exact = gradient(denoiser(), None, None)
    assert figures[0].loss == pytest.approx(loss, rel=1e-5)
    assert figures[0].gradient_norm == pytest.approx(float(exact.norm()), rel=1e-4)  # before it is clipped
    assert not torch.equal(weights(state), before)


def test_gradients_are_clipped():
    recipe = Recipe(batch_size=32, clip=1e-3)
    state = State.start(denoiser(), recipe)
    norms = []
    state.optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in state.denoiser.parameters()]).norm().item())
    )
    train(state, normalizer(), batches(), recipe, steps=2)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("micro_batch", [None, 8])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad, micro_batch):
    recipe = Recipe(batch_size=32, learning_rate=1e-2, ema=0.9)

    def spoilt():
        for number, (x, layer) in enumerate(batches()):
            if number == 3:
                x[17, 2] = bad
            yield x, layer

    state, good = State.start(denoiser(), recipe), State.start(denoiser(), recipe)
    with pytest.raises(InputError, match="ended after 3"):
        train(good, normalizer(), itertools.islice(batches(), 3), recipe, steps=10)
    with pytest.raises(Diverged, match="^step 3: loss (nan|inf)"):
        train(state, normalizer(), spoilt(), recipe, steps=10, micro_batch=micro_batch)
    assert state.step == 3
    torch.testing.assert_close(weights(state), weights(good), atol=1e-6, rtol=1e-5)
    assert weights(state).isfinite().all()
    assert all(value.isfinite().all() for value in state.average.state_dict().values())
    moments = [value for values in state.optimizers[0].state.values() for value in values.values()]
    assert all(value.isfinite().all() for value in moments)


def test_nothing_is_read_once_the_steps_are_done():
    recipe = Recipe(batch_size=32)
    state = State.start(denoiser(), recipe)
    source = batches()
    train(state, normalizer(), source, recipe, steps=2)
    before = weights(state)
    train(state, normalizer(), source, recipe, steps=2)
    assert torch.equal(weights(state), before)
    assert torch.equal(next(source)[0], next(batches(start=2))[0])


def test_the_average_is_what_is_evaluated():
    plain = State.start(denoiser(), Recipe())
    with plain.evaluated() as evaluated:
        assert plain.average is None and evaluated is plain.denoiser
    recipe = Recipe(batch_size=32, learning_rate=1e-2, ema=0.9)
    state = train(State.start(denoiser(), recipe), normalizer(), batches(), recipe, steps=5)
    last = weights(state)
    with state.evaluated() as evaluated:
        for name, value in evaluated.named_parameters():
            assert torch.equal(value.detach(), state.average.state_dict()[name])
            assert value.data_ptr() != state.average.state_dict()[name].data_ptr()
        assert not torch.equal(weights(state), last)
    assert torch.equal(weights(state), last)  # training goes on from the weights themselves


# --- Held-out loss


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_heldout_loss_is_the_same_at_every_call(layers):
    net, norm = denoiser(layers=5 if layers else None), normalizer(layers=layers)
    x, layer = next(batches(500, layers=layers))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    errors, bins = heldout_errors(net, norm, x, layer)
    again, _ = heldout_errors(net, norm, x, layer, chunk=77)
    torch.testing.assert_close(errors, again)
    assert torch.equal(torch.get_rng_state(), before)
    loss, by_t = heldout_loss(net, norm, x, layer)
    assert loss == pytest.approx(float(errors.mean()), rel=1e-6)
    assert torch.bincount(bins).tolist() == [50] * BINS
    assert by_t == pytest.approx([float(errors[bins == b].mean()) for b in range(BINS)], rel=1e-5)


def test_heldout_loss_of_a_few_rows():
    loss, by_t = heldout_loss(denoiser(), normalizer(), next(batches(3))[0])
    assert math.isfinite(loss) and len(by_t) == BINS and all(map(math.isfinite, by_t))
