"""Delta LM loss: against a direct computation, and on replacements whose cost is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import FAMILIES, LAYERS
from latentprior.data.text import Document
from latentprior.data.tokens import tokenize
from latentprior.evaluation.lm_loss import LMLoss, _document_losses, delta, lm_losses
from latentprior.lm.edits import edit_positions
from latentprior.lm.hooks import edit, find_blocks
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator, normal

LAYER = 1


@pytest.fixture
def batches(tiny_tokenizer, sentences):
    documents = (Document(i, text) for i, text in enumerate(sentences))
    return list(tokenize(documents, tiny_tokenizer, batch_tokens=60, max_length=24))


def direct(model, batches) -> float:
    """Mean next-token loss, a document at a time and without padding."""
    losses = []
    for batch in batches:
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            row = ids[mask][None]
            losses.append(F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


def test_clean_loss_is_the_models(tiny_llm, batches):
    model = tiny_llm("llama")
    losses = lm_losses(model, batches, LAYER, {"same": lambda x, eps: x})
    assert losses["clean"].mean() == pytest.approx(direct(model, batches), abs=1e-5)
    assert torch.equal(losses["same"].total, losses["clean"].total)
    assert losses["clean"].tokens.sum() == sum(int(b.mask[:, 1:].sum()) for b in batches)


def test_replacement_reaches_the_loss_and_sees_every_position_but_the_first(tiny_llm, batches):
    seen = []

    def zero(x, eps):
        seen.append((x.shape[0], eps.clone()))
        return torch.zeros_like(x)

    def zero_again(x, eps):
        seen.append((x.shape[0], eps.clone()))
        return torch.zeros_like(x)

    losses = lm_losses(tiny_llm("llama"), batches, LAYER, {"zero": zero, "again": zero_again})
    assert not torch.allclose(losses["zero"].total, losses["clean"].total)
    assert torch.equal(losses["zero"].total, losses["again"].total)
    assert [n for n, _ in seen[::2]] == [int((b.position > 0).sum()) for b in batches]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen[::2], seen[1::2], strict=True)), "noise differs by method"


def test_no_two_batches_of_any_two_seeds_have_the_same_noise(tiny_llm, batches):
    noises = []

    def keep(x, eps):
        noises.append(tuple(eps[0, :4].tolist()))
        return x

    assert len(batches) > 1
    for seed in range(3):
        lm_losses(tiny_llm("llama"), batches, LAYER, {"keep": keep}, seed=seed)
    assert len(set(noises)) == 3 * len(batches)


REPLACEMENTS = {
    "half": lambda x, eps: x / 2,
    "noise": lambda x, eps: x + eps,
    "zero": lambda x, eps: torch.zeros_like(x),
}


def whole_passes(model, batches, side) -> dict[str, torch.Tensor]:
    """The losses of each replacement when all blocks run for each of them."""
    losses = {}
    for name, replacement in REPLACEMENTS.items():
        parts = []
        for batch in batches:

            def replace(x, at, batch=batch, replacement=replacement):
                return replacement(x, normal(*x.shape, seed=keyed_generator(0, batch.index)))

            with edit_positions(model, {LAYER: replace}, side=side):
                parts.append(_document_losses(model, batch))
        losses[name] = torch.cat(parts)
    return losses


def runs_of_blocks(model, counts: list[int]) -> None:
    """Count in `counts` how often each block really runs."""
    for i, block in enumerate(find_blocks(model)):
        first = next(module for module in block.modules() if module is not block and not list(module.children()))
        first.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))


@pytest.mark.parametrize(
    ("family", "side"),
    [(family, side) for family in FAMILIES for side in ("output", "input", "mlp") if (family, side) != ("opt", "mlp")],
)
def test_blocks_before_the_replacement_run_once_and_nothing_changes(tiny_llm, batches, family, side):
    model = tiny_llm(family)
    expected = whole_passes(model, batches, side)
    forwards = [vars(block).get("forward") for block in find_blocks(model)]
    counts = [0] * LAYERS
    runs_of_blocks(model, counts)
    losses = lm_losses(model, batches, LAYER, REPLACEMENTS, side=side)
    for name, total in expected.items():
        assert torch.equal(losses[name].total, total), name
    skipped = LAYER + (side == "output")
    once, each = len(batches), len(batches) * (1 + len(REPLACEMENTS)) + 1  # and the first batch's check
    assert [count // counts[0] for count in counts[:skipped]] == [1] * skipped
    assert counts[-1] * once == counts[0] * each
    assert [vars(block).get("forward") for block in find_blocks(model)] == forwards


def test_a_model_whose_blocks_share_more_than_they_return_runs_whole(tiny_llm, batches):
    """The first block leaves something behind that the last one uses up."""
    model = tiny_llm("llama")
    blocks, left = find_blocks(model), []
    blocks[0].register_forward_pre_hook(lambda *_: left.clear())
    blocks[0].mlp.register_forward_hook(lambda _module, _args, out: left.append(out))
    blocks[-1].register_forward_hook(lambda _module, _args, out: out + left.pop())
    expected = whole_passes(model, batches, "output")
    losses = lm_losses(model, batches, LAYER, REPLACEMENTS)
    for name, total in expected.items():
        assert torch.equal(losses[name].total, total), name


def test_an_edit_that_is_open_already_is_made_once(tiny_llm, batches):
    model = tiny_llm("llama")
    with edit(model, {0: lambda h: 2 * h}):
        expected = whole_passes(model, batches, "output")
        losses = lm_losses(model, batches, LAYER, REPLACEMENTS)
    for name, total in expected.items():
        assert torch.equal(losses[name].total, total), name


def test_weighting():
    clean = LMLoss(torch.tensor([1.0, 10.0]).double(), torch.tensor([1, 10]))
    worse = LMLoss(torch.tensor([3.0, 15.0]).double(), torch.tensor([1, 10]))
    by_token, by_document = delta(worse, clean), delta(worse, clean, per_document=True)
    assert by_token.delta == pytest.approx(7 / 11)
    assert by_document.delta == pytest.approx((2 + 0.5) / 2)
    assert by_token.interval[0] <= by_token.delta <= by_token.interval[1]


def test_messages(tiny_llm, batches):
    with pytest.raises(InputError, match="choose another name"):
        lm_losses(tiny_llm("llama"), batches, LAYER, {"clean": lambda x, eps: x})
    with pytest.raises(InputError, match="no document"):
        lm_losses(tiny_llm("llama"), [], LAYER, {})
