"""How the evaluation parts its real activations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from latentprior.config import EvaluateConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.evaluation.evaluate import _open, _real_rows, document_halves, pca_points
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError


@pytest.fixture
def store(tmp_path) -> ActivationStore:
    """Two layers of documents of 1 to 9 rows."""
    generator = torch.Generator().manual_seed(0)
    doc = torch.arange(80).repeat_interleave(torch.randint(1, 10, (80,), generator=generator)).repeat(2)
    layer = torch.tensor([1, 2]).repeat_interleave(len(doc) // 2)
    x = torch.randn(len(doc), 4, generator=generator)
    index = torch.arange(len(doc))
    with StoreWriter(tmp_path / "store", [Hookpoint("m", n, 4) for n in (1, 2)], source={}) as writer:
        writer.append(ActivationBatch(x, layer, doc, index, index), next_batch=1, left_out={})
    return ActivationStore(tmp_path / "store")


@pytest.mark.parametrize("layer", [None, 2])
def test_halves_share_no_document_and_lose_no_row(store, layer):
    a, b = document_halves(store, layer, seed=0)
    layers, docs, _, _ = store.metadata(torch.cat([a, b]))
    wanted = (
        torch.arange(len(store)) if layer is None else (store.metadata(torch.arange(len(store)))[0] == layer).nonzero()
    )
    assert torch.equal(torch.cat([a, b]).sort().values, wanted.flatten())
    assert layer is None or (layers == layer).all()
    assert not set(docs[: len(a)].tolist()) & set(docs[len(a) :].tolist())
    assert abs(len(a) - len(b)) <= 40
    assert not torch.equal(a, a.sort().values), "rows are not shuffled"
    assert torch.equal(document_halves(store, layer, seed=0)[0], a)
    assert not torch.equal(document_halves(store, layer, seed=1)[0].sort().values, a.sort().values)


@pytest.mark.parametrize(("model", "fits"), [("m", True), ("org/m", True), ("/data/m", True), ("org/n", False)])
def test_stores_of_a_copy_of_the_priors_model_fit(store, tiny_glp, model, fits):
    glp = tiny_glp(4, (1, 2), model)
    with nullcontext() if fits else pytest.raises(InputError, match="m layer 1 "):
        assert len(_open(str(store.folder), glp)) == len(store)


def test_pca_axes_are_those_of_the_real_activations():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 5, generator=generator) * torch.tensor([0.1, 5.0, 0.2, 3.0, 0.1])
    points = pca_points(z, z + torch.tensor([0.0, 10.0, 0.0, 0.0, 0.0]))
    shift = torch.tensor(points["generated"]).mean(0) - torch.tensor(points["real"]).mean(0)
    assert shift[0].abs() == pytest.approx(10.0, abs=0.1) and shift[1].abs() < 0.5
    assert points["variance_share"][0] == pytest.approx(25 / 34.06, abs=0.03)


def test_samples_too_few_for_the_two_sample_test_are_refused_before_anything_is_computed(store, tiny_glp):
    glp = tiny_glp(4, (1, 2), "m")
    config = EvaluateConfig(prior="p", heldout=str(store.folder), output="o", samples=29)
    with pytest.raises(InputError, match="^29 samples are too few .* at width 4: raise --samples to at least 30"):
        _real_rows(config, glp, 2)
    assert len(_real_rows(replace(config, samples=30), glp, 2)[0]) == 30
