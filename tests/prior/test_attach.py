"""A prior on a running model: generation as the prior alone decides it, whatever cache, padding, batch or beams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentprior.lm.edits import POSITIONS, EditedPositions
from latentprior.lm.hooks import Hookpoint, run_cut
from latentprior.lm.positions import prompt_keys
from latentprior.prior.glp import GLP
from latentprior.prior.repair import PositionNoise, attach, hookpoints_on
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma3")
NEW = 4
IDS = torch.tensor([[5, 8, 13, 21, 34, 55, 89], [2, 2, 2, 9, 19, 29, 39]])
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "sampling, no cache": {"do_sample": True, "temperature": 2.0, "use_cache": False},
    "beams": {"num_beams": 3},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


class Stub:
    """A projector with a function of its own, which remembers how it was asked."""

    def __init__(self, function=lambda x: x, hookpoints: tuple[Hookpoint, ...] = (Hookpoint("tiny-llama", 1, 32),)):
        self.function = function
        self.hookpoints = hookpoints
        self.asked: list[dict[str, Any]] = []

    def project(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.asked.append({"x": x.clone(), **options})
        return self.function(x)


def generate(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK, **options) -> tuple[Tensor, Tensor]:
    """New tokens [B, NEW] and their logits [B, NEW, V]; the sampling is the same at every call."""
    defaults = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(
            input_ids=ids, attention_mask=mask, **defaults | options, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=0)
    assert torch.equal(found[0], expected[0])


def assert_differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert (found[1] - expected[1]).abs().max() > 1e-2


# what leaves the model alone


@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
@pytest.mark.parametrize("family", FAMILIES)
def test_priors_that_change_nothing_leave_generation_alone(family, decoding, tiny_llm, tiny_glp):
    model, glp = tiny_llm(family), tiny_glp(model=f"tiny-{family}")
    plain = generate(model, **decoding)
    with attach(Stub(hookpoints=glp.hookpoints), model):
        assert_same(generate(model, **decoding), plain, 0)
    with glp.attach(model, t_start=0.0):
        assert_same(generate(model, **decoding), plain, 0)
    with glp.attach(model, edit=lambda x: x, paired=True, t_start=0.9):
        assert_same(generate(model, **decoding), plain, 0)
    with glp.attach(model):
        assert_differ(generate(model, **decoding), plain)


def test_nothing_is_left_behind(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    plain, state = generate(model), torch.get_rng_state()
    with glp.attach(model, generator=0):
        generate(model)
    with pytest.raises(KeyError), glp.attach(model, generator=0):
        generate(model)
        raise KeyError

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), glp.attach(model, edit=fail, generator=0):
        generate(model)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not isinstance(m, nn.ModuleList)
    )
    assert not model.generation_config.disable_compile
    assert_same(generate(model), plain, 0)
    assert torch.equal(torch.get_rng_state(), state)


# a real prior


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family, positions, tiny_llm, tiny_glp):
    model, glp = tiny_llm(family), tiny_glp(model=f"tiny-{family}")
    with glp.attach(model, positions=positions, generator=0):
        cached, static = generate(model), generate(model, cache_implementation="static")
    with glp.attach(model, positions=positions, generator=0):
        assert_same(generate(model, use_cache=False), cached)
    assert_same(static, cached)
    assert_differ(cached, generate(model))


@pytest.mark.parametrize("options", [{"edit": lambda x: x + 1}, {"edit": lambda x: x + 1, "paired": True}])
def test_cached_equals_uncached_with_an_edit(options, tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(32, (0, 2))
    with glp.attach(model, solver="heun", steps=5, t_start=0.7, generator=0, **options):
        cached, uncached = generate(model), generate(model, use_cache=False)
    assert_same(uncached, cached)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_single_rows(family, positions, tiny_llm, tiny_glp):
    model, glp = tiny_llm(family), tiny_glp(model=f"tiny-{family}")
    with glp.attach(model, positions=positions, generator=3):
        batch = generate(model)
        for row, n in enumerate((7, 4)):
            single = generate(model, IDS[row : row + 1, -n:], MASK[row : row + 1, -n:])
            assert_same((batch[0][row], batch[1][row]), (single[0][0], single[1][0]))
    assert_differ(batch, generate(model))


def test_each_position_is_repaired_with_its_own_noise(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    before = run_cut(model, [1], input_ids=IDS, attention_mask=MASK)[1]
    with glp.attach(model, generator=3, t_start=0.6, steps=2):
        after = run_cut(model, [1], input_ids=IDS, attention_mask=MASK)[1]
    where = replace(at([0] * 7 + [1] * 7, [*range(7)] * 2, batch=2), prompts=prompt_keys(IDS, MASK.bool()))
    noise = PositionNoise(3)(where, 32).view(2, 7, 32)
    assert torch.equal(after[0, 0], before[0, 0]) and torch.equal(after[1, :4], before[1, :4])
    expected = glp.project(before[0, 1:], noise=noise[0, 1:], t_start=0.6, steps=2)
    torch.testing.assert_close(after[0, 1:], expected, atol=1e-5, rtol=1e-5)
    expected = glp.project(before[1, 4:], noise=noise[1, 1:4], t_start=0.6, steps=2)
    torch.testing.assert_close(after[1, 4:], expected, atol=1e-5, rtol=1e-5)


def test_the_same_call_gives_the_same_text(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    other = IDS[:1, :3], MASK[:1, :3]
    with glp.attach(model, generator=0):
        together = [generate(model), generate(model, *other), generate(model)]
    with glp.attach(model, generator=0):
        alone = generate(model, *other)
    assert_same(together[0], together[2], 0)
    assert_same(together[1], alone, 0)
    with glp.attach(model, generator=1):
        assert_differ(generate(model), together[0])
    generator = torch.Generator().manual_seed(5)
    with glp.attach(model, generator=generator):
        first = generate(model)
    with glp.attach(model, generator=generator):
        assert_differ(generate(model), first)
    with glp.attach(model, generator=torch.Generator().manual_seed(5)):
        assert_same(generate(model), first, 0)


def test_without_a_seed_every_context_is_fresh_and_torchs_seed_rules_it(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()

    def twice() -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        found = []
        for _ in range(2):
            with glp.attach(model):
                found.append(generate(model))
                assert_same(generate(model), found[-1], 0)  # one seed for the whole context
        return found

    first, second = twice()
    assert_differ(first, second)
    for found, expected in zip(twice(), (first, second), strict=True):
        assert_same(found, expected, 0)


def test_beams_run_with_a_real_prior(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    with glp.attach(model):
        first, second = generate(model, num_beams=3), generate(model, num_beams=3)
    assert_same(first, second, 0)


def test_embeddings_as_the_prompt(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "eos_token_id": None}
    with glp.attach(model, generator=0):
        embeds = model.get_input_embeddings()(IDS)
        out = model.generate(inputs_embeds=embeds, attention_mask=MASK, **options)
        alone = model.generate(inputs_embeds=embeds[1:, 3:], attention_mask=MASK[1:, 3:], **options)
    assert torch.equal(out[1:], alone)
    assert not torch.equal(out, model.generate(inputs_embeds=embeds, attention_mask=MASK, **options))


@pytest.mark.parametrize("cache", [True, False])
def test_models_in_bfloat16(cache, tiny_llm, tiny_glp):
    model, glp = tiny_llm().bfloat16(), tiny_glp()
    plain = generate(model, use_cache=cache)
    with glp.attach(model, edit=lambda x: x + torch.ones(32)):  # the edit is float32
        found = generate(model, use_cache=cache)
    assert found[1].isfinite().all()
    assert_differ(found, plain)
    with glp.attach(model, edit=lambda x: x, paired=True):
        assert_same(generate(model, use_cache=cache), plain, 0)
    with glp.cast(torch.bfloat16).attach(model):
        assert run_cut(model, [1], input_ids=IDS)[1].dtype == torch.bfloat16


def test_gradients_stay_off_and_the_prior_unchanged(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    before = {name: tensor.clone() for name, tensor in glp.state_dict().items()}
    with glp.attach(model):
        generate(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in glp.state_dict().items())


def test_the_time_path_runs_once_for_a_generation_and_again_for_other_weights(tiny_llm, tiny_glp):
    model, glp, other = tiny_llm(), tiny_glp(), tiny_glp(seed=1)
    rows = []
    glp.denoiser.time_embed.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    with glp.attach(model, steps=3, generator=0):
        before = generate(model, use_cache=False)
    assert rows == [3]
    for weight, new in zip(glp.parameters(), other.parameters(), strict=True):
        weight.data.copy_(new)  # raises no version and moves nothing
    with glp.attach(model, steps=3, generator=0):
        found = generate(model, use_cache=False)
    assert rows == [3, 3]
    with GLP(other.denoiser, glp.normalizer, glp.hookpoints).attach(model, steps=3, generator=0):
        assert_same(generate(model, use_cache=False), found, 0)
    assert_differ(found, before)


# layers, edits, options


def test_several_layers(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(32, (0, 2), "tiny-llama")
    with glp.attach(model, generator=0):
        both = generate(model)
    with glp.attach(model, layer=0, generator=0), glp.attach(model, layer=[2], generator=0):
        assert_same(generate(model), both, 0)
    with glp.attach(model, layer=2, generator=0):
        assert_differ(generate(model), both)
    stub = Stub(hookpoints=glp.hookpoints)
    with attach(stub, model, layer=[2, 0]):
        model(IDS)
    assert [asked["layer"] for asked in stub.asked] == [0, 2]
    assert not torch.equal(stub.asked[0]["noise"], stub.asked[1]["noise"])


def test_a_multi_layer_prior_of_one_layer(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(32, (2,), llm_layers=4)
    with glp.attach(model):
        assert generate(model)[1].isfinite().all()


def test_hookpoints_on_block_inputs(tiny_llm):
    model, results = tiny_llm(), []
    for point in (Hookpoint("tiny-llama", 2, 32, "input"), Hookpoint("tiny-llama", 1, 32, "output")):
        with attach(Stub(lambda x: -x, (point,)), model):
            results.append(generate(model))
    assert_same(*results, 0)


def test_edit_comes_before_the_repair(tiny_llm):
    model, stub = tiny_llm(), Stub()
    clean = run_cut(model, [1], input_ids=IDS)[1]

    def in_place(x: Tensor) -> Tensor:
        x += 3
        return x

    for edit in (lambda x: x + 3, in_place):
        stub.asked.clear()
        with attach(stub, model, edit=edit, paired=True, t_start=0.2):
            edited = run_cut(model, [1], input_ids=IDS)[1]
        (asked,) = stub.asked
        assert asked["t_start"] == 0.2 and asked["layer"] is None
        assert torch.equal(asked["reference"], clean[:, 1:].reshape(-1, 32))
        assert torch.equal(asked["x"], asked["reference"] + 3)
        assert torch.equal(edited[:, 1:], clean[:, 1:] + 3) and torch.equal(edited[:, 0], clean[:, 0])
    with attach(stub, model, edit=lambda x: x + 3):
        model(IDS)
    assert stub.asked[-1]["reference"] is None


def test_options_reach_the_prior(tiny_llm, tiny_glp, monkeypatch):
    model, glp = tiny_llm(), tiny_glp()
    rows = []
    run = glp.denoiser.run
    monkeypatch.setattr(glp.denoiser, "run", lambda z, *a, **k: rows.append(len(z)) or run(z, *a, **k))
    options = {"t_start": 0.3, "steps": 10, "solver": "midpoint", "grid": "official"}
    with glp.attach(model, **options):
        model(IDS)
    assert rows == [12] * glp.nfe(**{k: v for k, v in options.items()})


# refused before anything runs


@pytest.mark.parametrize(
    ("prior", "options", "message"),
    [
        ({"model": "someone/other"}, {}, "someone/other.*tiny-llama.*check_model=False"),
        ({"layers": (9,), "llm_layers": 12}, {}, "layer 9.*0 to 3"),
        ({"width": 16}, {}, "16.*32"),
        ({"width": 16}, {"check_model": False}, "16.*32"),
        ({}, {"layer": 2}, r"unknown layer '2' \(valid: 1\)"),
        ({}, {"layer": []}, r"layers \[1\]"),
        ({}, {"paired": True}, "`edit`"),
        ({}, {"steps": 0}, "steps"),
        ({}, {"t_start": 1.5}, "t_start"),
    ],
)
def test_what_does_not_fit_is_refused(prior, options, message, tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(**prior)
    with pytest.raises(InputError, match=message) as caught, glp.attach(model, **options):
        pytest.fail("the context was entered")
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_model_on_purpose(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(model="someone/base-of-it")
    with glp.attach(model, check_model=False):
        assert generate(model)[1].isfinite().all()


def test_unknown_origin(tiny_llm, tiny_glp):
    glp = tiny_glp()
    glp.hookpoints = ()
    with pytest.raises(InputError, match="hookpoints"), glp.attach(tiny_llm()):
        pass


def test_both_sides_at_once(tiny_llm):
    points = (Hookpoint("", 1, 32), Hookpoint("", 2, 32, "input"))
    with pytest.raises(InputError, match="one side"), attach(Stub(hookpoints=points), tiny_llm()):
        pass


def test_hookpoints_are_chosen_in_the_order_asked(tiny_llm, tiny_glp):
    points = tiny_glp(32, (0, 2)).hookpoints
    assert hookpoints_on(points, tiny_llm(), [2, 0], check_model=True) == [points[1], points[0]]
    assert hookpoints_on(points, tiny_llm(), None, check_model=True) == list(points)


# noise


def at(rows: list[int], positions: list[int], batch: int = 3, layer: int = 1) -> EditedPositions:
    return EditedPositions(layer, torch.tensor(rows), torch.tensor(positions), batch)


def test_noise_depends_on_row_and_position_alone():
    noise, again = PositionNoise(0), PositionNoise(0)
    whole = noise(at([0, 0, 1, 2], [1, 2, 2, 9]), 4)
    assert whole.shape == (4, 4) and len(whole.unique()) == 16
    assert torch.equal(again(at([2], [9]), 4)[0], whole[3])  # alone, and first
    assert torch.equal(again(at([1, 0], [2, 1]), 4), whole[[2, 0]])
    other = noise(at([0, 0, 1, 2], [1, 2, 2, 9], batch=5), 4)
    assert torch.equal(other, whole)  # what else is in the batch does not matter
    assert not torch.equal(noise(at([0], [1], layer=2), 4)[0], whole[0])
    assert not torch.equal(PositionNoise(1)(at([0], [1]), 4)[0], whole[0])


def test_rows_of_one_prompt_share_their_noise():
    noise = PositionNoise(0)(replace(at([0, 1, 2], [2, 2, 2]), prompts=[7, 3, 7]), 4)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])


def test_several_noises_come_sample_by_sample():
    noise = PositionNoise(0, samples=3)(at([0, 1], [1, 2]), 4)
    assert noise.shape == (6, 4) and len(noise.unique()) == 24
    again = PositionNoise(0, samples=3)(at([1], [2]), 4)
    assert torch.equal(noise.view(3, 2, 4)[:, 1], again)


def test_one_noise_for_a_whole_sequence():
    noise = PositionNoise(0, shared=True)(at([0, 0, 1], [1, 40, 1]), 4)
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_noise_is_bounded_in_bytes_and_drawn_again(monkeypatch):
    """Whatever the width and however many noises: 4,096 blocks were 2.1 GB at a width of 4,096, times the noises."""
    block = PositionNoise.BLOCK * 4 * 4
    monkeypatch.setattr(PositionNoise, "BYTES", 2 * 3 * block)
    noise = PositionNoise(0, samples=3)
    first = noise(at([0], [1]), 4)
    for row in (1, 2, 0, 2, 1):
        last = noise(at([row], [1]), 4)
        held = sum(kept.nbytes for kept in noise._blocks.values())
        assert held == noise._bytes <= PositionNoise.BYTES
    assert torch.equal(noise(at([0], [1]), 4), first)
    assert torch.equal(noise(at([0, 1, 2], [1, 1, 1]), 4).view(3, 3, 4)[:, 1], last)  # more than is kept


def test_noise_is_standard_normal():
    x = PositionNoise(0)(at([0, 1, 2] * 300, [p for p in range(300) for _ in range(3)]), 32)
    assert abs(float(x.mean())) < 0.03 and abs(float(x.std()) - 1) < 0.03


def test_a_prompt_gets_the_same_text_alone_and_in_any_batch(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    with glp.attach(model, generator=0, edit=lambda x: x + 5, paired=True) as counts:
        batch = generate(model)
        turned = generate(model, IDS.flip(0), MASK.flip(0))
        alone = generate(model, IDS[1:, 3:], MASK[1:, 3:])
    assert_same((batch[0].flip(0), batch[1].flip(0)), turned)
    assert_same((batch[0][1:], batch[1][1:]), alone)
    assert counts.edited == (6 + 3 + 2 * (NEW - 1)) * 2 + 3 + NEW - 1


def test_without_a_seed_texts_differ_unless_torch_is_seeded(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()

    def repaired() -> tuple[Tensor, Tensor]:
        with glp.attach(model):
            return generate(model)

    torch.manual_seed(1)
    first, second = repaired(), repaired()
    assert_differ(first, second)
    torch.manual_seed(1)
    assert_same(repaired(), first, 0)


def test_sinks_are_left_alone_and_counted(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp()
    before = run_cut(model, [1], input_ids=IDS, attention_mask=MASK)[1]
    glp.normalizer.median_norm.fill_(float(before[0, 3].norm()) / 10.001)
    with glp.attach(model, generator=0, edit=lambda x: x + 1) as counts:
        after = run_cut(model, [1], input_ids=IDS, attention_mask=MASK)[1]
    sinks = (before.norm(dim=-1) >= before[0, 3].norm()) & MASK.bool()
    sinks[0, 0] = sinks[1, 3] = False
    assert counts.passed_over["sink"] == int(sinks.sum()) > 0
    assert torch.equal(after[sinks], before[sinks]) and counts.edited == 9 - int(sinks.sum())
