"""The doctor: all is well on good models, and on a model that is broken in one way the line of that way fails."""

from __future__ import annotations

import functools
import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from conftest import FAMILIES
from latentprior.cli.commands import FAILED, main
from latentprior.config import DoctorConfig, LLMConfig
from latentprior.doctor import checks, doctor, examine, subject
from latentprior.lm.edits import EditCounts
from latentprior.prior.glp import GLP
from latentprior.utils.errors import InputError

CACHED, PADDING = "cached equals uncached", "left padding equals single rows"
RECORDING, IDENTITY = "recording equals hidden_states", "identity prior"


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", 0.0)
    monkeypatch.setattr(checks, "SPEED", (2, 16))


def by_name(found) -> dict:
    json.dumps([asdict(check) for check in found])
    return {check.name: check for check in found}


def failing(found) -> dict[str, str]:
    """The lines that failed, none of which is a traceback or more than one line."""
    failed = {check.name: check.detail for check in found if check.status == "failed"}
    assert not any("\n" in detail or "Traceback" in detail for detail in failed.values())
    return failed


# all is well


@pytest.mark.parametrize("family", FAMILIES)
def test_every_line_is_well(family, tmp_path, tiny_llm, tiny_tokenizer, tiny_glp):
    model, folder = tiny_llm(family), tmp_path / f"tiny-{family}"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    tiny_glp(32, (2,), str(folder)).save_pretrained(tmp_path / "prior")
    lines = by_name(doctor(DoctorConfig(str(tmp_path / "prior"), llm=LLMConfig(str(folder)))))
    assert {name: line.detail for name, line in lines.items() if line.status != "ok"} == {}
    assert list(lines) == list(checks.CHECKS)
    assert "4 at " in lines["blocks found"].detail and "layer 2 is examined" in lines["blocks found"].detail
    assert "float32" in lines[CACHED].detail and "identical tokens, 62 positions edited" in lines[IDENTITY].detail


@pytest.mark.assets
@pytest.mark.slow
def test_the_embedded_model_is_well():
    lines = by_name(doctor(DoctorConfig()))
    assert {line.detail for line in lines.values() if line.status == "skipped"} == {
        "no --prior given", "needs: prior loads", "needs: prior fits the model",
    }  # fmt: skip
    assert {name: line.detail for name, line in lines.items() if line.status == "failed"} == {}
    assert "30 at model.layers (LlamaDecoderLayer), width 576; layer 15" in lines["blocks found"].detail


def test_a_model_is_as_it_was_before(tiny_llm, tiny_tokenizer):
    model = tiny_llm().bfloat16()
    model(torch.tensor([[0, 1]]), output_hidden_states=True)  # for which transformers leaves hooks of its own

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    hooked = hooks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, places = torch.get_rng_state(), {name: id(p) for name, p in model.named_parameters()}
    lines = by_name(examine(model, tiny_tokenizer))
    assert not failing(lines.values()) and "float32" in lines[CACHED].detail
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: id(p) for name, p in model.named_parameters()} == places
    assert hooks() == hooked
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(("blocks", "layer"), [(4, 0), (4, 3), (1, 0)])
def test_first_last_and_only_blocks(blocks, layer, tiny_llm, tiny_tokenizer):
    lines = by_name(examine(tiny_llm(layers=blocks), tiny_tokenizer, layer=layer))
    assert not failing(lines.values())
    assert lines[RECORDING].detail.startswith(f"identical for {blocks - 1} of {blocks} blocks")


