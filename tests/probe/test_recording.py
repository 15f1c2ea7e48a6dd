from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import FAMILIES, build_llm, build_tokenizer
from latentprior.data.store.reader import ActivationStore
from latentprior.lm.hooks import Hookpoint, capture
from latentprior.probe import recording as module
from latentprior.probe.recording import Recording, record_texts, text_key
from latentprior.utils.errors import InputError

TOKENIZER = build_tokenizer()
TEXTS = [" ".join(f"w{(i * j) % 17}" for j in range(1 + i % 9)) + f" {i}" for i in range(23)]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"opt"}))
def test_rows_are_the_last_tokens_of_the_model_itself(name, tmp_path):
    model = build_llm(name)
    found = record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 2), tmp_path, batch_tokens=64)
    assert found.has(TEXTS).all()
    for text in TEXTS[::5]:
        ids = torch.tensor([[0, *TOKENIZER.encode(text)]])
        with capture(model, [2]) as output, capture(model, range(3), side="mlp") as units, torch.no_grad():
            model(ids)
        torch.testing.assert_close(found.output([text])[0], output[2][0, -1], rtol=1e-4, atol=1e-5)
        for block in range(3):
            torch.testing.assert_close(found.mlp([text], block)[0], units[block][0, -1], rtol=1e-4, atol=1e-5)
    assert [h.layer for h in found.mlp_hookpoints] == [0, 1, 2]


def test_mlps_that_mix_the_tokens_up_are_refused(tmp_path):
    model = build_llm("opt")
    with pytest.raises(InputError, match="unsupported architecture"):
        record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 2), tmp_path)
    assert record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 2), tmp_path / "b", mlp=False).has(TEXTS).all()


def test_long_texts_keep_their_end(tmp_path):
    model, text = build_llm(), " ".join(f"word{i}" for i in range(60))
    found = record_texts(model, TOKENIZER, [text], Hookpoint.of(model, 1), tmp_path, max_length=12)
    ids = torch.tensor([[0, *TOKENIZER.encode(text)[-11:]]])
    with capture(model, [1]) as output, torch.no_grad():
        model(ids)
    torch.testing.assert_close(found.output([text])[0], output[1][0, -1], rtol=1e-4, atol=1e-5)


def test_more_texts_record_only_what_is_new(tmp_path, monkeypatch):
    model, seen = build_llm(), []
    real = module.tokens.tokenize

    def counted(documents, *arguments, **options):
        documents = list(documents)
        seen.append(len(documents))
        return real(documents, *arguments, **options)

    monkeypatch.setattr(module.tokens, "tokenize", counted)
    here = Hookpoint.of(model, 1)
    first = record_texts(model, TOKENIZER, TEXTS[:9], here, tmp_path)
    before = first.output(TEXTS[:9])
    both = record_texts(model, TOKENIZER, TEXTS + TEXTS[:3], here, tmp_path)
    assert seen == [9, 14]
    assert torch.equal(both.output(TEXTS[:9]), before)
    assert both.output(list(reversed(TEXTS))).shape == (23, 32)


def test_a_kill_between_the_stores_loses_and_mixes_up_nothing(tmp_path, run_killed, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TEXTS", 5)
    model = build_llm()
    whole = record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 1), tmp_path / "whole")
    for changes in (14, 19):
        folder = tmp_path / str(changes)
        assert not run_killed(_record, str(folder), changes=changes)
        again = record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 1), folder)
        assert again.has(TEXTS).all()
        torch.testing.assert_close(again.output(TEXTS), whole.output(TEXTS), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.mlp(TEXTS, 1), whole.mlp(TEXTS, 1), rtol=1e-4, atol=1e-5)


def _record(folder: str) -> None:
    module.SHARD_TEXTS = 5
    model = build_llm()
    record_texts(model, TOKENIZER, TEXTS, Hookpoint.of(model, 1), folder, batch_tokens=32)


def test_what_is_not_finite_is_left_out(tmp_path):
    model = build_llm()
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER.encode("?")[0]] = torch.nan
    found = record_texts(model, TOKENIZER, ["fine", "not fine ?", ""], Hookpoint.of(model, 1), tmp_path)
    assert found.has(["fine", "not fine ?", ""]).tolist() == [True, False, False]
    assert ActivationStore(tmp_path / "output").manifest["left_out"]["nonfinite"] == 1
    with pytest.raises(KeyError):
        found.output(["not fine ?"])


def test_another_place_or_length_is_refused(tmp_path):
    model = build_llm()
    record_texts(model, TOKENIZER, TEXTS[:3], Hookpoint.of(model, 1), tmp_path, mlp=False)
    with pytest.raises(InputError, match="hookpoints"):
        record_texts(model, TOKENIZER, TEXTS[:3], Hookpoint.of(model, 2), tmp_path, mlp=False)
    with pytest.raises(InputError, match="max_length"):
        record_texts(model, TOKENIZER, TEXTS[:3], Hookpoint.of(model, 1), tmp_path, mlp=False, max_length=9)
    with pytest.raises(InputError, match="no MLP units of block 0"):
        Recording(tmp_path).mlp(TEXTS[:3], 0)


def test_keys_fit_the_store():
    keys = np.array([text_key(text) for text in TEXTS])
    assert keys.dtype == np.int64 and (keys >= 0).all() and len(set(keys)) == len(TEXTS)
