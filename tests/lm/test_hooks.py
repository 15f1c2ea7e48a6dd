"""Blocks found in every architecture; hidden states read and edited exactly, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import jaxtyping
import pytest
import torch
import transformers
from torch import Tensor, nn

from latentprior.lm.hooks import (
    Hookpoint,
    cache_argument,
    capture,
    edit,
    find_blocks,
    forward_inputs,
    run_cut,
    same_places,
)
from latentprior.lm.hooks.hookpoint import _digest_of
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma3", "mistral", "phi", "falcon")
IDS = torch.arange(3, 43).reshape(2, 20)  # longer than the tiny Gemma's window of 16


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    return {"input_ids": IDS.masked_fill(mask == 0, 2), "attention_mask": mask}


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def generate(model: nn.Module, **options) -> list[list[int]]:
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 2, "eos_token_id": None, **options}
    return model.generate(**left_padded(), **settings).tolist()


def shift(by: float = 3.0) -> Callable[[Tensor], Tensor]:
    return lambda h: h + by * torch.linspace(-1, 1, h.shape[-1])


# finding blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_those_of_hidden_states(family, tiny_llm):
    model = tiny_llm(family)
    blocks = find_blocks(model)
    assert len(blocks) == 4
    hidden = model(IDS, output_hidden_states=True).hidden_states
    with capture(model, range(4)) as outputs, capture(model, range(4), side="input") as inputs:
        model(IDS)
    for layer in range(4):
        torch.testing.assert_close(inputs[layer], hidden[layer], atol=1e-5, rtol=0)
        if layer < 3:  # transformers normalises the last one
            torch.testing.assert_close(outputs[layer], hidden[layer + 1], atol=1e-5, rtol=0)
    assert hooks_in(model) == hooks_in(blocks)  # transformers' own capturing hooks sit on the blocks


DOWN = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gemma3": "mlp.down_proj",
    "phi": "mlp.fc2",
    "falcon": "mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("family", DOWN)
def test_mlp_units_are_what_the_down_projection_takes(family, tiny_llm):
    model = tiny_llm(family)
    taken = []
    down = find_blocks(model)[2].get_submodule(DOWN[family])
    with capture(model, [2], side="mlp") as units:
        handle = down.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        model(IDS)
        handle.remove()
    assert torch.equal(units[2], taken[0])
    assert Hookpoint.of(model, 2, "mlp").width == taken[0].shape[-1] != 32
    assert torch.equal(run_cut(model, [2], side="mlp", input_ids=IDS)[2], taken[0])
    with edit(model, {2: torch.zeros_like}, side="mlp"), capture(model, [2]) as edited:
        model(IDS)
    with capture(model, [2]) as whole:
        model(IDS)
    assert not torch.allclose(edited[2], whole[2])
    assert hooks_in(down) == 0


def test_a_mixture_of_experts_has_no_mlp_units():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="no single MLP"):
        Hookpoint.of(transformers.AutoModelForCausalLM.from_config(config), 1, "mlp")


def test_vision_tower_is_not_taken():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text | {"num_attention_heads": 2, "num_key_value_heads": 1},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    blocks = find_blocks(model)
    assert blocks is model.model.language_model.layers
    assert run_cut(model, [1], input_ids=IDS)[1].shape == (2, 20, 16)
    assert Hookpoint.of(model, 1).width == 16


def test_blocks_of_two_classes():
    config = transformers.JambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2, num_experts=4,
        mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False,
    )  # fmt: skip
    model = transformers.JambaForCausalLM(config).eval()
    assert find_blocks(model) is model.model.layers  # four experts in a list are as many as the blocks


class Wrapper(nn.Module):
    """As PEFT's: the wrapped model's `forward` is called, not the model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def test_wrapped_models(tiny_llm):
    model = tiny_llm()
    assert find_blocks(Wrapper(Wrapper(model))) is model.model.layers
    assert find_blocks(torch.compile(model, backend="eager")) is model.model.layers
    wrapped = Wrapper(model)
    torch.testing.assert_close(run_cut(wrapped, [1], input_ids=IDS), run_cut(model, [1], input_ids=IDS))
    with forward_inputs(wrapped) as inputs:
        wrapped(input_ids=IDS)
        assert inputs.ids is IDS
        model.generate(IDS, max_new_tokens=2, pad_token_id=2)
        assert inputs.past_length == 20