def test_without_room_for_float32_the_models_own_precision_is_compared(tiny_llm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(subject, "device_memory", lambda device: 1000)
    lines = by_name(examine(tiny_llm().bfloat16(), tiny_tokenizer))
    assert not failing(lines.values())
    assert "(bfloat16, tolerance 0.3)" in lines[CACHED].detail and "bfloat16" in lines[PADDING].detail


def test_ties_are_no_difference_and_other_tokens_hide_what_comes_after():
    tokens, logits = torch.tensor([[5, 6, 7]]), torch.randn(1, 3, 11, generator=torch.Generator().manual_seed(0))
    assert subject.logit_distance((tokens, logits), (tokens, logits)) == 0
    other = logits.clone()
    other[:, 2] += 10  # behind the first different token
    assert subject.logit_distance((torch.tensor([[5, 8, 7]]), other), (tokens, logits)) == 0
    assert subject.logit_distance((tokens, other), (tokens, logits)) > 5
    other = logits.clone()
    other[:, 0] += 10
    assert subject.logit_distance((torch.tensor([[8, 6, 7]]), other), (tokens, logits)) > 5


def test_layers(tiny_llm, tiny_tokenizer, tiny_glp):
    def layer(glp=None, wanted=None) -> int:
        model = subject.Subject("cpu", lambda: (tiny_llm(), tiny_tokenizer), lambda: glp, wanted, glp)
        return model.layer

    assert layer() == 2
    assert layer(tiny_glp(32, (1, 3), "tiny-llama")) == 1
    assert layer(tiny_glp(32, (1, 3), "tiny-llama"), 3) == 3
    assert layer(tiny_glp(32, (9,), "another")) == 2
    assert layer(wanted=0) == 0
    assert failing(examine(tiny_llm(), tiny_tokenizer, layer=9))["blocks found"].startswith("layer 9 is out of range")


@pytest.mark.parametrize("kind", [{"bos": False}, {"pad": False}, {"chat": False}, {"adds_bos": True}])
def test_tokenizers(kind, tiny_llm, make_tokenizer):
    assert not failing(examine(tiny_llm(), make_tokenizer(**kind)))


# models that are broken in one way


def with_forward(model, change):
    """The model, its forward replaced by `change(forward, inputs)`."""
    forward = model.forward

    @functools.wraps(forward)
    def changed(*args, **inputs):
        if args:
            inputs["input_ids"] = args[0]
        return change(forward, inputs)

    model.forward = changed
    return model


def test_a_cache_under_an_unknown_name(tiny_llm, tiny_tokenizer):
    """As transformers 5.24 does, and further hidden: no name, no type and no mask tell that there is a cache."""
    model = tiny_llm()
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def hidden(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        names = [name for name, value in inputs.items() if hasattr(value, "get_seq_length")]
        inputs["state"] = [(name, inputs.pop(name)) for name in names]
        if (mask := inputs.get("attention_mask")) is None or mask.all():
            for name in ("attention_mask", "position_ids", "cache_position"):
                inputs.pop(name, None)
        return inputs

    model.prepare_inputs_for_generation = hidden
    with_forward(model, lambda forward, inputs: forward(**dict(inputs.pop("state", ())), **inputs))
    assert "do not tell which positions they compute" in failing(examine(model, tiny_tokenizer))[CACHED]


def test_positions_that_are_read_wrongly_under_a_cache(tiny_llm, tiny_tokenizer, monkeypatch):
    edit_positions = subject.edit_positions

    def shifted(model, edits):
        def late(edit):
            return lambda x, at: edit(x, replace(at, position=at.position + (len(x) == at.batch)))

        return edit_positions(model, {layer: late(edit) for layer, edit in edits.items()})

    monkeypatch.setattr(subject, "edit_positions", shifted)
    failed = failing(examine(tiny_llm(), tiny_tokenizer))
    assert failed[CACHED].startswith("under a push, generation with a key-value cache differs from generation without")


class Unhooked(nn.Module):
    """A block that is called past its hooks, as compiled code does."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def test_hooks_that_do_not_take_effect(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    kind = type("Block", (Unhooked, type(model.model.layers[0])), {})
    for block in model.model.layers:
        block.__class__ = kind
    failed = failing(examine(model, tiny_tokenizer))
    assert failed[RECORDING] == "the hooks of 4 of 4 blocks did not run"
    assert failed["norms and sinks"] == "the hooks of layers [2] did not run: they cannot be read"


def test_compiled_blocks(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    model.model.layers[2]._compiled_call_impl = model.model.layers[2].forward  # as `compile()` leaves it
    assert "was compiled, and compiled modules ignore hooks" in failing(examine(model, tiny_tokenizer))["blocks found"]


def test_hidden_states_that_are_off_by_one(tiny_llm, tiny_tokenizer):
    def shifted(forward, inputs):
        out = forward(**inputs)
        if out.hidden_states is not None:
            out.hidden_states = (out.hidden_states[0], *out.hidden_states[:-1])
        return out

    failed = failing(examine(with_forward(tiny_llm(), shifted), tiny_tokenizer))
    assert failed == {RECORDING: "the output of block 0 is not hidden_states[1], but hidden_states[2]"}


def test_recorded_activations_of_other_places(tiny_llm, tiny_tokenizer, monkeypatch):
    recorded = checks.activations

    def shifted(*args, **options):
        for batch in recorded(*args, **options):
            yield replace(batch, x=batch.x.roll(1, dims=0))

    monkeypatch.setattr(checks, "activations", shifted)
    failed = failing(examine(tiny_llm(), tiny_tokenizer))
    assert list(failed) == [RECORDING] and "activations recorded at layer 2 are" in failed[RECORDING]


def cache_of(inputs) -> str:
    return next((name for name, value in inputs.items() if hasattr(value, "get_seq_length")), "")


def test_a_model_that_ignores_its_cache(tiny_llm, tiny_tokenizer):
    def forgetful(forward, inputs):
        name = cache_of(inputs)
        past = inputs[name].get_seq_length() if name else 0
        out = forward(**inputs)
        if past:
            keep = {key: value for key, value in inputs.items() if key in ("input_ids", "position_ids")}
            out.logits = forward(**keep, use_cache=False).logits
        return out

    failed = failing(examine(with_forward(tiny_llm(), forgetful), tiny_tokenizer))
    assert failed[CACHED].startswith("even without an edit, generation with a key-value cache differs")


def test_a_model_that_counts_positions_wrongly_under_a_cache(tiny_llm, tiny_tokenizer):
    def restarting(forward, inputs):
        name = cache_of(inputs)
        if name and inputs[name].get_seq_length():
            inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
        return forward(**inputs)

    failed = failing(examine(with_forward(tiny_llm("gpt2"), restarting), tiny_tokenizer))
    assert failed[CACHED].startswith("even without an edit, generation with a key-value cache differs")


def test_a_model_that_attends_to_padding(tiny_llm, tiny_tokenizer):
    def unmasked(forward, inputs):
        return forward(**inputs | {"attention_mask": None})

    failed = failing(examine(with_forward(tiny_llm(), unmasked), tiny_tokenizer))
    assert failed[PADDING].startswith("even without an edit, a row of 13 tokens differs alone and in a batch")


def test_an_identity_that_is_none(tiny_llm, tiny_tokenizer, monkeypatch):
    project = subject.Identity.project
    monkeypatch.setattr(subject.Identity, "project", lambda *args, **options: -project(*args, **options))
    failed = failing(examine(tiny_llm(), tiny_tokenizer))
    assert failed.keys() == {IDENTITY} and "changes nothing changes what" in failed[IDENTITY]


def test_an_edit_that_never_happens(tiny_llm, tiny_tokenizer, monkeypatch):
    @contextmanager
    def idle(*args, **options):
        yield EditCounts()

    monkeypatch.setattr(checks, "attach", idle)
    monkeypatch.setattr(subject, "edit_positions", idle)
    failed = failing(examine(tiny_llm(), tiny_tokenizer))
    assert failed.keys() == {IDENTITY, CACHED, PADDING}
    assert failed[IDENTITY].startswith("0 positions were edited instead of 62")


def test_activations_that_are_not_finite(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    model.model.layers[1].mlp.down_proj.weight[3, 4] = float("inf")
    found = by_name(examine(model, tiny_tokenizer))
    assert found["norms and sinks"].status == "failed"
    assert "activations at layer 2 in float32 are infinite or NaN" in found["norms and sinks"].detail
    assert found[RECORDING].status == "ok" and found[CACHED].detail == "needs: norms and sinks"


def test_sinks_are_counted(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    (token,) = set(tiny_tokenizer.encode("Paris")[:1])
    model.model.embed_tokens.weight[token] *= 1000
    detail = by_name(examine(model, tiny_tokenizer))["norms and sinks"].detail
    assert not detail.startswith("all finite in float32; 0 of")


def test_no_blocks(tiny_llm, tiny_tokenizer, tiny_glp):
    model = tiny_llm()
    model.config.num_hidden_layers = 3
    found = by_name(examine(model, tiny_tokenizer, tiny_glp(model="tiny-llama")))
    assert "no ModuleList with 3 members fits" in failing(found.values())["blocks found"]
    assert found[RECORDING].detail == "needs: blocks found"
    assert {found[name].status for name in ("language model", "prior loads", "language model's speed")} == {"ok"}


def test_a_model_in_training_mode(tiny_llm, tiny_tokenizer):
    assert "call model.eval() first" in failing(examine(tiny_llm().train(), tiny_tokenizer))["language model"]


# priors that do not fit


@pytest.mark.parametrize(
    ("width", "layers", "name", "expected"),
    [
        (16, (1,), "tiny-llama", "width 16, but the model's hidden size is 32"),
        (32, (1,), "tiny-gpt2", "belongs to model 'tiny-gpt2'"),
        (32, (7,), "tiny-llama", "layer 7 is out of range"),
    ],
)
def test_priors_of_something_else(width, layers, name, expected, tiny_llm, tiny_tokenizer, tiny_glp):
    found = examine(tiny_llm(), tiny_tokenizer, tiny_glp(width, layers, name))
    failed = failing(found)
    assert list(failed) == ["prior fits the model"] and expected in failed["prior fits the model"]
    assert by_name(found)[CACHED].status == by_name(found)[PADDING].status == "ok"


def test_a_prior_whose_repair_is_not_finite(tiny_llm, tiny_tokenizer, tiny_glp):
    glp = tiny_glp(model="tiny-llama")
    next(glp.denoiser.parameters()).fill_(float("nan"))
    failed = failing(examine(tiny_llm(), tiny_tokenizer, glp))
    assert list(failed) == ["prior repairs"] and "repaired activations are infinite or NaN" in failed["prior repairs"]


# the command


def test_the_command_prints_the_table_and_fails_with_the_line(llm_folder, tmp_path, tiny_glp, capsys):
    assert main(["doctor", "--llm.model", llm_folder, "--layer", "1", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for name in checks.CHECKS for word in name.split())
    assert "failed" not in printed.out + printed.err
    tiny_glp(16, (1,), llm_folder).save_pretrained(tmp_path)
    assert main(["doctor", "--llm.model", llm_folder, "--prior", str(tmp_path)]) == FAILED
    printed = capsys.readouterr()
    assert "failed: prior fits the model: this hookpoint has width 16, but the model's hidden size is 32" in printed.err
    assert "Traceback" not in printed.err and "versions" in printed.out


def test_a_prior_that_cannot_be_loaded_is_asked_for_once(llm_folder, monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append(args)
        raise InputError("the Hub does not answer")

    monkeypatch.setattr(GLP, "from_pretrained", load)
    found = doctor(DoctorConfig("someone/prior", llm=LLMConfig(llm_folder)))
    assert failing(found) == {"prior loads": "the Hub does not answer"} and len(asked) == 1


def test_what_cannot_be_loaded_is_a_line(tmp_path):
    found = by_name(doctor(DoctorConfig(str(tmp_path), llm=LLMConfig("../nowhere"))))
    failed = failing(found.values())
    assert "no such model" in failed["language model"] and "holds no prior" in failed["prior loads"]
    assert found["versions"].status == found["memory"].status == "ok"
    assert found[CACHED].status == "skipped"
    failed = failing(doctor(DoctorConfig(device="cuda:99")))
    assert list(failed) == ["device and precision"] and "cuda:99" in failed["device and precision"]
