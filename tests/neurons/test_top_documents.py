from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.neurons.top_documents import TopDocuments
from latentprior.utils.errors import InputError


def stream(docs: int, units: int, length: int, seed: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [docs, length, units] of `levels` different values (many ties), and which tokens count."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(docs, length, units, generator=generator)
    if levels:
        values = (values * levels).round() / levels
    counts = torch.rand(docs, length, generator=generator) < 0.7
    counts[:, 0] = False  # the first position
    counts[:, 1] = True  # every document has a token that counts
    return values.bfloat16(), counts


def update(kept: TopDocuments, values, counts, doc, sign) -> None:
    row = torch.where(counts, counts.flatten().long().cumsum(0).view_as(counts) - 1, -1)
    masked = values.masked_fill(~counts[:, :, None], -sign * torch.inf)
    peaks = masked.amax(dim=1) if sign > 0 else masked.amin(dim=1)
    kept.update(values[counts], peaks, row, doc)


def naive(values, counts, doc, k, sign):
    """Peaks, documents and activations of the k most extreme documents of each unit; the first wins a tie."""
    masked = (values.double() * sign).masked_fill(~counts[:, :, None], -torch.inf)
    for unit in range(values.shape[2]):
        peaks = masked[:, :, unit].amax(dim=1)
        best = sorted(range(len(doc)), key=lambda i, peaks=peaks: (-float(peaks[i]), int(doc[i])))[:k]
        yield (
            [sign * float(peaks[i]) for i in best],
            [int(doc[i]) for i in best],
            [(values[i, :, unit].double() * counts[i]).tolist() for i in best],
        )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, -1]), st.sampled_from([0, 1, 3]),
    st.integers(0, 10**6), st.integers(1, 12),
)  # fmt: skip
def test_equal_to_sorting_all_documents_whatever_the_batches_and_ties(docs, units, k, sign, levels, seed, batch):
    values, counts = stream(docs, units, 5, seed, levels)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(docs))
    doc = order * 3 + 2
    values, counts = values[order], counts[order]
    kept = TopDocuments(units, k, 8, sign=sign)
    for part in torch.arange(docs).split(batch):
        update(kept, values[part], counts[part], doc[part], sign)
    peaks, found, tokens = kept.best(0, units)
    for unit, (wanted, wanted_docs, wanted_values) in enumerate(naive(values, counts, doc, k, sign)):
        n = len(wanted)
        assert peaks[unit, :n].tolist() == wanted and found[unit].tolist() == wanted_docs + [-1] * (k - n)
        assert tokens[unit, :n, :5].double().tolist() == wanted_values and not tokens[unit, :, 5:].any()


def test_shorter_documents_leave_nothing_of_longer_ones():
    kept = TopDocuments(1, 1, 4, sign=1)
    update(kept, torch.ones(1, 4, 1).bfloat16(), torch.tensor([[False, True, True, True]]), torch.tensor([0]), 1)
    update(kept, 2 * torch.ones(1, 2, 1).bfloat16(), torch.tensor([[False, True]]), torch.tensor([1]), 1)
    assert kept.best(0, 1)[2].tolist() == [[[0, 2, 0, 0]]]


def test_a_part_of_the_units():
    kept = TopDocuments(6, 2, 3, sign=-1)
    values, counts = stream(9, 6, 3, 0, 0)
    update(kept, values, counts, torch.arange(9), -1)
    for whole, part in zip(kept.best(0, 6), kept.best(2, 5), strict=True):
        assert torch.equal(whole[2:5], part)


def test_zeros_of_both_signs_are_equal():
    kept = TopDocuments(1, 3, 2, sign=1)
    values = torch.tensor([-0.0, 0.0, -0.0]).bfloat16()[:, None, None].expand(3, 2, 1)
    update(kept, values, torch.tensor([[False, True]] * 3), torch.tensor([5, 4, 3]), 1)
    assert kept.best(0, 1)[1].tolist() == [[3, 4, 5]]


def test_documents_with_numbers_that_do_not_fit_are_refused():
    kept = TopDocuments(1, 1, 2, sign=1)
    with pytest.raises(InputError, match="numbers of documents"):
        update(kept, torch.ones(1, 2, 1).bfloat16(), torch.tensor([[False, True]]), torch.tensor([2**47]), 1)
    update(kept, torch.ones(1, 2, 1).bfloat16(), torch.tensor([[False, True]]), torch.tensor([2**47 - 1]), 1)
    assert kept.best(0, 1)[1].item() == 2**47 - 1
