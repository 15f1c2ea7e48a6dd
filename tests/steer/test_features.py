"""Directions of an SAE's latents, and what the latents are said to be active on."""

from __future__ import annotations

import json

import pytest
import torch

from latentprior.data.activations import ActivationBatch, record_activations
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.sae.sae import SAE
from latentprior.steer.features import GAP, describe_latents, sae_direction
from latentprior.utils.errors import InputError

WIDTH = 6
POINT = Hookpoint("tiny", 1, WIDTH)


def identity_sae(k: int = 1) -> SAE:
    """Latent i is dimension i; there are two more that are never active."""
    encoder = torch.cat([torch.eye(WIDTH), torch.zeros(2, WIDTH)])
    decoder = torch.cat([2 * torch.eye(WIDTH), torch.ones(1, WIDTH), torch.zeros(1, WIDTH)])
    return SAE.of(encoder, torch.zeros(WIDTH + 2), decoder, torch.zeros(WIDTH), POINT, k=k, provenance={"made": "here"})


def test_direction_is_the_decoders_row():
    sae = identity_sae()
    direction = sae_direction(sae, 3)
    assert torch.equal(direction.vector, torch.eye(WIDTH)[3])
    assert (direction.kind, direction.hookpoint, direction.name) == ("sae", POINT, "latent 3")
    assert direction.provenance == {"latent": 3, "sae": {"made": "here"}}
    assert sae_direction(sae, WIDTH).norm == pytest.approx(1.0)
    for latent, expected in ((-1, "out of range"), (WIDTH + 2, "out of range"), (WIDTH + 1, "is zero")):
        with pytest.raises(InputError, match=expected):
            sae_direction(sae, latent)


@pytest.fixture
def rows(tiny_llm, tiny_tokenizer, sentences) -> ActivationBatch:
    """Real tokens; latent (token % 4) is active on them, the more so the later in the document."""
    batch = record_activations(tiny_llm("llama"), tiny_tokenizer, list(sentences) * 3, [1])
    x = torch.zeros(len(batch), WIDTH)
    x[torch.arange(len(batch)), batch.token % 4] = batch.position.float() + batch.doc / 100
    return ActivationBatch(x, batch.layer, batch.doc, batch.position, batch.token)


def test_examples_are_the_strongest_activations_in_their_context(rows, tiny_tokenizer, sentences):
    (found,) = describe_latents(identity_sae(), rows, tiny_tokenizer, latents=[2], examples=4, context=3)
    mine = rows.token % 4 == 2
    assert found.density == pytest.approx(float(mine.float().mean()))
    values = rows.x[mine, 2].sort(descending=True).values[:4] * 2  # the decoder's row has norm 2
    assert [e.value for e in found.examples] == pytest.approx(values.tolist())
    for example in found.examples:
        row = int(((rows.doc == example.doc) & (rows.position == example.position)).nonzero())
        near = (rows.doc == example.doc) & ((rows.position - example.position).abs() <= 3)
        assert example.before + example.token + example.after == tiny_tokenizer.decode(rows.token[near].tolist())
        assert example.token == tiny_tokenizer.decode([int(rows.token[row])]) and rows.token[row] % 4 == 2
        assert example.before + example.token + example.after in sentences[example.doc % len(sentences)]
    assert found.name.startswith("latent 2: ") and repr(found.tokens[0]) in found.name
    json.dumps(found.to_dict())
    direction = sae_direction(identity_sae(), 2, description=found)
    assert direction.name == found.name and direction.provenance["tokens"] == found.tokens


def test_order_of_rows_does_not_matter_and_gaps_are_shown(rows, tiny_tokenizer):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    expected = describe_latents(identity_sae(), rows, tiny_tokenizer, latents=[0, 1])
    assert describe_latents(identity_sae(), rows.select(order), tiny_tokenizer, latents=[0, 1]) == expected
    odd = rows.select(rows.position % 2 == 1)
    example = describe_latents(identity_sae(), odd, tiny_tokenizer, latents=[0], context=4)[0].examples[-1]
    assert GAP in example.before + example.after


def test_only_active_latents_are_drawn(rows, tiny_tokenizer):
    found = describe_latents(identity_sae(), rows, tiny_tokenizer, latents=3, seed=1)
    drawn = [d.latent for d in found]
    assert drawn == sorted(set(drawn)) and set(drawn) <= {0, 1, 2, 3} and len(drawn) == 3
    assert describe_latents(identity_sae(), rows, tiny_tokenizer, latents=3, seed=1) == found
    assert len({tuple(d.latent for d in describe_latents(identity_sae(), rows, tiny_tokenizer, latents=2, seed=s))
                for s in range(8)}) > 1  # fmt: skip
    with pytest.raises(InputError, match="only 4 latents"):
        describe_latents(identity_sae(), rows, tiny_tokenizer, latents=5)
    (silent,) = describe_latents(identity_sae(), rows, tiny_tokenizer, latents=[5])
    assert silent.examples == [] and silent.name == "latent 5: never active"
    with pytest.raises(InputError, match="out of range"):
        describe_latents(identity_sae(), rows, tiny_tokenizer, latents=[99])


def test_store_gives_whole_documents_of_the_layer(rows, tiny_tokenizer, tmp_path):
    other = ActivationBatch(-rows.x, torch.full_like(rows.layer, 2), rows.doc, rows.position, rows.token)
    points = [Hookpoint("tiny", n, WIDTH) for n in (1, 2)]
    with StoreWriter(tmp_path / "store", points, dtype="float32", source={}) as writer:
        writer.append(ActivationBatch.cat([rows, other]), next_batch=1, left_out={})
    store = ActivationStore(tmp_path / "store")
    whole = describe_latents(identity_sae(), store, tiny_tokenizer, latents=[0, 2])
    assert whole == describe_latents(identity_sae(), rows, tiny_tokenizer, latents=[0, 2])
    few = describe_latents(identity_sae(), store, tiny_tokenizer, latents=[0], rows=10, examples=100, context=1000)
    for example in few[0].examples:
        text = tiny_tokenizer.decode(rows.token[rows.doc == example.doc].tolist())
        assert example.before + example.token + example.after == text
    assert len({example.doc for example in few[0].examples}) <= 2
    at_3 = SAE.of(*[torch.ones(8, WIDTH), torch.ones(8), torch.ones(8, WIDTH), torch.ones(WIDTH)],
                  Hookpoint("tiny", 3, WIDTH), k=1)  # fmt: skip
    with pytest.raises(InputError, match="layer 3"):
        describe_latents(at_3, store, tiny_tokenizer)