def test_models_that_are_not_transformers_models():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 8)
            self.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
            self.mixed = nn.ModuleList([nn.Linear(99, 99), nn.LayerNorm(99)])
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)])

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids)
            for block in self.blocks:
                h = block(h)
            return h

    model = Own()
    assert find_blocks(model) is model.blocks
    assert Hookpoint.of(model, 2) == Hookpoint(model="", layer=2, width=8, path="blocks.2")
    assert torch.equal(run_cut(model, [2], ids=IDS)[2], model(IDS))


def test_encoder_decoder_and_blockless_models_are_refused(tiny_llm):
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(t5))
    model = tiny_llm()
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match=r"7 members.*model\.layers \(4\)"):
        find_blocks(model)


# running up to a block


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_whole_and_runs_nothing_later(family, tiny_llm):
    model = tiny_llm(family)
    with capture(model, [1, 2]) as whole:
        model(IDS)
    ran = []
    counters = [*find_blocks(model), model.get_output_embeddings()]
    for index, module in enumerate(counters):
        module.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    cut = run_cut(model, [2, 1], input_ids=IDS)
    assert list(cut) == [2, 1]
    assert ran == [0, 1, 2]
    assert all(torch.equal(cut[layer], whole[layer]) for layer in cut)


def test_cut_at_an_input_stops_before_the_block(tiny_llm):
    model = tiny_llm()
    ran = []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: ran.append(2))
    before = run_cut(model, [2], side="input", input_ids=IDS)[2]
    assert not ran
    assert torch.equal(before, run_cut(model, [1], input_ids=IDS)[1])


def test_cut_switches_dropout_off_and_restores_each_mode(tiny_llm):
    model = tiny_llm("gpt2")  # its dropout is 0.1
    expected = run_cut(model, [3], input_ids=IDS)[3]
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    assert torch.equal(run_cut(model, [3], input_ids=IDS)[3], expected)
    assert [m.training for m in model.modules()] == modes


def test_cut_gives_tensors_that_can_be_trained_on(tiny_llm):
    x = run_cut(tiny_llm(), [0], input_ids=IDS)[0]
    layer = nn.Linear(x.shape[-1], 1)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_errors_inside_the_model_pass_through_the_cut(tiny_llm):
    model = tiny_llm()
    with pytest.raises(IndexError):
        run_cut(model, [1], input_ids=IDS + 10_000)
    assert hooks_in(model) == 0


# editing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [True, False])
def test_identity_edit_keeps_generation(family, cache, tiny_llm):
    model = tiny_llm(family)
    plain = generate(model, use_cache=cache)
    with edit(model, {1: lambda h: h.clone(), 3: lambda h: h}), edit(model, {2: lambda h: h + 0}, side="input"):
        assert generate(model, use_cache=cache) == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["output", "input"])
def test_edit_changes_generation_and_is_gone_afterwards(family, side, tiny_llm):
    model = tiny_llm(family)
    plain, logits = generate(model), model(IDS).logits
    with edit(model, {2: shift(30)}, side=side):
        assert (model(IDS).logits - logits).abs().max() > 1e-2
        assert generate(model) != plain
    assert torch.equal(model(IDS).logits, logits)
    assert generate(model) == plain
    assert hooks_in(model) == 0


def test_edit_of_an_output_is_an_edit_of_the_next_input(tiny_llm):
    model = tiny_llm()
    with edit(model, {1: shift()}):
        first = model(IDS).logits
    with edit(model, {2: shift()}, side="input"):
        assert torch.equal(model(IDS).logits, first)


