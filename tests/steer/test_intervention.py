"""Steering does what its formulas say, to the right rows and positions, however text is generated."""

from __future__ import annotations

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
import transformers
from torch import Tensor, nn

from latentprior.config import RepairConfig
from latentprior.lm.edits import EditedPositions
from latentprior.lm.hooks import Hookpoint, capture, find_blocks
from latentprior.prior.repair import PositionNoise
from latentprior.steer.direction import Direction
from latentprior.steer.intervention import EDIT_KINDS, Edit, EditKind, steering
from latentprior.steer.repairs import PriorRepair
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma3")
WIDTH = 32
NEW = 6
IDS = torch.tensor([[5, 8, 13, 21, 34, 55, 89], [2, 2, 2, 9, 19, 29, 39], [2, 11, 22, 33, 44, 55, 66]])
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] + [1] * 6])
STRENGTHS = torch.tensor([1.5, -2.0, 0.7])


def direction(layer: int = 1, seed: int = 0, **options) -> Direction:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    hookpoint = Hookpoint(**{"model": "", "layer": layer, "width": WIDTH, **options})
    return Direction.of(vector, hookpoint, f"random {seed}", "random")


def strengths(kind: EditKind) -> Tensor:
    return torch.zeros(3) if kind == "ablate" else STRENGTHS


