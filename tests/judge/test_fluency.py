"""Fluency: the likelihood is the model's own whatever the padding and the chunks, and repetition is counted right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.judge import conditional_nll, distinct_ngrams, longest_repeat, repetition
from latentprior.utils.errors import InputError

PROMPTS = [[0, 5, 6, 7], [0, 8], [0]]
NEW = [[11, 12, 13], [14], [15, 16]]


def by_hand(model, prompt: list[int], new: list[int]) -> float:
    """The mean loss of one continuation, from one plain forward pass without padding."""
    logp = model(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    return -float(np.mean([logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(new)]))


def padded(rows: list[list[int]], side: str, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    left = side == "left"
    ids = [[filler] * (width - len(r)) * left + r + [filler] * (width - len(r)) * (not left) for r in rows]
    mask = [[0] * (width - len(r)) * left + [1] * len(r) + [0] * (width - len(r)) * (not left) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_models_own_likelihood(tiny_llm, family, side):
    model = tiny_llm(family)
    ids, attention = padded(PROMPTS, side, 9)
    new, mask = padded(NEW, "right", 17)
    inputs = {"input_ids": ids, "attention_mask": attention}
    expected = [by_hand(model, prompt, row) for prompt, row in zip(PROMPTS, NEW, strict=True)]
    assert conditional_nll(model, inputs, new, mask.bool()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("largest", [1, 2**25])
def test_copies_of_a_prompt_share_it(tiny_llm, family, largest):
    model = tiny_llm(family)
    ids, attention = padded(PROMPTS, "right", 9)
    new, mask = padded([row for row in NEW for _ in range(2)], "right", 17)
    new[1::2] += 20
    inputs = {"input_ids": ids, "attention_mask": attention}
    lengths = mask.sum(1).tolist()
    expected = [
        by_hand(model, PROMPTS[i // 2], row[:n].tolist()) for i, (row, n) in enumerate(zip(new, lengths, strict=True))
    ]
    found = conditional_nll(model, inputs, new, mask.bool(), copies=2, largest_logits=largest)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("largest", [1, 3000, 2**25])
def test_chunks_change_nothing_and_bound_the_logits(tiny_llm, largest):
    model = tiny_llm("llama")
    ids = torch.randint(3, 300, (7, 4), generator=torch.Generator().manual_seed(0))
    new = torch.randint(3, 300, (7, 3), generator=torch.Generator().manual_seed(1))
    whole = conditional_nll(model, {"input_ids": ids}, new)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.numel()))
    assert conditional_nll(model, {"input_ids": ids}, new, largest_logits=largest) == pytest.approx(whole, abs=1e-6)
    one_row = 4 * model.config.vocab_size
    assert max(seen) <= max(one_row, largest)
    assert len(seen) == {1: 7, 3000: 4, 2**25: 1}[largest]


def test_a_continuation_without_tokens_has_no_likelihood(tiny_llm):
    new = torch.tensor([[5, 6], [5, 6]])
    mask = torch.tensor([[True, True], [False, False]])
    nll = conditional_nll(tiny_llm("llama"), {"input_ids": torch.tensor([[0, 3], [0, 3]])}, new, mask)
    assert np.isnan(nll).tolist() == [False, True] and nll.dtype == np.float64
    assert len(conditional_nll(tiny_llm("llama"), {"input_ids": torch.ones(0, 2).long()}, torch.ones(0, 2).long())) == 0


def test_messages(tiny_llm):
    model, new = tiny_llm("llama"), torch.tensor([[5, 6]])
    with pytest.raises(InputError, match="same rows"):
        conditional_nll(model, {"input_ids": torch.tensor([[0], [0]])}, new)
    with pytest.raises(InputError, match="needs a token"):
        conditional_nll(model, {"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[0]])}, new)
    with pytest.raises(InputError, match="at least one token"):
        distinct_ngrams([1, 2], 0)


def test_distinct_ngrams():
    assert distinct_ngrams([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct_ngrams([1], 2) == 1.0


def test_longest_repeat():
    assert longest_repeat([]) == longest_repeat([1]) == longest_repeat([1, 2, 3]) == 0
    assert longest_repeat([1, 1]) == 1
    assert longest_repeat([1, 1, 1]) == 2  # overlapping
    assert longest_repeat([1, 2, 3, 9, 1, 2, 3]) == 3
    figures = {"distinct_2": 0.8, "distinct_3": 1.0, "longest_repeat": 2, "tokens": 6}
    assert repetition([1, 2, 9, 1, 2, 4]) == figures


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2), max_size=14))
def test_longest_repeat_is_that_of_a_search_through_all_pairs(ids):
    lengths = [
        n
        for n in range(1, len(ids))
        for i in range(len(ids) - n + 1)
        for j in range(i)
        if ids[i : i + n] == ids[j : j + n]
    ]
    assert longest_repeat(ids) == max(lengths, default=0)
