from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers.utils import logging

from latentprior.config import LLMConfig
from latentprior.lm.loading import load_llm, load_tokenizer
from latentprior.utils.devices import fast_dtype
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat


@pytest.fixture
def folder(tmp_path, tiny_llm, tiny_tokenizer):
    """A model folder on disk, as `save_pretrained` leaves it."""
    tiny_llm("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_local_folder(folder, tiny_llm, tiny_tokenizer, capfd):
    capfd.readouterr()
    model, tokenizer = load_llm(LLMConfig(model=str(folder), dtype="float32"), "cpu")
    assert capfd.readouterr() == ("", "")  # neither prints nor draws bars
    assert logging.is_progress_bar_enabled()  # and leaves the caller's bars as they were
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and model.config._name_or_path == str(folder)
    ids = torch.tensor([[0, 5, 6]])
    assert torch.equal(model(ids).logits, tiny_llm("llama")(ids).logits)
    assert tokenizer.encode("hello") == tiny_tokenizer.encode("hello")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template and tokenizer.name_or_path == str(folder)


@pytest.mark.parametrize(("asked", "given"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(folder, asked, given):
    assert load_llm(LLMConfig(model=str(folder), dtype=asked), "cpu")[0].dtype == given


def test_auto_dtype(folder, monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        expected = torch.bfloat16 if fast else torch.float32
        assert fast_dtype(torch.device("cpu")) == expected
        assert load_llm(LLMConfig(model=str(folder)), "cpu")[0].dtype == expected
    assert fast_dtype(torch.device("meta")) == torch.float32


def test_the_global_generator_is_left_alone(folder):
    state = torch.random.get_rng_state()
    load_llm(LLMConfig(model=str(folder)), "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def refused(**options) -> str:
    with pytest.raises(InputError) as error:
        load_llm(LLMConfig(**options), "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_code_of_its_own_is_refused(folder):
    marker = folder / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    message = refused(model=str(folder))
    assert "set trust_remote_code to true" in message and str(folder) in message
    assert not marker.exists()


def test_unknown_models(folder, tmp_path):
    for name in ("no/such/place", "/nowhere", "../x", "$(touch x)", "a b"):
        assert f"no such model: {name!r}" in refused(model=name)
    assert "cannot load the model 'someone/no-such-model'" in refused(model="someone/no-such-model")
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refused(model=str(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(model=str(folder))


def test_pickled_weights_are_refused(folder, tiny_llm):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llm("llama").state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refused(model=str(folder))


def test_truncated_weights_are_one_line(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot load the model" in refused(model=str(folder))


def test_unknown_architecture_is_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    assert "nonsense" in refused(model=str(folder))


def test_bars_are_restored_after_an_error(folder):
    (folder / "model.safetensors").write_bytes(b"")
    refused(model=str(folder))
    assert logging.is_progress_bar_enabled()


@pytest.mark.gpu
def test_auto_is_cuda_in_bfloat16(folder):
    model, _ = load_llm(LLMConfig(model=str(folder)))
    assert model.device == torch.device("cuda", torch.cuda.current_device())
    assert model.dtype == fast_dtype(model.device)


# --- SmolLM2


def test_smollm2_has_no_revisions():
    assert "has no revision 'main'" in refused(model="smollm2-135m", revision="main")


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2():
    model, tokenizer = load_llm(LLMConfig(dtype="bfloat16"), "cpu")
    assert model.config._name_or_path == tokenizer.name_or_path == "smollm2-135m"
    assert model.dtype == torch.bfloat16 and not hasattr(model, "hf_quantizer")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.pad_token_id) == ("<|im_start|>", 1, 2)
    assert tokenizer.encode("Hello")[0] != 1  # adds no BOS by itself
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    ids = torch.tensor([[1, *tokenizer.encode("The capital of France is")]])
    best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
    assert load_tokenizer(LLMConfig()).get_vocab() == tokenizer.get_vocab()


@pytest.mark.assets
@pytest.mark.slow
def test_smollm2_is_made_without_a_word_and_read_back(tmp_path, monkeypatch, capfd):
    from latentprior.lm import assets

    monkeypatch.setattr(assets, "cache_folder", lambda name: tmp_path)
    config = LLMConfig(dtype="bfloat16")
    capfd.readouterr()
    made = load_llm(config, "cpu")[0].state_dict()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(assets, "sync_files", None)  # building again would now fail
    again = load_llm(config, "cpu")[0].state_dict()
    assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in made)
    shutil.rmtree(tmp_path)
