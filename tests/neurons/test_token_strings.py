from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latentprior.data.tokens import encode
from latentprior.neurons.token_strings import TokenStrings

TEXTS = ["The quick brown fox.", "naïve café 東京 🦊🦊", "  two  spaces\n\nand lines ", "�", "a<eos>b", "x"]


@pytest.mark.parametrize("bos", [True, False])
def test_pieces_joined_are_the_text(bos, make_tokenizer):
    tokenizer = make_tokenizer(bos=bos)
    ids = [np.array(row, np.int32) for row in encode(TEXTS, tokenizer)]
    pieces = TokenStrings(tokenizer).of_documents(ids)
    for text, row, parts in zip(TEXTS, ids, pieces, strict=True):
        assert "".join(parts) == text and len(parts) == len(row)
        assert not bos or parts[0] == ""
    assert pieces[0][1 if bos else 0 :][:2] == [tokenizer.decode([i]) for i in ids[0][1 if bos else 0 :][:2]]


def test_a_character_goes_to_the_last_of_its_tokens(make_tokenizer):
    tokenizer = make_tokenizer(bos=False)
    [ids] = encode(["é!"], tokenizer)
    assert TokenStrings(tokenizer).of_documents([np.array(ids)]) == [["", "é", "!"]]
    assert TokenStrings(tokenizer).of_documents([np.array(ids[:1])]) == [["�"]]  # cut within a character


def test_leading_spaces_survive_tokenizers_that_drop_them():
    vocabulary = {"<unk>": 0, "▁a": 1, "▁the": 2, "s": 3, "a": 4, "▁": 5}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    texts = TokenStrings(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert texts([2, 3, 1]) == [" the", "s", " a"]
    assert texts.of_documents([np.array([2, 3, 1, 2])]) == [["the", "s", " a", " the"]]


def test_each_token_is_decoded_once(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer()
    texts, calls = TokenStrings(tokenizer), []
    decode = tokenizer.batch_decode
    monkeypatch.setattr(
        tokenizer, "batch_decode", lambda ids, **options: calls.append(len(ids)) or decode(ids, **options)
    )
    assert texts([5, 6, 5]) == texts([5, 6, 5]) and calls == [2] and texts([]) == []