def test_edited_generation_is_the_same_with_and_without_cache(tiny_llm):
    model = tiny_llm()
    plain = generate(model)
    with edit(model, {1: shift(10)}):
        edited = generate(model)
        assert edited == generate(model, use_cache=False) != plain


@pytest.mark.parametrize("kind", [tuple, list])
def test_outputs_that_are_sequences_stay_sequences(kind):
    class Block(nn.Linear):
        def forward(self, h: Tensor):
            return kind((super().forward(h), "weights"))

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(4, 4)])
    with edit(model, {0: lambda h: h * 0}):
        output = model.blocks[0](torch.ones(1, 2, 4))
    assert type(output) is kind and output[1] == "weights" and not output[0].any()


def test_hidden_states_passed_by_keyword():
    class Block(nn.Linear):
        def forward(self, scale: int = 1, *, hidden_states: Tensor) -> Tensor:
            return scale * hidden_states

    model = nn.Module()
    model.blocks = nn.ModuleList([Block(4, 4)])
    with edit(model, {0: lambda h: h + 1}, side="input"):
        assert torch.equal(model.blocks[0](hidden_states=torch.ones(1, 2, 4)), torch.full((1, 2, 4), 2.0))


def test_edits_compose_in_order_and_never_in_place(tiny_llm):
    model = tiny_llm()
    plain = run_cut(model, [1], input_ids=IDS)[1]

    def add_in_place(h: Tensor) -> Tensor:
        h += 1
        return h

    with capture(model, [1]) as before, edit(model, {1: add_in_place}), edit(model, {1: lambda h: h * 2}):
        edited = run_cut(model, [1], input_ids=IDS)[1]
    assert torch.equal(before[1], plain)
    assert torch.equal(edited, (plain + 1) * 2)


def test_edit_keeps_the_dtype(tiny_llm):
    model = tiny_llm().bfloat16()
    with edit(model, {1: lambda h: h.double()}):
        assert run_cut(model, [1], input_ids=IDS)[1].dtype == torch.bfloat16


