"""Standardisation and its inverse, per layer, with statistics that cannot make anything infinite."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentprior.data.moments import Covariance, Moments
from latentprior.prior.normalizer import LEAST_VARIANCE, Normalizer
from latentprior.utils.errors import InputError

D = 5


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def make(layers: tuple[int, ...] = (7,), **norms: Tensor) -> Normalizer:
    return Normalizer(10 * draw(len(layers), D), draw(len(layers), D).square() + 0.1, layers, **norms)


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, D), (0, D)])
def test_round_trip(shape):
    normalizer, x = make(), 20 * draw(*shape)
    z = normalizer.normalize(x)
    assert z.shape == x.shape
    torch.testing.assert_close(normalizer.denormalize(z), x, atol=1e-5, rtol=1e-5)


def test_training_data_get_mean_zero_and_variance_one():
    x = 3 * draw(500, D) + 1000
    moments = Moments([7], D)
    moments.update(x)
    z = Normalizer.from_moments(moments).normalize(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(D), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(D), atol=1e-3, rtol=0)


def test_moments_bring_their_norms():
    x, layer = draw(100, D), torch.arange(100) % 2 * 3 + 1
    moments = Moments([1, 4], D)
    moments.update(x, layer)
    moments.median_norm = torch.tensor([2.0, 3.0], dtype=torch.float64)
    normalizer = Normalizer.from_moments(moments)
    assert normalizer.layers.tolist() == [1, 4] and normalizer.median_norm.tolist() == [2.0, 3.0]
    torch.testing.assert_close(normalizer.mean_norm[1], x[layer == 4].norm(dim=1).mean())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 1e-6, 1.0, 1e6, 1e30]), min_size=D, max_size=D))
def test_any_variance_gives_finite_values_on_the_data(variances):
    mean, var = draw(1, D), torch.tensor([variances])
    normalizer = Normalizer(mean, var, (0,))
    x = mean + var.sqrt() * draw(20, D)
    z = normalizer.normalize(x)
    assert z.isfinite().all() and normalizer.denormalize(draw(20, D)).isfinite().all()
    torch.testing.assert_close(normalizer.denormalize(z), x, atol=1e-5, rtol=1e-4)


def test_a_dimension_without_variance_stays_at_its_mean():
    normalizer = Normalizer(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.0]]), (0,))
    x = torch.tensor([[3.0, 2.0], [5.0, 9.0]])  # the second one was edited off the data
    assert normalizer.normalize(x).tolist() == [[1.0, 0.0], [2.0, 0.0]]
    assert normalizer.denormalize(torch.tensor([[1.0, 100.0]])).tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normalizer, x = make(), draw(3, D).to(dtype)
    assert normalizer.normalize(x).dtype == normalizer.denormalize(x).dtype == wide


def test_each_row_gets_its_layers_statistics():
    normalizer, x = make((2, 5, 9)), draw(2, 3, D)
    layer = torch.tensor([[9, 2, 5], [2, 2, 9]])
    for function in (normalizer.normalize, normalizer.denormalize):
        found = function(x, layer)
        for i in range(2):
            for j in range(3):
                assert torch.equal(found[i, j], function(x[i, j], int(layer[i, j])))
    one = Normalizer(normalizer.mean[1:2], normalizer.var[1:2], (5,))
    assert torch.equal(normalizer.normalize(x, 5), one.normalize(x)) and torch.equal(
        one.normalize(x, 5), one.normalize(x)
    )


@pytest.mark.parametrize("layer", [3, -1, 10, torch.tensor([2, 2, 3]), torch.tensor([9, -4, 2])])
def test_unknown_layers_are_named(layer):
    wrong = layer if isinstance(layer, int) else next(n for n in layer.tolist() if n not in (2, 5, 9))
    for function in (make((2, 5, 9)).normalize, make((2, 5, 9)).denormalize):
        with pytest.raises(InputError, match=rf"unknown layer '{wrong}'.*\(valid: 2, 5, 9\)"):
            function(draw(3, D), layer)


def test_several_layers_need_a_name():
    with pytest.raises(InputError, match=r"\[2, 5\]"):
        make((2, 5)).normalize(draw(3, D))


@pytest.mark.parametrize("function", ["normalize", "denormalize", "sinks"])
def test_other_widths_are_refused(function):
    with pytest.raises(InputError, match="width 4.*width 5"):
        getattr(make(), function)(draw(3, 4))


def test_sinks_are_over_ten_times_the_median_of_their_layer():
    normalizer = make((2, 5), median_norm=torch.tensor([1.0, 3.0]))
    x = torch.zeros(4, D)
    x[:, 1] = torch.tensor([9.9, 10.1, 29.0, 31.0])
    assert normalizer.sinks(x, 2).tolist() == [False, True, True, True]
    assert normalizer.sinks(x, 5).tolist() == [False, False, False, True]
    assert normalizer.sinks(x.reshape(2, 2, D), torch.tensor([[2, 2], [5, 5]])).tolist() == [
        [False, True],
        [False, True],
    ]
    assert normalizer.sinks(x.bfloat16(), 5).tolist() == [False, False, False, True]


def test_no_sinks_without_a_median():
    normalizer = make()
    assert normalizer.median_norm.isnan().all() and normalizer.mean_norm.isnan().all()
    assert not normalizer.sinks(1e30 * torch.ones(2, D)).any()


@pytest.mark.parametrize(
    ("mean", "var", "layers", "message"),
    [
        (torch.zeros(2, D), torch.ones(2, D), (1,), "layers"),
        (torch.full((1, D), torch.nan), torch.ones(1, D), (1,), "finite"),
        (torch.zeros(1, D), -torch.ones(1, D), (1,), "negative"),
        (torch.zeros(1, D), torch.full((1, D), torch.inf), (1,), "finite"),
        (torch.zeros(2, D), torch.ones(2, D), (1, 1), "layers"),
        (torch.zeros(1, D), torch.ones(1, D), (-1,), "layers"),
        (torch.zeros(0, D), torch.ones(0, D), (), "layers"),
    ],
)
def test_bad_statistics_are_refused(mean, var, layers, message):
    with pytest.raises(InputError, match=message):
        Normalizer(mean, var, layers)


def test_state_dict_holds_the_statistics_alone():
    assert set(make().state_dict()) == {"mean", "var", "layers", "mean_norm", "median_norm"}


# whitened


def correlated(rows: int = 3000, width: int = D) -> Tensor:
    """Activations with strong correlations, a large mean and very different variances."""
    mixing = draw(width, width) * torch.logspace(0, 2, width)
    return draw(rows, width) @ mixing + 100 * draw(width)


def whitening(x: Tensor, layer: Tensor | None = None, layers: tuple[int, ...] = (7,)) -> Normalizer:
    moments, products = Moments(layers, x.shape[1]), Covariance(layers, x.shape[1])
    moments.update(x, layer)
    products.update(x, layer)
    return Normalizer.whitened(moments, products.covariance())


def test_whitened_training_data_have_unit_covariance():
    x = correlated()
    normalizer = whitening(x)
    z = normalizer.normalize(x.double())
    torch.testing.assert_close(z.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(D, dtype=torch.float64), atol=1e-3, rtol=0)
    assert not torch.allclose(make().normalize(x.double()).T.cov(), torch.eye(D, dtype=torch.float64), atol=0.1)
    assert (normalizer.scale.diff() <= 0).all()  # in descending order of variance


@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, D), (0, D)])
def test_whitened_round_trip(shape):
    normalizer, x = whitening(correlated()), 20 * draw(*shape)
    for wide, digits in ((x, 1e-3), (x.double(), 1e-4)):  # the statistics are float32
        z = normalizer.normalize(wide)
        assert z.shape == x.shape and z.dtype == wide.dtype
        torch.testing.assert_close(normalizer.denormalize(z), wide, atol=digits, rtol=digits)


def test_whitening_without_variance_stays_finite_and_comes_back():
    x = correlated()
    x[:, 1] = 3.0  # one dimension constant,
    x[:, 4] = x[:, 0] + x[:, 2]  # one that follows from others
    normalizer = whitening(x)
    least = math.sqrt(LEAST_VARIANCE) * float(normalizer.scale.max())
    assert normalizer.scale.min() == pytest.approx(least, rel=1e-5)
    z = normalizer.normalize(x)
    assert z.isfinite().all() and z.abs().max() < 10
    torch.testing.assert_close(normalizer.denormalize(z)[:, 1], x[:, 1], atol=1e-2, rtol=0)
    edited = x + torch.tensor([0.0, 5, 0, 0, -5])  # off the data
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(edited)), edited, atol=2e-2, rtol=1e-4)
    constant = whitening(torch.full((10, D), 2.0))
    assert not constant.normalize(draw(3, D)).any()
    assert (constant.denormalize(draw(3, D)) == 2.0).all()


def test_whitened_rows_get_their_layers_statistics():
    layers = (2, 5, 9)
    layer = torch.tensor(layers).repeat(1000)
    normalizer = whitening(correlated() * layer[:, None], layer, layers)
    x, layer = draw(2, 3, D), torch.tensor([[9, 2, 5], [2, 2, 9]])
    for function in (normalizer.normalize, normalizer.denormalize):
        found = function(x, layer)
        for i in range(2):
            for j in range(3):
                expected = function(x[i, j], int(layer[i, j]))
                torch.testing.assert_close(found[i, j], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(function(x, layer[0]), function(x, layer[0].expand(2, 3)))
        torch.testing.assert_close(function(x[0, 0], layer), function(x[0, 0].expand(2, 3, D), layer))


def test_autocast_does_not_round_whitened_activations():
    normalizer, x = whitening(correlated()), correlated()[:50]
    z = normalizer.normalize(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(normalizer.normalize(x), z)
        assert torch.equal(normalizer.denormalize(z), normalizer.denormalize(z.clone()))
        torch.testing.assert_close(normalizer.denormalize(z), x, atol=1e-2, rtol=1e-4)


def test_directions_are_unique():
    """Eigenvectors come with either sign; a resumed run must find the same."""
    x = correlated()
    first, second = whitening(x), whitening(x.flip(0))
    torch.testing.assert_close(first.basis, second.basis, atol=1e-2, rtol=1e-4)


def test_whitening_state_dict():
    normalizer = whitening(correlated())
    assert set(normalizer.state_dict()) == {"mean", "var", "layers", "mean_norm", "median_norm", "basis"}
    assert make().basis is None


@pytest.mark.parametrize("bad", [torch.zeros(1, D, D - 1), torch.zeros(2, D, D), torch.full((1, D, D), torch.nan)])
def test_a_bad_covariance_is_refused(bad):
    moments = Moments([7], D)
    moments.update(draw(10, D))
    jaxtyping.config.update("jaxtyping_disable", True)  # as outside of tests
    try:
        with pytest.raises(InputError, match="a covariance"):
            Normalizer.whitened(moments, bad)
        with pytest.raises(InputError, match="basis of shape"):
            Normalizer(moments.mean, moments.variance(), (7,), basis=bad)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("whitened", [False, True])
def test_a_covector_measures_the_same_component(whitened):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, generator=generator).double()
    basis = torch.linalg.qr(torch.randn(1, 5, 5, generator=generator)).Q * torch.arange(1.0, 6.0)
    normalizer = Normalizer(x.mean(0)[None], x.var(0)[None], [3], basis=basis if whitened else None)
    w = torch.randn(5, generator=generator)
    along = normalizer.normalize(x.float()) @ normalizer.covector(w)
    raw = x.float() @ w
    torch.testing.assert_close(along - along.mean(), raw - raw.mean(), atol=1e-4, rtol=1e-4)
