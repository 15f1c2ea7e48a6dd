from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from latentprior.data import moments as moments_module
from latentprior.data.moments import Covariance, Moments
from latentprior.utils.errors import InputError

LAYERS = (3, 15)


def draw(rows: int, width: int, seed: int, offset: float = 0.0, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, width)) * scale + offset, rng.choice(LAYERS, rows)


def of(x: np.ndarray, layer: np.ndarray) -> Moments:
    moments = Moments(LAYERS, x.shape[1])
    moments.update(torch.from_numpy(x), torch.from_numpy(layer))
    return moments


def assert_direct(moments: Moments, x: np.ndarray, layer: np.ndarray, rtol: float = 1e-12) -> None:
    """Against extended precision, computed directly from all rows."""
    for slot, number in enumerate(LAYERS):
        rows = x[layer == number].astype(np.longdouble)
        assert moments.count[slot] == len(rows)
        if len(rows):
            spread = float(rows.std())
            mean, variance = rows.mean(0).astype(float), rows.var(0).astype(float)
            np.testing.assert_allclose(moments.mean[slot].numpy(), mean, rtol=1e-13, atol=1e-13 * spread)
            np.testing.assert_allclose(moments.variance()[slot].numpy(), variance, rtol=rtol, atol=1e-14 * spread**2)
            norm = np.sqrt((rows**2).sum(1)).mean()
            np.testing.assert_allclose(float(moments.mean_norm()[slot]), float(norm), rtol=rtol)


def assert_close(a: Moments, b: Moments) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-12, atol=1e-12, equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
)
def test_equals_the_direct_computation_however_the_rows_are_cut(sizes, width, seed, offset, scale):
    x, layer = draw(sum(sizes), width, seed, offset, scale)
    streamed, merged = Moments(LAYERS, width), Moments(LAYERS, width)
    bounds = np.cumsum([0, *sizes])
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        streamed.update(torch.from_numpy(x[a:b]), torch.from_numpy(layer[a:b]))
        merged.merge(of(x[a:b], layer[a:b]))
    # What the data's own rounding allows: the mean is known to 1e-16 of the offset.
    rtol = max(1e-12, 1e-15 * abs(offset) / scale)
    assert_direct(streamed, x, layer, rtol)
    assert_direct(merged, x, layer, rtol)


@settings(deadline=None, max_examples=25)
@given(sizes=st.tuples(*[st.integers(0, 30)] * 3), seed=st.integers(0, 2**32 - 1))
def test_merge_is_associative_and_commutative(sizes, seed):
    parts = [draw(n, 3, seed + i, offset=5.0) for i, n in enumerate(sizes)]
    a, b, c = (lambda i=i: of(*parts[i]) for i in range(3))
    assert_close(a().merge(b()).merge(c()), a().merge(b().merge(c())))
    assert_close(a().merge(b()), b().merge(a()))


def test_a_large_offset_costs_no_precision():
    x, layer = draw(20_000, 4, seed=0, offset=1e6)
    moments = Moments(LAYERS, 4)
    for part in range(0, len(x), 777):
        moments.update(torch.from_numpy(x[part : part + 777]), torch.from_numpy(layer[part : part + 777]))
    # A mean of 1e6 is known to 1e-10; sums of squares minus the squared sum would be off by 1e-4.
    assert_direct(moments, x, layer, rtol=1e-11)


def test_moments_of_a_gaussian():
    x = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2, 30.0]) + 7
    moments = Moments([15], 3)
    moments.update(x)
    torch.testing.assert_close(moments.mean[0], torch.full((3,), 7.0, dtype=torch.float64), rtol=0, atol=0.4)
    torch.testing.assert_close(
        moments.variance()[0].sqrt(), torch.tensor([0.5, 2, 30], dtype=torch.float64), rtol=0.01, atol=0
    )


def test_long_updates_are_cut_without_a_trace(monkeypatch):
    x, layer = draw(1000, 4, seed=2, offset=3.0)
    monkeypatch.setattr(moments_module, "_CHUNK_ROWS", 7)
    assert_direct(of(x, layer), x, layer)


def test_bfloat16_rows_are_summed_in_float64():
    x = torch.full((4096, 2), 1.0078125, dtype=torch.bfloat16)
    moments = Moments([0], 2)
    moments.update(x)
    assert moments.mean.tolist() == [[1.0078125] * 2]
    assert moments.variance().tolist() == [[0.0, 0.0]]


def test_empty_updates_change_nothing():
    empty = Moments(LAYERS, 3)
    empty.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert empty.count.tolist() == [0, 0]
    assert empty.variance().isnan().all() and empty.mean_norm().isnan().all()
    x, layer = draw(50, 3, seed=1)
    filled = of(x, layer)
    filled.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert_close(filled, of(x, layer))
    assert_close(of(x, layer).merge(empty), of(x, layer))
    assert_close(Moments(LAYERS, 3).merge(of(x, layer)), of(x, layer))
    single = Moments([4], 3)
    single.update(torch.zeros(0, 3))
    assert single.count.tolist() == [0]


