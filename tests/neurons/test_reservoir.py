from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from latentprior.neurons import neighbours
from latentprior.neurons.document_batches import DocumentBatch
from latentprior.neurons.neighbours import nearest_units
from latentprior.neurons.reservoir import Reservoir, at_quantiles, random_keys


def batch_of(docs: list[int], width: int = 3) -> DocumentBatch:
    """Documents of 2 to 5 tokens whose activations are their number; the second of the longest ones does not count."""
    lengths = [2 + doc % 4 for doc in docs]
    row = torch.full((len(docs), max(lengths)), -1)
    counts = [[c for c in range(1, n) if not (n == 5 and c == 1)] for n in lengths]
    flat = iter(range(10**6))
    for i, columns in enumerate(counts):
        for column in columns:
            row[i, column] = next(flat)
    x = torch.tensor([float(doc) for doc, columns in zip(docs, counts, strict=True) for _ in columns])
    ids = [np.arange(n, dtype=np.int32) for n in lengths]
    return DocumentBatch(torch.tensor(docs), ids, x[:, None].expand(-1, width).contiguous(), row)


@pytest.mark.parametrize("size", [1, 7, 200])
def test_the_sample_depends_on_the_documents_alone(size):
    docs = np.random.default_rng(0).permutation(100)
    samples = []
    for parts in (1, 9, 100):
        kept = Reservoir(size, seed=3)
        for part in np.array_split(np.roll(docs, parts), parts):
            kept.update(batch_of(part.tolist()))
        samples.append(kept.documents())
    assert all(sample.doc.tolist() == samples[0].doc.tolist() for sample in samples)
    wanted = sorted(docs.tolist(), key=lambda doc: int(random_keys(np.array([doc]), 3)[0]))[:size]
    assert samples[0].doc.tolist() == sorted(wanted)
    for i, doc in enumerate(samples[0].doc.tolist()):
        row = samples[0].row[i]
        assert (samples[0].x[row[row >= 0]] == doc).all()
        alone = batch_of([doc]).row[0]
        assert (row >= 0).nonzero().flatten().tolist() == (alone >= 0).nonzero().flatten().tolist()
        assert len(samples[0].ids[i]) == 2 + doc % 4


def test_every_document_is_as_likely_and_seeds_differ():
    taken = np.zeros(50)
    for seed in range(600):
        taken[random_keys(np.arange(50), seed).argsort()[:10]] += 1
    assert stats.chisquare(taken).pvalue > 1e-3
    assert (random_keys(np.arange(50), 1) != random_keys(np.arange(50), 2)).all()
    assert len(np.unique(random_keys(np.arange(10**5), 1))) == 10**5


def test_quantiles_are_of_the_documents_largest_magnitude():
    sample = batch_of(list(range(11)))
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(len(sample), 5, generator=generator).bfloat16()
    values, docs, tokens = at_quantiles(units, sample, (0.0, 0.5, 0.9, 1.0))
    for unit in range(5):
        rows = [row[row >= 0] for row in sample.row]
        peaks = np.array([units[row, unit].float().abs().max() for row in rows])
        order = peaks.argsort(kind="stable")
        assert docs[unit].tolist() == sample.doc[order[[0, 5, 9, 10]]].tolist()
        for j, i in enumerate(order[[0, 5, 9, 10]]):
            row = sample.row[i]
            assert abs(values[unit, j]) == peaks[i] and values[unit, j] in units[rows[i], unit].float()
            assert torch.equal(tokens[unit, j][row >= 0], units[row[row >= 0], unit])
            assert not tokens[unit, j][row < 0].any()


@pytest.mark.parametrize("tile", [3, 8, 1000])
def test_nearest_units_equal_corrcoef(tile, monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(200, 20, generator=generator) @ torch.randn(20, 20, generator=generator) + 3
    units[:, 7] = 1.0  # does not vary
    units[:, 9] = -units[:, 8]
    found, correlations = nearest_units(units.bfloat16(), 4)
    with np.errstate(invalid="ignore"):
        matrix = np.nan_to_num(np.corrcoef(units.bfloat16().double().numpy().T))
    np.fill_diagonal(matrix, 0)
    for unit in range(20):
        assert unit not in found[unit, correlations[unit] != 0].tolist() and len(set(found[unit].tolist())) == 4
        np.testing.assert_allclose(correlations[unit].abs(), np.sort(np.abs(matrix[unit]))[::-1][:4], atol=2e-3)
        np.testing.assert_allclose(correlations[unit], matrix[unit, found[unit]], atol=2e-3)
    assert found[8, 0] == 9 and correlations[8, 0] == pytest.approx(-1, abs=2e-3)
    assert not correlations[7].any() and not (correlations[found == 7]).any()


def test_fewer_units_than_neighbours():
    found, correlations = nearest_units(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), 8)
    assert found.shape == (3, 2) == correlations.shape and (found != torch.arange(3)[:, None]).all()
    assert nearest_units(torch.ones(9, 3).bfloat16(), 0)[0].shape == (3, 0)