def generate(model: nn.Module, rows: slice = slice(None), **options) -> Tensor:
    """New tokens [B, NEW] of the prompts `rows`, without the padding that all of them share."""
    n = int(MASK[rows].sum(dim=1).max())
    out = model.generate(
        input_ids=IDS[rows, -n:],
        attention_mask=MASK[rows, -n:],
        **{"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "eos_token_id": None, **options},
    )
    return out[:, n:]


def mean_norms(model: nn.Module) -> dict[int, float]:
    """Of each layer's activations, of tokens at which nothing is steered."""
    with capture(model, range(4)) as hidden:
        model(IDS[:1])
    return {layer: float(h[0, 1:].norm(dim=-1).mean()) for layer, h in hidden.items()}


class Toy(nn.Module):
    """Two blocks that pass on what they get, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for block in self.blocks:
            nn.init.eye_(block.weight)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def steered(x: Tensor, edits, mean_norm: float = 4.0, **options) -> Tensor:
    """[N, d] after `edits`: rows of the batch at position 1, after a first position that no edit may touch."""
    toy, first = Toy().to(x.dtype), torch.ones_like(x)
    with steering(toy, edits, mean_norm=mean_norm, **options):
        result = toy(torch.stack([first, x], dim=1))
    assert torch.equal(result[:, 0], first)
    return result[:, 1]


def rows_of(count: int = 5, norm: float = 4.0, seed: int = 1) -> Tensor:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True) * norm * torch.linspace(0.5, 2.0, count)[:, None]


# --- what an edit does


def test_add_and_clamp_and_ablate():
    x, w, r = rows_of(), direction().vector, torch.tensor([0.5, -1.0, 0.0, 2.0, -0.1])
    torch.testing.assert_close(steered(x, Edit(direction(), r)), x + 4.0 * r[:, None] * w)
    clamped = steered(x, Edit(direction(), r, "clamp"))
    torch.testing.assert_close(clamped @ w, 4.0 * r, atol=1e-5, rtol=0)
    ablated = steered(x, Edit(direction(), kind="ablate"))
    torch.testing.assert_close(ablated @ w, torch.zeros(5), atol=1e-5, rtol=0)
    for result in (clamped, ablated):  # what is across the direction stays
        torch.testing.assert_close(result - (result @ w)[:, None] * w, x - (x @ w)[:, None] * w, atol=1e-5, rtol=0)


def test_rotate_turns_by_the_arc_tangent_in_the_plane_and_keeps_the_norm():
    x, w, r = rows_of(), direction().vector, torch.tensor([0.5, -1.0, 0.0, 0.2, -0.1])
    result = steered(x, Edit(direction(), r, "rotate"))
    torch.testing.assert_close(result.norm(dim=1), x.norm(dim=1))
    before, after = ((y @ w / y.norm(dim=1)).acos() for y in (x, result))
    torch.testing.assert_close(before - after, r.atan(), atol=1e-4, rtol=0)
    basis = torch.linalg.qr(torch.stack([x, w.expand(5, -1)], dim=2)).Q  # of the plane of both
    torch.testing.assert_close((basis @ (basis.mT @ result[:, :, None])).squeeze(2), result, atol=1e-4, rtol=0)
    assert torch.equal(result[2], x[2])


def test_rotate_points_where_adding_would_point():
    x, w = rows_of(3), direction().vector
    across = x - (x @ w)[:, None] * w
    across = across / across.norm(dim=1, keepdim=True) * 4.0
    added = steered(across, Edit(direction(), 1.7))
    turned = steered(across, Edit(direction(), 1.7, "rotate"))
    torch.testing.assert_close(turned, added / added.norm(dim=1, keepdim=True) * 4.0)


def test_rotate_stops_at_the_direction_and_leaves_what_lies_along_it():
    w = direction().vector
    near = torch.stack([w + 0.1 * rows_of(1)[0], -w + 0.1 * rows_of(1)[0]])
    result = steered(near, Edit(direction(), torch.tensor([3.0, -3.0]), "rotate"))
    torch.testing.assert_close(result, near.norm(dim=1, keepdim=True) * torch.stack([w, -w]), atol=1e-5, rtol=0)
    axis = Direction.of(torch.eye(WIDTH)[3], direction().hookpoint, "axis", "random")
    along = torch.stack([2 * axis.vector, -axis.vector, torch.zeros(WIDTH)])
    assert torch.equal(steered(along, Edit(axis, 1.0, "rotate")), along)


def test_edits_apply_in_order():
    x, v, w = rows_of(), direction(seed=0).vector, direction(seed=1).vector
    add, clamp = Edit(direction(seed=0), 1.0), Edit(direction(seed=1), 0.5, "clamp")
    one = x + 4.0 * v
    torch.testing.assert_close(steered(x, [add, clamp]), one + (2.0 - one @ w)[:, None] * w)
    two = x + (2.0 - x @ w)[:, None] * w
    torch.testing.assert_close(steered(x, [clamp, add]), two + 4.0 * v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sinks_pass_through(dtype):
    x = rows_of(3).to(dtype)
    x[1] *= 41 / x[1].norm()
    x[2] *= 39 / x[2].norm()
    result = steered(x, Edit(direction(), 1.0))
    assert torch.equal(result[1], x[1]) and result.dtype == dtype
    assert not torch.equal(result[0], x[0]) and not torch.equal(result[2], x[2])


# --- a whole model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_additive_edit_equals_a_forward_by_hand(family, padding, tiny_llm):
    model = tiny_llm(family)
    unit, added = mean_norms(model)[1], direction().vector
    ids, mask = (IDS, MASK) if padding == "left" else (IDS.flip(1), MASK.flip(1))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    pushed = (mask.bool() & (mask.cumsum(1) > 1))[:, :, None] * STRENGTHS[:, None, None] * unit * added

    def by_hand(_module, _args, output):
        return (output[0] + pushed, *output[1:]) if isinstance(output, tuple) else output + pushed

    plain = model(**inputs, output_hidden_states=True).hidden_states[2]
    handle = find_blocks(model)[1].register_forward_hook(by_hand)
    expected = model(**inputs).logits
    handle.remove()
    with steering(model, Edit(direction(), STRENGTHS), mean_norm=unit), capture(model, [1]) as hidden:
        logits = model(**inputs).logits
    torch.testing.assert_close(hidden[1], plain + pushed)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_a_batch_under_cache_equals_its_rows_one_by_one_without(family, kind, tiny_llm):
    """Left padding, another strength for each row, several layers and both sides: the same tokens in float32."""
    model = tiny_llm(family)
    units = mean_norms(model)

    def edits(rows: slice) -> list[Edit]:
        places = [direction(1), direction(2, 1, side="input"), direction(3, 2)]
        return [Edit(place, strengths(kind)[rows], kind) for place in places]

    with steering(model, edits(slice(None)), mean_norm=units):
        batch = generate(model, use_cache=True)
    for row in range(3):
        rows = slice(row, row + 1)
        with steering(model, edits(rows), mean_norm=units):
            assert torch.equal(batch[rows], generate(model, rows, use_cache=False))
    assert not torch.equal(batch, generate(model))


@pytest.mark.parametrize("positions", ["last", "prompt", "generated", 5, "mask"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_so_it_does_at_every_kind_of_position(family, positions, tiny_llm):
    model = tiny_llm(family)
    unit = mean_norms(model)[1]
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.5

    def at(row: int | None):
        if positions != "mask":
            return positions
        return mask if row is None else mask[row : row + 1, 7 - int(MASK[row].sum()) :]

    with steering(model, Edit(direction(), 2 * STRENGTHS), mean_norm=unit, positions=at(None)):
        batch = generate(model)
    for row in range(3):
        with steering(model, Edit(direction(), 2 * float(STRENGTHS[row])), mean_norm=unit, positions=at(row)):
            assert torch.equal(batch[[row]], generate(model, slice(row, row + 1), use_cache=False))
    assert not torch.equal(batch, generate(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("returned", [1, 2])
def test_beams_take_their_rows_strength(family, returned, tiny_llm):
    model = tiny_llm(family)
    unit, beams = mean_norms(model)[1], {"num_beams": 3, "num_return_sequences": returned}
    with steering(model, Edit(direction(), STRENGTHS), mean_norm=unit):
        batch = generate(model, **beams)
    for row in range(3):
        with steering(model, Edit(direction(), float(STRENGTHS[row])), mean_norm=unit):
            single = generate(model, slice(row, row + 1), use_cache=False, **beams)
        assert torch.equal(batch[row * returned : (row + 1) * returned], single)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_the_same_with_any_cache(family, tiny_llm):
    model, found = tiny_llm(family), []
    edit, unit = Edit(direction(), STRENGTHS.repeat_interleave(2)), mean_norms(model)[1]
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with torch.random.fork_rng(devices=[]), steering(model, edit, mean_norm=unit):
            torch.manual_seed(3)
            found.append(generate(model, do_sample=True, num_return_sequences=2, **options))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0::2], found[0][1::2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_static_cache(family, kind, tiny_llm):
    model = tiny_llm(family)
    with steering(model, Edit(direction(), strengths(kind), kind), mean_norm=mean_norms(model)):
        assert torch.equal(generate(model, cache_implementation="static"), generate(model))


def test_streaming(tiny_llm, tiny_tokenizer):
    class Kept(transformers.TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    model, streamer = tiny_llm(), Kept(tiny_tokenizer, skip_prompt=True)
    with steering(model, Edit(direction(), 1.5), mean_norm=mean_norms(model)[1]):
        expected = generate(model, slice(0, 1), use_cache=False)
        generate(model, slice(0, 1), streamer=streamer)
    assert streamer.text == tiny_tokenizer.decode(expected[0])
    assert not torch.equal(expected, generate(model, slice(0, 1)))


def test_several_layers_and_sides_equal_contexts_of_one_each(tiny_llm):
    model = tiny_llm()
    units = mean_norms(model)
    edits = [Edit(direction(3, 0), 1.0), Edit(direction(0, 1), -1.0), Edit(direction(2, 2, side="input"), 0.5)]
    with steering(model, edits, mean_norm=units):
        together = model(IDS).logits
    with (
        steering(model, edits[0], mean_norm=units[3]),
        steering(model, edits[1], mean_norm=units[0]),
        steering(model, edits[2], mean_norm=units[2]),
    ):
        assert torch.equal(model(IDS).logits, together)
    with steering(model, [edits[0], edits[1], Edit(direction(1, 2), 0.5)], mean_norm=units | {1: units[2]}):
        assert torch.equal(model(IDS).logits, together)  # a block's input is the output of the one before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_do_leaves_every_bit(family, dtype, tiny_llm):
    model = tiny_llm(family).to(dtype)
    options = {"output_logits": True, "return_dict_in_generate": True}

    def run() -> Tensor:
        out = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)
        return torch.stack(out.logits, dim=1)

    plain = run()
    some = torch.tensor([0.0, 1.0, -0.0])
    for edits in ([], [Edit(direction())], [Edit(direction(), 0.0, "rotate"), Edit(direction(2), torch.zeros(3))]):
        with steering(model, edits, mean_norm=5.0):
            assert torch.equal(run(), plain)
    for kind in ("add", "rotate"):
        with steering(model, Edit(direction(), some, kind), mean_norm=mean_norms(model)[1]):
            found = run()
        assert torch.equal(found[[0, 2]], plain[[0, 2]]) and not torch.equal(found[1], plain[1])


# --- repair


class Halfway:
    """Takes back half of the push and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, EditedPositions, Tensor]] = []

    def __call__(self, clean: Tensor, edited: Tensor, at: EditedPositions, push: Tensor) -> Tensor:
        self.calls.append((clean, edited, at, push))
        return edited - push / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repair_gets_both_sides_of_all_edits_and_has_the_last_word(dtype):
    x, w, halfway = rows_of(4).to(dtype), direction().vector, Halfway()
    x[2] *= 100  # a sink, which no repair sees
    edits = [Edit(direction(), torch.tensor([1.0, 0.0, 1.0, -1.0])), Edit(direction(seed=1), 0.5)]
    result = steered(x, edits, repair=halfway)
    ((clean, edited, at, push),) = halfway.calls
    assert at.row.tolist() == [0, 1, 3] and at.position.tolist() == [1, 1, 1]
    assert (at.layer, at.batch, clean.dtype) == (1, 4, torch.float32)
    expected = 4.0 * torch.tensor([1.0, 0.0, -1.0])[:, None] * w + 2.0 * direction(seed=1).vector
    torch.testing.assert_close(push, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(clean, x[[0, 1, 3]].float()) and torch.equal(push, edited - clean)
    assert torch.equal(result[[0, 1, 3]], (edited - push / 2).to(dtype)) and torch.equal(result[2], x[2])


def test_repair_is_called_once_for_each_layer_and_pass_at_edited_positions_only(tiny_llm):
    model, halfway = tiny_llm(), Halfway()
    edits = [Edit(direction(1), STRENGTHS), Edit(direction(1, 1)), Edit(direction(3), 1.0)]
    with steering(model, edits, mean_norm=mean_norms(model), positions="generated", repair=halfway):
        generate(model, max_new_tokens=3)
    assert [call[2].layer for call in halfway.calls] == [1, 3] * 2  # the first pass has no generated position
    lengths = MASK.sum(dim=1)
    for step, (_, _, at, _) in enumerate(halfway.calls):
        assert at.row.tolist() == [0, 1, 2] and at.position.tolist() == (lengths + step // 2).tolist()


def test_the_mean_norm_is_the_directions_own_by_default(tiny_llm):
    model = tiny_llm()
    own = replace(direction(), mean_norm=5.0)
    with steering(model, [Edit(direction(), 0.5), Edit(own, 1.0)]):
        found = generate(model)
    with steering(model, [Edit(direction(), 0.5), Edit(own, 1.0)], mean_norm=5.0):
        assert torch.equal(generate(model), found)
    with pytest.raises(InputError, match="mean_norm"), steering(model, Edit(direction(), 1.0)):
        pass


def test_strength_zero_is_repaired_too(tiny_llm):
    model = tiny_llm()
    with steering(model, Edit(direction()), mean_norm=5.0, repair=lambda clean, edited, at, push: 2 * edited):
        assert not torch.equal(model(IDS).logits, tiny_llm()(IDS).logits)


def test_sinks_alone_need_no_repair():
    halfway = Halfway()
    x = rows_of(2) * 100
    with pytest.raises(InputError, match="all 2 positions asked for are attention sinks"):
        steered(x, Edit(direction(), 1.0), repair=halfway)
    assert not halfway.calls


def test_repair_with_a_prior_equals_attach(tiny_llm, tiny_glp):
    model, glp = tiny_llm(), tiny_glp(model="tiny-llama")
    noise, w = PositionNoise(0), direction().vector

    def paired(clean: Tensor, edited: Tensor, at: EditedPositions, push: Tensor) -> Tensor:
        return glp.project(edited, reference=clean, noise=noise(at, WIDTH))

    with steering(model, Edit(direction(), 1.5), mean_norm=2.0, positions="last", repair=paired):
        found = generate(model)
    with glp.attach(model, positions="last", edit=lambda x: x + 3.0 * w, paired=True, generator=0):
        assert torch.equal(generate(model), found)


def test_a_repair_computes_its_time_path_once_for_a_generation(tiny_llm, tiny_glp):
    model, glp, rows = tiny_llm(), tiny_glp(model="tiny-llama"), []
    glp.denoiser.time_embed.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
    for _ in range(2):
        repair = PriorRepair(glp, RepairConfig(steps=5, solver="euler", samples=1))
        with steering(model, Edit(direction(), 1.5), mean_norm=2.0, repair=repair):
            generate(model, use_cache=False)
    assert rows == [5, 5]
    repair(
        *[torch.ones(1, WIDTH)] * 2, EditedPositions(1, torch.tensor([0]), torch.tensor([3]), 1), torch.ones(1, WIDTH)
    )
    assert rows == [5, 5, 5]


# --- bad input


def refused(match: str, edits, model: nn.Module, mean_norm=5.0, **options) -> None:
    """`steering` fails with a line that matches, before anything runs and with no hook left."""
    with pytest.raises(InputError, match=match) as caught:
        steering(model, edits, mean_norm=mean_norm, **options).__enter__()
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_does_not_fit_the_model_is_refused(tiny_llm):
    model = tiny_llm()
    narrow = Direction.of(torch.ones(16), Hookpoint("", 1, 16), "narrow", "random")
    refused("width 16", Edit(narrow, 1.0), model)
    refused("layer 7", Edit(direction(7), 1.0), model)
    other = Edit(direction(model="org/other"), 1.0)
    refused("org/other.*tiny-llama", [Edit(direction()), other], model)
    with steering(model, other, mean_norm=5.0, check_model=False):
        model(IDS)


def test_units_and_positions_are_checked_before_anything_runs(tiny_llm, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model, edit = tiny_llm(), Edit(direction(), 1.0)
    for norm in (0.0, -1.0, math.nan, math.inf):
        refused("mean_norm of layer 1", edit, model, norm)
    refused(r"unknown layer of mean_norm '1' .*valid: 0, 2", edit, model, {0: 1.0, 2: 1.0})
    refused("mean_norm of layer 1 must be positive", edit, model, {1: 0.0})
    refused("unknown positions 'prompts'; did you mean 'prompt'", edit, model, positions="prompts")
    refused("unknown positions 'prompts'", [], model, positions="prompts")
    refused("counts from 0, got -2", edit, model, positions=-2)
    refused("a mask of positions must be bool", edit, model, positions=MASK)
    refused("a mask of positions must be bool", edit, model, positions=MASK[0].bool())


def test_edits_are_checked_when_they_are_made(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="'clip'.*'clamp'"):
        Edit(direction(), 1.0, "clip")
    for strength in (math.nan, -math.inf, torch.tensor([0.0, math.nan])):
        with pytest.raises(InputError, match="'random 0'"):
            Edit(direction(), strength)
    for strength in (torch.ones(2, 1), torch.ones(0), torch.tensor([True])):
        with pytest.raises(InputError, match="strength"):
            Edit(direction(), strength)
    with pytest.raises(InputError, match="ablation"):
        Edit(direction(), torch.tensor([0.0, 1.0]), "ablate")


def test_what_is_no_direction_or_edit_is_told_how_to_make_one(tiny_llm, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong in (torch.ones(8), "happy", None):
        with pytest.raises(
            InputError, match=r"a Direction, got .*: make one with Direction\.of\(vector, Hookpoint\.of"
        ):
            Edit(wrong, 0.8)
        with (
            pytest.raises(InputError, match=r"takes edits, got .*: use Edit\(direction, strength\)"),
            steering(tiny_llm("llama"), wrong, mean_norm=1.0),
        ):
            pass


def test_what_does_not_fit_the_batch_is_refused_in_the_forward_pass(tiny_llm):
    model = tiny_llm()
    plain = model(IDS).logits
    with steering(model, Edit(direction(), torch.ones(2)), mean_norm=5.0):
        with pytest.raises(InputError, match="'random 0' has 2 rows"):
            model(IDS)
    with steering(model, Edit(direction(), 1.0), mean_norm=5.0, positions=MASK[:2].bool()):
        with pytest.raises(InputError, match="2 rows"):
            model(IDS)
    with steering(model, Edit(direction(), 1.0), mean_norm=5.0, repair=lambda clean, edited, at, push: edited[:1]):
        with pytest.raises(InputError, match=r"\[18, 32\].*\[1, 32\]"):
            model(IDS)
    assert torch.equal(model(IDS).logits, plain)


def test_assisted_decoding_is_right_or_refused(tiny_llm):
    model = tiny_llm()
    for positions in ("last", "prompt", "generated", MASK[:1].bool()):
        with steering(model, Edit(direction(), 1.5), mean_norm=5.0, positions=positions):
            with pytest.raises(InputError, match="assisted"):
                generate(model, slice(0, 1), prompt_lookup_num_tokens=2)
    with steering(model, Edit(direction(), 1.5), mean_norm=5.0):
        expected = generate(model, slice(0, 1))
        assert torch.equal(generate(model, slice(0, 1), assistant_model=tiny_llm(layers=1)), expected)


def test_the_model_is_left_as_it_was(tiny_llm):
    model = tiny_llm()
    plain = model(IDS).logits

    def fails(clean: Tensor, edited: Tensor, at: EditedPositions, push: Tensor) -> Tensor:
        raise ZeroDivisionError

    edits = [Edit(direction(), 1.0), Edit(direction(2, side="input"), 1.0)]
    with pytest.raises(ZeroDivisionError), steering(model, edits, mean_norm=5.0, repair=fails):
        generate(model)
    with pytest.raises(KeyError), steering(model, edits, mean_norm=5.0):
        raise KeyError
    assert torch.equal(model(IDS).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model) and not model.generation_config.disable_compile