def test_hooks_are_gone_after_an_exception(tiny_llm):
    model = tiny_llm()
    with pytest.raises(ZeroDivisionError), forward_inputs(model), edit(model, {1: lambda h: h / (1 // 0)}):
        model(IDS)
    with pytest.raises(RuntimeError), capture(model, [1]), edit(model, {1: shift()}):
        raise RuntimeError
    assert hooks_in(model) == 0


@pytest.mark.parametrize("function", [lambda h: None, lambda h: h[:, :1], lambda h: (h,)])
def test_edits_must_return_a_tensor_of_the_same_shape(function, tiny_llm):
    model = tiny_llm()
    with pytest.raises(InputError, match="layer 1"), edit(model, {1: function}):
        model(IDS)


def test_compiled_models_are_refused(tiny_llm):
    compiled = torch.compile(tiny_llm(), backend="eager")
    in_place = tiny_llm()
    in_place.compile(backend="eager")
    one_block = tiny_llm()
    one_block.model.layers[1] = torch.compile(one_block.model.layers[1], backend="eager")
    for model in (compiled, in_place, one_block):
        with pytest.raises(InputError, match="_orig_mod"), edit(model, {1: shift()}):
            pass
        with pytest.raises(InputError, match="_orig_mod"):
            run_cut(model, [1], input_ids=IDS)
    run_cut(compiled._orig_mod, [1], input_ids=IDS)
    run_cut(one_block, [0], input_ids=IDS)


def test_generate_does_not_run_past_the_hooks_in_compiled_code(tiny_llm):
    model = tiny_llm()
    compile_config = transformers.CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compile_config}
    plain = generate(model, **static)  # compiled from here on
    calls = []
    with edit(model, {1: lambda h: (calls.append(h.shape[1]), h)[1]}), forward_inputs(model) as inputs:
        assert generate(model, **static) == plain
    assert calls == [20, 1, 1, 1, 1, 1]
    assert inputs.past_length == 24 and inputs.attention_mask.ndim == 4
    assert not model.generation_config.disable_compile


# hookpoints and messages


def test_layers_out_of_range(tiny_llm):
    model = tiny_llm()
    for layer in (4, -1):
        with pytest.raises(InputError, match=f"layer {layer} .*0 to 3"):
            run_cut(model, [0, layer], input_ids=IDS)
        with pytest.raises(InputError, match="layers 0 to 3"):
            Hookpoint.of(model, layer)
    with pytest.raises(InputError, match="at least one layer"):
        run_cut(model, [], input_ids=IDS)


def test_hookpoint_describes_and_checks(tiny_llm):
    model = tiny_llm()
    point = Hookpoint.of(model, 2, "input")
    assert point == Hookpoint("tiny-llama", 2, 32, "input", "model.layers.2", None)
    assert Hookpoint.from_dict(point.to_dict()) == point
    assert point.check(model) is model.model.layers[2]
    assert Hookpoint.of(tiny_llm("gpt2"), 0).path == "transformer.h.0"
    assert Hookpoint.of(tiny_llm("opt"), 0).width == 32


def test_hookpoint_refuses_what_does_not_match(tiny_llm):
    model = tiny_llm()
    other = Hookpoint("someone/another-model", 2, 32)
    with pytest.raises(InputError, match="'someone/another-model'.*'tiny-llama'.*check_model"):
        other.check(model)
    assert other.check(model, check_model=False) is model.model.layers[2]
    assert Hookpoint("", 2, 32).check(model) is model.model.layers[2]
    assert Hookpoint("someone/tiny-llama", 2, 32).check(model) is model.model.layers[2]
    with pytest.raises(InputError, match="layer 9 is out of range"):
        Hookpoint("tiny-llama", 9, 32).check(model)
    with pytest.raises(InputError, match="width 64.* 32"):
        Hookpoint("tiny-llama", 2, 64).check(model)


@pytest.mark.parametrize(
    "change", [{"layer": -1}, {"width": 0}, {"side": "inputs"}, {"layers": 3}], ids=lambda change: next(iter(change))
)
def test_hookpoint_refuses_bad_values(change, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests: "inputs" is no `Side`
    with pytest.raises(InputError, match=next(iter(change))):
        Hookpoint.from_dict({"model": "m", "layer": 1, "width": 8, **change})


# inputs of the forward pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_forward_inputs_under_generate(family, cache, beams, tiny_llm):
    model = tiny_llm(family)
    seen = []

    def look(h: Tensor) -> Tensor:
        past, width = inputs.past_length, h.shape[1]
        assert inputs.ids.shape == h.shape[:2]
        assert inputs.attention_mask.shape == (h.shape[0], past + width)
        seen.append((past, width))
        return h

    with forward_inputs(model) as inputs, edit(model, {1: look}):
        generate(model, use_cache=cache, num_beams=beams, max_new_tokens=3, min_new_tokens=3)
    assert seen == ([(0, 20), (20, 1), (21, 1)] if cache else [(0, 20), (0, 21), (0, 22)])
    assert inputs.calls == 3


def test_forward_inputs_of_direct_calls(tiny_llm):
    model = tiny_llm("gpt2")  # its second argument is the cache
    with forward_inputs(model) as inputs:
        cache = model(IDS)[cache_argument(model)]
        assert inputs.ids is IDS and inputs.attention_mask is None and inputs.past_length == 0
        model(IDS[:, :3], cache)
        assert inputs.past_length == 20
        model(inputs_embeds=torch.zeros(1, 4, 32), position_ids=torch.arange(4)[None])
        assert inputs.ids is None and inputs.past_length == 0 and inputs.position_ids.shape == (1, 4)
    assert inputs.calls == 3 and hooks_in(model) == 0


def test_without_weights_names_tell_models_apart():
    def same(name: str, other: str) -> bool:
        here, there = Hookpoint(name, 2, 8), Hookpoint(other, 2, 8)
        assert here.same_place(there) == there.same_place(here)
        return here.same_place(there)

    for copy in ("org/m", "m", "/data/m", "/data/m/", "C:\\data\\m", "/hub/models--org--m/snapshots/0a1b", ""):
        assert same("org/m", copy)
    assert same("gpt2", "/data/gpt2") and same("gpt2", "org/gpt2")
    for other in ("org/n", "other/m", "/data/n", "/hub/models--org--n/snapshots/0a1b"):
        assert not same("org/m", other)
    assert not same("/runs/a/final", "/runs/b/final") and same("/runs/a/final", "/runs/a/final/")
    assert Hookpoint("org/m", 2, 8).same_place(Hookpoint("org/n", 2, 8), check_model=False)
    assert str(Hookpoint("", 2, 8)) == "some model layer 2 output (width 8)"


def test_other_places_of_a_model():
    here = Hookpoint("org/m", 2, 8)
    for other in (Hookpoint("org/m", 1, 8), Hookpoint("", 2, 9), Hookpoint("m", 2, 8, "mlp")):
        assert not here.same_place(other)
    assert same_places([here], [Hookpoint("m", 2, 8)])
    assert not same_places([here], []) and not same_places([here], [Hookpoint("m", 1, 8)])


def test_two_folders_called_final_are_one_model_if_their_weights_are(tiny_llm, tmp_path):
    def saved(model: torch.nn.Module, folder: str) -> torch.nn.Module:
        model.save_pretrained(tmp_path / folder)
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)

    model = tiny_llm()
    first, copied = saved(model, "a/final"), saved(model, "moved/elsewhere")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] *= 1.5  # another fine-tuning, however slight
    second = saved(model, "b/final")
    here = Hookpoint.of(first, 2)
    assert here.same_place(Hookpoint.of(copied, 2)) and not here.same_place(Hookpoint.of(second, 2))
    assert here.check(copied) is copied.model.layers[2]
    assert here.check(copied.bfloat16()) is copied.model.layers[2]
    assert Hookpoint.from_dict(here.to_dict()).check(copied) is copied.model.layers[2]
    with pytest.raises(InputError, match="a/final'.*b/final'.*check_model"):
        here.check(second)
    assert here.check(second, check_model=False) is second.model.layers[2]
    second.config._name_or_path = here.model
    with pytest.raises(InputError, match="not other weights of the same name"):
        here.check(second)


def test_one_id_is_one_model_quantised_or_with_adapters(tiny_llm):
    model = tiny_llm()
    model.config._name_or_path = "org/m"
    here = Hookpoint.of(model, 2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] *= 1.5
    assert here.check(model) is model.model.layers[2] and here.same_place(Hookpoint.of(model, 2))
    model.config._name_or_path = "org/n"
    with pytest.raises(InputError, match="'org/m'.*'org/n'"):
        here.check(model)


def test_the_order_of_weights_and_their_split_do_not_tell_models_apart():
    class Parts(torch.nn.Module):
        def __init__(self, *parts: Tensor) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList(parts)

    weight = torch.randn(6, 4)
    digest = _digest_of(Parts(weight))
    assert digest == _digest_of(Parts(weight.T)) == _digest_of(Parts(weight[4:], weight[:4].double()))
    assert digest != _digest_of(Parts(weight * 1.01)) and digest != _digest_of(Parts(weight, torch.zeros(1)))
    for unreadable in (weight.half(), weight.to("meta")):
        assert _digest_of(Parts(unreadable)) is None


def test_a_model_whose_weights_cannot_be_read_is_known_by_its_name(tiny_llm):
    point = Hookpoint.of(tiny_llm(), 2)
    half = tiny_llm().half()
    assert point.weights and Hookpoint.of(half, 2).weights is None
    assert point.check(half) is half.model.layers[2]
    half.config._name_or_path = "another"
    with pytest.raises(InputError, match="not 'another'"):
        point.check(half)
