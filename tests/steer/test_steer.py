"""Directions, and a sweep on a tiny model: what it measures follows from what it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentprior.errors import InputError
from latentprior.steer import difference_of_means, sweep
from latentprior.steer.sweep import conditional_nll, distinct_ngrams

PROMPTS = ["The quick brown", "A language model keeps what", "She"]


def vowels(texts) -> np.ndarray:
    """Share of vowels: a concept that needs no model."""
    return np.array([sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts])


@pytest.fixture
def parts(tiny_llm, tiny_glp, tiny_tokenizer):
    model = tiny_llm("llama")
    glp = tiny_glp(model.config.hidden_size, layers=(1,), model=model.config._name_or_path)
    glp.normalizer.mean_norm[:] = 5.0
    direction = torch.randn(glp.width, generator=torch.Generator().manual_seed(0))
    return glp, model, tiny_tokenizer, direction / direction.norm()


def test_difference_of_means():
    positive, negative = torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert difference_of_means(positive, negative).tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="same mean"):
        difference_of_means(positive, positive)
    with pytest.raises(InputError, match="both sides"):
        difference_of_means(positive, negative[:0])


def test_strength_zero_changes_nothing_unless_it_is_repaired(parts):
    result = sweep(*parts, PROMPTS, vowels, strengths=[0.0, 1.0], new_tokens=5)
    plain = next(e["text"] for e in result["examples"] if e["method"] == "unsteered")
    zero = {e["method"]: e["text"] for e in result["examples"] if e["strength"] == 0.0 and e["prompt"] == PROMPTS[0]}
    assert zero["plain"] == zero["paired"] == zero["unsteered"] == plain
    rows = {(r["method"], r["strength"]): r for r in result["rows"]}
    assert rows["plain", 0.0]["nll"] == pytest.approx(result["unsteered"]["nll"])
    assert rows["paired", 0.0]["nll"] == pytest.approx(result["unsteered"]["nll"])


def test_plain_steering_keeps_its_edit_and_repair_some_of_it(parts):
    result = sweep(*parts, PROMPTS, vowels, strengths=[1.0], new_tokens=5)
    retention = {r["method"]: r["retention"] for r in result["rows"]}
    assert retention["plain"] == pytest.approx(1.0, abs=1e-4)
    assert retention["repaired"] != pytest.approx(1.0, abs=1e-3)
    assert result["nfe"] == 4 and result["mean_norm"] == 5.0


def test_sweep_repeats_itself(parts):
    again = [sweep(*parts, PROMPTS, vowels, strengths=[0.5], new_tokens=4) for _ in range(2)]
    assert again[0] == again[1]


def test_conditional_nll_is_the_models(parts):
    _, model, tokenizer, _ = parts
    ids = torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    new = torch.tensor([[11, 12], [13, 14]])
    logp = model(torch.cat([ids, new], 1)).logits.log_softmax(-1)
    expected = [-(logp[i, 3, new[i, 0]] + logp[i, 4, new[i, 1]]) / 2 for i in range(2)]
    assert conditional_nll(model, inputs, new) == pytest.approx([float(e) for e in expected], abs=1e-5)


def test_distinct_ngrams():
    assert distinct_ngrams([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct_ngrams([1], 2) == 1.0


def test_messages(parts):
    with pytest.raises(InputError, match="prompts and strengths"):
        sweep(*parts, [], vowels, strengths=[1.0])
    parts[0].normalizer.mean_norm[:] = float("nan")
    with pytest.raises(InputError, match="mean activation norm"):
        sweep(*parts, PROMPTS, vowels, strengths=[1.0])
