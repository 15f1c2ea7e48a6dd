"""Continuations of shared prompts, and what a monitor measures of an edit."""

from __future__ import annotations

import pytest
import torch

from latentprior.data.prompts import prefilled, tokenized
from latentprior.lm.edits import EditedPositions
from latentprior.lm.hooks import Hookpoint
from latentprior.steer.direction import Direction
from latentprior.steer.generate import EditMonitor, generate_continuations
from latentprior.steer.intervention import Edit, steering
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat

TEXTS = ["The quick brown fox", "She", "A language model keeps what it has seen"]
NEW = 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3"])
def test_sharing_the_prompts_changes_no_token(family, tiny_llm, tiny_tokenizer):
    model, prompts = tiny_llm(family), tokenized(tiny_tokenizer, TEXTS)
    hookpoint = Hookpoint.of(model, 1)
    direction = Direction.of(torch.arange(1.0, 1 + hookpoint.width), hookpoint, "ramp", "random")
    strengths = torch.tensor([0.0, 0.7, -0.7]).repeat(len(TEXTS))

    def steered(share: bool) -> torch.Tensor:
        context = steering(model, Edit(direction, strengths), mean_norm=3.0, positions="last")
        return generate_continuations(model, prompts, 3, NEW, context, share=share)[0]

    plain = generate_continuations(model, prompts, 1, NEW)[0]
    assert torch.equal(steered(True), steered(False))
    assert torch.equal(steered(True)[::3], plain)
    assert not torch.equal(steered(True)[1::3], plain)


def test_the_shared_cache_holds_all_but_the_last_token(tiny_llm, tiny_tokenizer):
    prompts = tokenized(tiny_tokenizer, TEXTS)
    cache = prefilled(tiny_llm(), prompts.ids, prompts.mask, 2)
    assert cache.get_seq_length() == prompts.ids.shape[1] - 1
    assert cache.layers[0].keys.shape[0] == 2 * len(TEXTS)


def test_chat_prompts_end_where_the_model_answers(tiny_llm, tiny_tokenizer, monkeypatch):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    chat, plain = tokenized(tiny_tokenizer, ["fox"], chat=True), tokenized(tiny_tokenizer, ["<fox>:"])
    assert torch.equal(chat.ids[:, -3:], plain.ids[:, -3:])
    assert generate_continuations(tiny_llm(), chat, 2, 3)[0].shape == (2, 3)


def test_messages(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no prompts"):
        tokenized(tiny_tokenizer, [])
    with pytest.raises(InputError, match="no chat template"):
        tokenized(tiny_tokenizer, ["fox"], chat=True)


def at(n: int) -> EditedPositions:
    return EditedPositions(1, torch.arange(n), torch.full((n,), 2), n)


def test_a_monitor_tells_along_from_across():
    clean = torch.zeros(3, 4)
    push = torch.tensor([[2.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 0]])
    halved = torch.tensor([[1.0, 3.0, 0, 0], [0, 4.0, 0, 0], [0, 0, 5.0, 0]])
    monitor = EditMonitor(lambda *_: halved, 3, mean_norm=10.0, keep=0)
    assert torch.equal(monitor(clean, clean + push, at(3), push), halved)
    assert monitor.retention()[:2].tolist() == [0.5, 1.0] and monitor.retention()[2].isnan()
    torch.testing.assert_close(monitor.moved(), torch.tensor([0.3, 0.0, 0.5]))


def test_a_monitor_without_repair_keeps_the_edit():
    clean, push = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    monitor = EditMonitor(None, 2, 1.0, keep=0)
    assert torch.equal(monitor(clean, clean + push, at(2), push), clean + push)
    torch.testing.assert_close(monitor.retention(), torch.ones(2))
    assert monitor.moved().max() < 1e-6


def test_scores_are_those_of_the_kept_call(tiny_glp):
    glp = tiny_glp(32)
    clean = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    monitor = EditMonitor(None, 3, 1.0, keep=1)  # the batch's third row is a sink: it is never given
    for push in (torch.zeros(2, 32), torch.full((2, 32), 9.0)):
        monitor(clean, clean + push, at(2), push)
    scores = monitor.off_manifold(glp, None, seed=5)
    torch.testing.assert_close(scores[0, :2], glp.score(clean, generator=5))
    torch.testing.assert_close(scores[1, :2], glp.score(clean + 9.0, generator=5))
    assert torch.equal(scores[1, :2], scores[2, :2]) and scores[:, 2].isnan().all()
