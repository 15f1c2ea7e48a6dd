"""One's own GGUF files: the model in them is the one that was written, and what cannot be read is one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gguf_file import Kind, write_model
from latentprior.cli.commands import main
from latentprior.config import EMBEDDED, SMOLLM2, LLMConfig, PlanConfig, from_dict, to_dict
from latentprior.lm import assets
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm, load_tokenizer
from latentprior.scaling.plan import plan
from latentprior.utils.errors import InputError

IDS = torch.tensor([[0, 5, 8, 13, 21]])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"

    def place(name: str) -> Path:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    monkeypatch.setattr(assets, "cache_folder", place)
    return folder


def loaded(path: str, **options):
    return load_llm(LLMConfig(gguf=path, dtype="float32", **options))


def refused(path: object, **options) -> str:
    with pytest.raises(InputError) as error:
        loaded(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_model_in_the_file(tmp_path, cache, tiny_llm, tiny_tokenizer, capfd):
    original = tiny_llm()
    path = write_model(tmp_path / "mine.gguf", original, tiny_tokenizer)
    capfd.readouterr()
    model, tokenizer = loaded(path)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-6, rtol=0)
    assert tokenizer.encode("the sea shore") == tiny_tokenizer.encode("the sea shore")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.Q8_0, "BF16"), (Kind.BF16, "BF16"), (Kind.F16, "F32")])
def test_no_weight_is_kept_in_less_than_the_file_has(tmp_path, cache, tiny_llm, tiny_tokenizer, kind, dtype):
    original = tiny_llm()
    model, _ = loaded(write_model(tmp_path / "mine.gguf", original, tiny_tokenizer, kind))
    (weights,) = cache.glob("*/*/model.safetensors")
    header = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {dtype}
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=0.02, rtol=0)
    if kind is Kind.F16:  # which bfloat16 would round
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(model.state_dict()[name], original.state_dict()[name].half().float())


def test_dequantised_once_and_again_when_the_file_changes(tmp_path, cache, tiny_llm, tiny_tokenizer, monkeypatch):
    first, second = tiny_llm(), tiny_llm(seed=1)
    path = write_model(tmp_path / "mine.gguf", first, tiny_tokenizer)
    loaded(path)
    with monkeypatch.context() as patch:
        patch.setattr(assets, "sync_files", None)  # building again would now fail
        loaded(path)
    write_model(Path(path), second, tiny_tokenizer)
    os.utime(path, ns=(0, 1))
    model, _ = loaded(path)
    torch.testing.assert_close(model(IDS).logits, second(IDS).logits, atol=1e-6, rtol=0)
    (tmp_path / "other").mkdir()
    other = write_model(tmp_path / "other" / "mine.gguf", first, tiny_tokenizer)  # the same name elsewhere
    os.utime(other, ns=(0, 1))
    torch.testing.assert_close(loaded(other)[0](IDS).logits, first(IDS).logits, atol=1e-6, rtol=0)


def test_its_name_is_the_files_or_the_one_given(tmp_path, cache, tiny_llm, tiny_tokenizer):
    path = write_model(tmp_path / "mine.Q8_0.gguf", tiny_llm(), tiny_tokenizer)
    model, tokenizer = loaded(path)
    assert Hookpoint.of(model, 1).model == tokenizer.name_or_path == "mine.Q8_0"
    model, tokenizer = loaded(path, model="Qwen/Qwen3-0.6B")
    assert Hookpoint.of(model, 1).model == tokenizer.name_or_path == "Qwen/Qwen3-0.6B"
    config = LLMConfig(gguf=path)
    assert from_dict(LLMConfig, to_dict(config)) == config


def test_the_tokenizer_is_the_model_folders_if_it_has_one(tmp_path, cache, tiny_llm, make_tokenizer):
    ours = make_tokenizer(chat=True)
    path = write_model(tmp_path / "mine.gguf", tiny_llm(), make_tokenizer(chat=False))
    folder = tmp_path / "model"
    folder.mkdir()
    assert load_tokenizer(LLMConfig(str(folder), gguf=path)).chat_template is None
    ours.save_pretrained(folder)
    assert load_tokenizer(LLMConfig(str(folder), gguf=path)).chat_template == ours.chat_template


def test_a_file_without_tokenizer_needs_the_model_folders(tmp_path, cache, tiny_llm, tiny_tokenizer):
    path = write_model(tmp_path / "mine.gguf", tiny_llm())
    message = refused(path)
    assert "cannot read the tokenizer" in message and message.endswith("name a folder that has it with --llm.model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = loaded(path, model=str(tmp_path / "model"))
    assert tokenizer.encode("sea") == tiny_tokenizer.encode("sea")
    assert model(IDS).logits.isfinite().all()


def test_what_is_no_model_is_one_line(tmp_path, cache, tiny_llm, tiny_tokenizer):
    assert refused(tmp_path / "none.gguf") == f"no such GGUF file: {str(tmp_path / 'none.gguf')!r}"
    assert "no such GGUF file" in refused(tmp_path)
    (tmp_path / "text.gguf").write_text("not a model")
    assert "is no GGUF file" in refused(tmp_path / "text.gguf")
    whole = Path(write_model(tmp_path / "whole.gguf", tiny_llm(), tiny_tokenizer)).read_bytes()
    for size in (4, 40, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert "cannot read the model" in refused(tmp_path / "cut.gguf")
    odd = write_model(tmp_path / "odd.gguf", tiny_llm(), tiny_tokenizer, architecture="nonsense")
    assert "nonsense" in refused(odd)
    holed = write_model(tmp_path / "holed.gguf", tiny_llm(), tiny_tokenizer, without="blk.2.ffn_up.weight")
    assert "'holed.gguf' lacks 1 weights of LlamaForCausalLM, such as model.layers.2.mlp.up_proj" in refused(holed)
    part = write_model(tmp_path / "part.gguf", tiny_llm(), tiny_tokenizer, split_count=3)
    assert "'part.gguf' is one of 3 parts" in refused(part)
    assert not list(cache.glob("*/*/config.json"))  # nothing half-made stays
    with pytest.raises(InputError, match="no revision 'main'"):
        LLMConfig(gguf=part, revision="main")


def test_commands_take_it(tmp_path, cache, tiny_llm, tiny_tokenizer, write_texts):
    path = write_model(tmp_path / "mine.gguf", tiny_llm(), tiny_tokenizer)
    texts = write_texts(tmp_path / "texts.jsonl", 20)
    store = tmp_path / "store"
    assert main(["record", "--llm.gguf", path, "--layers", "1", "--text.dataset", texts, "--output", str(store)]) == 0
    (hookpoint,) = json.loads((store / "manifest.json").read_text())["hookpoints"]
    assert hookpoint["model"] == "mine"
    result = plan(PlanConfig(llm=LLMConfig(gguf=path), layers=[1]))
    assert (result["llm"]["width"], result["llm"]["blocks"]) == (32, 4)
    with pytest.raises(InputError, match="no such GGUF file"):
        plan(PlanConfig(llm=LLMConfig(gguf="nowhere.gguf")))


@pytest.mark.assets
@pytest.mark.slow
def test_the_embedded_file_is_the_embedded_model(tmp_path, cache):
    path = tmp_path / "smol.gguf"
    with assets.gguf_of(EMBEDDED[SMOLLM2], tmp_path) as file:
        shutil.copy(file, path)
    mine, my_tokenizer = load_llm(LLMConfig(gguf=str(path), dtype="bfloat16"))
    theirs, tokenizer = load_llm(LLMConfig(dtype="bfloat16"))
    ours, others = mine.state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    assert my_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert my_tokenizer.chat_template == tokenizer.chat_template