def test_median_norm_is_weighted_by_count_when_merged():
    a, b = Moments([0], 1), Moments([0], 1)
    a.update(torch.ones(30, 1))
    b.update(torch.ones(10, 1))
    a.median_norm[0] = 4.0
    assert Moments([0], 1).merge(a).median_norm.item() == 4.0
    b.merge(a)
    assert b.median_norm.item() == 4.0
    c = Moments([0], 1)
    c.update(torch.ones(40, 1))
    c.median_norm[0] = 8.0
    assert a.merge(c).median_norm.item() == pytest.approx(4 + 4 * 40 / 70)


def test_state_dict_survives_safetensors():
    original = of(*draw(20, 3, seed=0))
    restored = Moments.from_state_dict(load(save(original.state_dict())))
    assert restored.layers == original.layers
    for name, value in original.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), restored.state_dict()[name].nan_to_num(-1))


def test_state_dict_is_a_snapshot():
    moments = of(*draw(20, 3, seed=0))
    state = moments.state_dict()
    moments.update(torch.ones(5, 3), torch.full((5,), 15))
    assert state["count"].sum() == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("m2"), "lack the tensor 'm2'"),
        (lambda s: s.update(count=s["count"].float()), "'count' as float64"),
        (lambda s: s.update(m2=s["m2"][:, :1]), r"'m2' as float64 \[2, 3\]"),
        (lambda s: s.update(mean=s["mean"][0]), "mean of shape"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    state = of(*draw(20, 3, seed=0)).state_dict()
    change(state)
    with pytest.raises(InputError, match=message):
        Moments.from_state_dict(state)


def test_wrong_input_is_refused_and_changes_nothing():
    moments = of(*draw(20, 3, seed=0))
    before = moments.state_dict()
    with pytest.raises(InputError, match="unknown layer '4'"):
        moments.update(torch.ones(2, 3), torch.tensor([3, 4]))
    with pytest.raises(InputError, match="need the layer of each row"):
        moments.update(torch.ones(2, 3))
    with pytest.raises(InputError, match="width 3"):
        moments.update(torch.ones(2, 4), torch.tensor([3, 3]))
    with pytest.raises(InputError, match="2 layer numbers"):
        moments.update(torch.ones(2, 3), torch.tensor([3]))
    with pytest.raises(InputError, match="cannot merge"):
        moments.merge(Moments([3], 3))
    with pytest.raises(InputError, match="distinct"):
        Moments([3, 3], 2)
    for name, value in moments.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), before[name].nan_to_num(-1))


def test_variance_is_never_negative():
    x = torch.rand(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(999, 64)
    moments = Moments([0], 64)
    moments.update(x)
    assert (moments.m2 >= 0).all() and moments.m2.max() < 1e-28


# covariance


def covariance_of(x: np.ndarray, layer: np.ndarray) -> Covariance:
    streamed = Covariance(LAYERS, x.shape[1])
    streamed.update(torch.from_numpy(x), torch.from_numpy(layer))
    return streamed


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
)
def test_covariance_equals_the_direct_one_however_the_rows_are_cut(sizes, width, seed, offset):
    x, layer = draw(sum(sizes), width, seed, offset)
    streamed, merged = Covariance(LAYERS, width), Covariance(LAYERS, width)
    bounds = np.cumsum([0, *sizes])
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        streamed.update(torch.from_numpy(x[a:b]), torch.from_numpy(layer[a:b]))
        merged.merge(covariance_of(x[a:b], layer[a:b]))
    for found in (streamed, merged):
        for slot, number in enumerate(LAYERS):
            rows = x[layer == number]
            assert found.count[slot] == len(rows)
            if len(rows):
                expected = np.cov(rows - offset, rowvar=False, bias=True).reshape(width, width)
                np.testing.assert_allclose(found.covariance()[slot].numpy(), expected, rtol=1e-9, atol=1e-9)
            else:
                assert found.covariance()[slot].isnan().all()


def test_covariance_has_the_variances_on_its_diagonal(monkeypatch):
    x, layer = draw(1000, 4, seed=2, offset=3.0)
    monkeypatch.setattr(moments_module, "_CHUNK_ROWS", 7)
    matrix = covariance_of(x, layer).covariance()
    torch.testing.assert_close(matrix.diagonal(dim1=1, dim2=2), of(x, layer).variance(), rtol=1e-12, atol=0)
    assert matrix.dtype == torch.float64 and torch.equal(matrix, matrix.mT)


def test_covariance_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="width 4"):
        Covariance(LAYERS, 4).update(torch.ones(2, 3), torch.tensor([3, 3]))
    with pytest.raises(InputError, match="unknown layer '4'"):
        Covariance(LAYERS, 3).update(torch.ones(2, 3), torch.tensor([3, 4]))
    with pytest.raises(InputError, match="cannot merge"):
        Covariance(LAYERS, 3).merge(Covariance(LAYERS, 4))
    with pytest.raises(InputError, match="distinct"):
        Covariance([3, 3], 2)
