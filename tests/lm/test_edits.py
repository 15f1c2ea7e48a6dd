"""Exactly the right rows and positions are edited, with and without a cache, padded, batched, beamed or resumed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from torch import Tensor, nn

from latentprior.lm.edits import POSITIONS, EditCounts, EditedPositions, Positions, edit_positions, for_batch
from latentprior.lm.hooks import cache_argument
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.compat

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma3")
LENGTHS = (7, 4)
NEW = 4
IDS = torch.tensor([[5, 8, 13, 21, 34, 55, 89], [2, 2, 2, 9, 19, 29, 39]])
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


COLUMNS = torch.zeros(2, 7, dtype=torch.bool)
COLUMNS[0, [0, 2, 6]] = COLUMNS[1, [1, 3, 4]] = True  # first positions and padding among them
REACHING = torch.cat([COLUMNS, torch.tensor([[False, True], [True, False]])], dim=1)  # two generated columns
RULES = {**{name: name for name in POSITIONS}, "from 5": 5, "mask": REACHING}
every_rule = pytest.mark.parametrize("positions", RULES.values(), ids=RULES)


class Recorder:
    """Halves what it gets and remembers where it came from."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
        self.calls: list[Counter[tuple[int, int]]] = []

    def __call__(self, x: Tensor, at: EditedPositions) -> Tensor:
        assert len(x) == len(at.row) == len(at.position)
        self.calls.append(Counter(zip(at.row.tolist(), at.position.tolist(), strict=True)))
        return x * self.factor

    def edited(self) -> list[tuple[int, int]]:
        """(row, position) of every call, sorted; each may come once in a call."""
        assert all(count == 1 for call in self.calls for count in call.values())
        return sorted(at for call in self.calls for at in call)


def generate(model: nn.Module, ids: Tensor = IDS, mask: Tensor | None = MASK, **options) -> tuple[Tensor, Tensor]:
    """New tokens [B, NEW] and their logits [B, NEW, V]."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "eos_token_id": None, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument that hands over a key-value cache."""
    return {cache_argument(model): cache}


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=0)
    assert torch.equal(found[0], expected[0])


def sites_of(positions: Positions, first: int, last: int, row: int) -> list[tuple[int, int]]:
    """What `positions` names of a row with `first` prompt tokens after a pass over `last` tokens in all."""
    if isinstance(positions, int):
        start, end = max(positions, 1), last
    elif isinstance(positions, Tensor):  # columns of `IDS`; tokens of a shorter row are its last ones
        begin = IDS.shape[1] - first
        columns = positions[row % len(positions)].nonzero().squeeze(1).tolist()
        return [(row, c - begin) for c in columns if 0 < c - begin < last]
    else:
        start = {"all": 1, "last": first - 1, "prompt": 1, "generated": first}[positions]
        end = min(first, last) if positions == "prompt" else last
    return [(row, position) for position in range(start, end)]


@pytest.mark.parametrize("family", FAMILIES)
@every_rule
def test_exactly_the_right_sites_with_a_cache(family, positions, tiny_llm):
    model, recorder = tiny_llm(family), Recorder()
    with edit_positions(model, {1: recorder}, positions=positions):
        generate(model)
    expected = [s for row, n in enumerate(LENGTHS) for s in sites_of(positions, n, n + NEW - 1, row)]
    assert recorder.edited() == sorted(expected)  # the last new token never passes through the model


@pytest.mark.parametrize("family", FAMILIES)
@every_rule
def test_exactly_the_right_sites_without_a_cache(family, positions, tiny_llm):
    model, recorder = tiny_llm(family), Recorder()
    with edit_positions(model, {1: recorder}, positions=positions):
        generate(model, use_cache=False)
    expected = [s for k in range(NEW) for row, n in enumerate(LENGTHS) for s in sites_of(positions, n, n + k, row)]
    assert recorder.edited() == sorted(expected)


@pytest.mark.parametrize("family", FAMILIES)
@every_rule
def test_cached_equals_uncached(family, positions, tiny_llm):
    model = tiny_llm(family)
    plain = generate(model)
    found = []
    for cache in (True, False):
        with edit_positions(model, {1: Recorder(-2.0), 2: Recorder()}, positions=positions):
            found.append(generate(model, use_cache=cache))
    assert_same(*found)
    assert (found[0][1] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@every_rule
@pytest.mark.parametrize("cache", [True, False])
def test_left_padded_batch_equals_single_rows(family, positions, cache, tiny_llm):
    model = tiny_llm(family)
    with edit_positions(model, {1: Recorder(-2.0)}, positions=positions):
        batch = generate(model, use_cache=cache)
    for row, n in enumerate(LENGTHS):
        own = positions[row : row + 1, IDS.shape[1] - n :] if isinstance(positions, Tensor) else positions
        with edit_positions(model, {1: Recorder(-2.0)}, positions=own):
            single = generate(model, IDS[row : row + 1, -n:], MASK[row : row + 1, -n:], use_cache=cache)
        assert_same((batch[0][row], batch[1][row]), (single[0][0], single[1][0]))


def test_nothing_to_edit_runs_nothing(tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, positions="generated"):
        generate(model, max_new_tokens=1)
    with edit_positions(model, {1: recorder}):
        model(IDS[:, :1])  # first positions only
    assert not recorder.calls


def test_right_padding_and_no_mask(tiny_llm):
    model = tiny_llm()
    flipped, recorder = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), Recorder()
    with edit_positions(model, {1: recorder}):
        model(IDS, attention_mask=flipped)
        model(IDS)
    first, second = recorder.calls
    assert set(first) == {*sites_of("all", 7, 7, 0), *sites_of("all", 4, 4, 1)}
    assert set(second) == {*sites_of("all", 7, 7, 0), *sites_of("all", 7, 7, 1)}


def test_rows_positions_and_values_belong_together(tiny_llm):
    model, seen = tiny_llm(), {}

    def keep(x: Tensor, at: EditedPositions) -> Tensor:
        assert at.layer == 1 and at.batch == 2
        seen.update({(int(r), int(p)): value for r, p, value in zip(at.row, at.position, x, strict=True)})
        return x

    with edit_positions(model, {1: keep}):
        hidden = model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[2]
    assert len(seen) == 6 + 3
    for (row, position), value in seen.items():
        assert torch.equal(value, hidden[row, position + 7 - LENGTHS[row]])


def test_input_side_is_the_output_of_the_block_before(tiny_llm):
    model = tiny_llm()
    with edit_positions(model, {1: Recorder()}):
        expected = generate(model)
    with edit_positions(model, {2: Recorder()}, side="input"):
        assert_same(generate(model), expected, 0)


def test_layers_after_one_another(tiny_llm):
    """Each layer gets what the earlier ones made of it, at the same sites."""
    model = tiny_llm()
    one, two, alone = Recorder(), Recorder(), Recorder()
    with edit_positions(model, {0: one, 2: two}, positions="last"):
        together = generate(model)
    assert one.edited() == two.edited() and len(one.calls) == len(two.calls) == NEW
    with edit_positions(model, {0: Recorder()}, positions="last"), edit_positions(model, {2: alone}, positions="last"):
        assert_same(generate(model), together, 0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("second", [slice(0, 2), slice(1, 2)], ids=["same batch", "other batch"])
@pytest.mark.parametrize("cache", [True, False])
def test_two_generations_in_one_context_equal_two_contexts(positions, second, cache, tiny_llm):
    model = tiny_llm()
    other = IDS.flip(0)[second], MASK.flip(0)[second]
    recorders = [Recorder(), Recorder()]
    with edit_positions(model, {1: recorders[0]}, positions=positions):
        together = [generate(model, use_cache=cache), generate(model, *other, use_cache=cache)]
    apart = []
    for prompt in ((IDS, MASK), other):
        with edit_positions(model, {1: recorders[1]}, positions=positions):
            apart.append(generate(model, *prompt, use_cache=cache))
    for a, b in zip(together, apart, strict=True):
        assert_same(a, b, 0)
    assert recorders[0].calls == recorders[1].calls


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_answer_may_be_the_next_prompt(positions, tiny_llm):
    """One token longer than what was seen, with the same beginning: a prompt all the same."""
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, positions=positions):
        longer = torch.cat([IDS, generate(model)[0]], dim=1), torch.cat([MASK, torch.ones(2, NEW).long()], dim=1)
        recorder.calls.clear()
        generate(model, *longer)
    expected = [s for row, n in enumerate(LENGTHS) for s in sites_of(positions, n + NEW, n + 2 * NEW - 1, row)]
    assert recorder.edited() == sorted(expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_conversation_that_goes_on_with_its_cache(positions, tiny_llm):
    model, cache, ids = tiny_llm(), transformers.DynamicCache(), IDS[:1]
    fresh, recorder = Recorder(), Recorder()
    with edit_positions(model, {1: recorder}, positions=positions):
        for turn in range(2):
            recorder.calls.clear()
            seen = cache.get_seq_length()
            answer, _ = generate(model, ids, torch.ones_like(ids), **cached(model, cache))
            length = ids.shape[1]
            ids = torch.cat([ids, answer, torch.tensor([[60 + turn, 61, 62]])], dim=1)
    with edit_positions(model, {1: fresh}, positions=positions):
        generate(model, ids[:, :length], torch.ones(1, length).long())
    assert seen == 7 + NEW - 1
    assert recorder.edited() == [at for at in fresh.edited() if at[1] >= seen]


@pytest.mark.parametrize("columns", [0, 3])
def test_another_prompt_one_token_longer(columns, tiny_llm):
    """With another beginning, or with a beginning that both take from a cache."""
    model, recorder = tiny_llm(), Recorder()
    longer = torch.cat([IDS.flip(0), IDS[:, :1]], dim=1)
    prompts = (longer[:, :7] if columns else IDS, longer)
    caches = [model(ids[:, :columns], use_cache=True)[cache_argument(model)] if columns else None for ids in prompts]
    with edit_positions(model, {1: recorder}, positions="last"):
        for ids, cache in zip(prompts, caches, strict=True):
            model(ids[:, columns:], **cached(model, cache), use_cache=bool(columns))
    assert [sorted(call) for call in recorder.calls] == [[(0, 6), (1, 6)], [(0, 7), (1, 7)]]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_hand_written_loop(positions, tiny_llm):
    model, recorders = tiny_llm(), [Recorder(), Recorder()]
    with edit_positions(model, {1: recorders[0]}, positions=positions):
        expected, _ = generate(model)
    ids, mask, cache = IDS, MASK, None
    with edit_positions(model, {1: recorders[1]}, positions=positions):
        for _ in range(NEW):
            new = ids if cache is None else ids[:, -1:]
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            out = model(new, attention_mask=mask, position_ids=position, **cached(model, cache), use_cache=True)
            cache = out[cache_argument(model)]
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.cat([mask, torch.ones(2, 1).long()], dim=1)
    assert torch.equal(ids[:, IDS.shape[1] :], expected)
    assert recorders[0].calls == recorders[1].calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@every_rule
def test_static_cache(family, positions, tiny_llm):
    model, recorders = tiny_llm(family), [Recorder(-2.0), Recorder(-2.0)]
    with edit_positions(model, {1: recorders[0]}, positions=positions):
        dynamic = generate(model)
    with edit_positions(model, {1: recorders[1]}, positions=positions):
        assert_same(generate(model, cache_implementation="static"), dynamic)
    assert recorders[0].calls == recorders[1].calls


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_sliding_windows(window, implementation, positions, tiny_llm):
    """A window shorter than the prompt hides real tokens from the mask of a static cache."""
    model, recorders = tiny_llm("mistral"), [Recorder(-2.0), Recorder(-2.0)]
    model.config.sliding_window = window
    with edit_positions(model, {1: recorders[0]}, positions=positions):
        found = generate(model, cache_implementation=implementation)
    with edit_positions(model, {1: recorders[1]}, positions=positions):
        assert_same(generate(model, use_cache=False), found)
    expected = [s for row, n in enumerate(LENGTHS) for s in sites_of(positions, n, n + NEW - 1, row)]
    assert recorders[0].edited() == sorted(expected)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_beams(cache, positions, tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, positions=positions):
        model.generate(IDS, attention_mask=MASK, num_beams=3, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=cache)
    steps = [NEW - 1] if cache else range(NEW)
    rows = [n for n in LENGTHS for _ in range(3)]  # each row's beams lie together
    expected = [s for k in steps for row, n in enumerate(rows) for s in sites_of(positions, n, n + k, row)]
    assert recorder.edited() == sorted(expected)


@pytest.mark.parametrize("cache", [True, False])
def test_a_masks_row_holds_for_all_its_beams(cache, tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, positions=REACHING):
        model.generate(IDS, attention_mask=MASK, num_beams=3, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=cache)
    steps = [NEW - 1] if cache else range(NEW)
    rows = [(row, LENGTHS[row // 3]) for row in range(6)]
    expected = [s for k in steps for row, n in rows for s in sites_of(REACHING[[row // 3]], n, n + k, row)]
    assert recorder.edited() == sorted(expected)


def test_values_for_a_batch():
    assert for_batch(torch.tensor([1, 2]), 6, "it").tolist() == [1, 1, 1, 2, 2, 2]
    assert for_batch(torch.tensor([[1, 2]]), 2, "it").tolist() == [[1, 2], [1, 2]]
    with pytest.raises(InputError, match="2 rows.* 3"):
        for_batch(torch.tensor([1, 2]), 3, "the mask")


@every_rule
def test_right_padding_in_a_plain_forward_pass(positions, tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    flipped = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with edit_positions(model, {1: recorder}, positions=positions):
        model(IDS, attention_mask=flipped)
    if isinstance(positions, Tensor):  # columns are positions here
        expected = [(0, 2), (0, 6), (1, 1), (1, 3)]
    else:
        expected = [s for row, n in enumerate(LENGTHS) for s in sites_of(positions, n, n, row)]
    assert recorder.edited() == expected


@pytest.mark.parametrize("cache", [True, False])
def test_every_call_of_generate_has_its_own_prompt(cache, tiny_llm):
    """Also if its prompt is what the call before saw and one token."""
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, positions="prompt"):
        new, _ = generate(model, use_cache=cache)
        longer = torch.cat([IDS, new], dim=1), torch.cat([MASK, torch.ones(2, NEW).long()], dim=1)
        recorder.calls.clear()
        generate(model, *longer, use_cache=cache, max_new_tokens=1)
    assert recorder.edited() == [s for row, n in enumerate(LENGTHS) for s in sites_of("all", n, n + NEW, row)]


@pytest.mark.parametrize("positions", ["all", 5])
def test_assisted_decoding_where_positions_tell_all(positions, tiny_llm):
    model = tiny_llm()
    ids = torch.tensor([[5, 8, 13, 5, 8, 13, 5, 8]])
    with edit_positions(model, {1: Recorder(-2.0)}, positions=positions):
        expected = generate(model, ids, torch.ones_like(ids), max_new_tokens=12)
        for assistant in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llm(layers=1)}):
            found = generate(model, ids, torch.ones_like(ids), max_new_tokens=12, **assistant)
            assert_same(found, expected)


@pytest.mark.parametrize("positions", ["last", "prompt", "generated", COLUMNS[:1]])
def test_what_hides_the_end_of_the_prompt_is_refused(positions, tiny_llm):
    model, ids = tiny_llm(), IDS[:1]
    hiding = [
        ("assisted decoding", {"prompt_lookup_num_tokens": 1}),
        ("assisted decoding", {"assistant_model": tiny_llm(layers=1)}),
        ("assisted decoding", {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=2)}),
        ("classifier-free guidance", {"guidance_scale": 1.5}),
        ("a prompt in chunks", {"prefill_chunk_size": 3}),
    ]
    with edit_positions(model, {1: Recorder()}, positions=positions):
        for reason, options in hiding:
            with pytest.raises(InputError, match=reason):
                model.generate(ids, **options)
        with pytest.raises(InputError, match="paged cache"):
            model.generate(ids, cache_implementation="paged")
        model.generate(ids, guidance_scale=1.0, max_new_tokens=1)
        model.generation_config.prompt_lookup_num_tokens = 3
        with pytest.raises(InputError, match="assisted decoding"):
            model.generate(ids, generation_config=transformers.GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("positions", POSITIONS)
def test_embeddings_as_the_prompt(positions, tiny_llm):
    model, recorders = tiny_llm(), [Recorder(), Recorder()]
    with edit_positions(model, {1: recorders[0]}, positions=positions):
        expected, _ = generate(model)
    with edit_positions(model, {1: recorders[1]}, positions=positions):
        out = model.generate(
            inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK, do_sample=False,
            max_new_tokens=NEW, pad_token_id=2, eos_token_id=None,
        )  # fmt: skip
    assert torch.equal(out, expected)
    assert recorders[0].calls == recorders[1].calls


def test_causal_masks_of_the_caller(tiny_llm):
    """[B, 1, T, T], boolean or additive, or one for all rows."""
    model, causal = tiny_llm(), torch.ones(7, 7).tril().bool()
    padded = (causal & MASK[:, None, :].bool())[:, None]
    additive = torch.where(padded, 0.0, torch.finfo(torch.float32).min)
    right = (causal & MASK.flip(1)[:, None, :].bool())[:, None]  # here padding sees the tokens before it
    lengths = {
        "boolean": (padded, LENGTHS),
        "additive": (additive, LENGTHS),
        "right": (right, LENGTHS),
        "shared": (causal[None, None], (7, 7)),
    }
    for kind, (mask, rows) in lengths.items():
        recorder = Recorder()
        with edit_positions(model, {1: recorder}):
            model(IDS, attention_mask=mask)
        assert recorder.edited() == [s for row, n in enumerate(rows) for s in sites_of("all", n, n, row)], kind


def test_positions_given_with_a_causal_mask_count(tiny_llm):
    """Two documents in one row: the first token of each is a first position."""
    model, recorder = tiny_llm(), Recorder()
    mask = torch.ones(7, 7).tril().bool()
    mask[4:, :4] = False
    with edit_positions(model, {1: recorder}):
        model(IDS, attention_mask=mask[None, None], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))
    assert recorder.calls == [Counter({(row, p): n for row in (0, 1) for p, n in ((1, 2), (2, 2), (3, 1))})]


def test_a_cache_that_drops_keys_needs_positions(tiny_llm):
    model, cache = tiny_llm("mistral"), transformers.DynamicCache()
    with edit_positions(model, {0: Recorder()}, side="input"):
        model(IDS[:, :6], **cached(model, cache))
        with pytest.raises(InputError, match="positions cannot be told"):
            model(IDS[:, 6:], **cached(model, cache), attention_mask=torch.ones(2, 1, 1, 4).bool())


def test_other_masks_are_refused(tiny_llm):
    model = tiny_llm()
    with edit_positions(model, {0: Recorder()}, side="input"), pytest.raises(InputError, match="neither"):
        model(IDS, attention_mask=torch.ones(2, 7, 7))


def test_the_model_is_left_as_it_was(tiny_llm):
    model = tiny_llm()
    logits = model(IDS).logits
    with edit_positions(model, {1: Recorder(), 3: Recorder()}):
        assert not torch.equal(model(IDS).logits, logits)
    with pytest.raises(ZeroDivisionError), edit_positions(model, {1: lambda x, at: 1 // 0}):
        model(IDS)
    with pytest.raises(KeyError), edit_positions(model, {1: Recorder()}):
        raise KeyError
    assert torch.equal(model(IDS).logits, logits)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not isinstance(m, nn.ModuleList)
    )
    assert not model.generation_config.disable_compile
    assert "generate" not in vars(model)


def test_contexts_of_one_model_leave_its_generate_as_it_was(tiny_llm):
    model = tiny_llm()
    model.generate = own = model.generate
    with edit_positions(model, {1: Recorder()}), edit_positions(model, {2: Recorder()}):
        generate(model)
    assert model.generate is own


def test_bad_arguments_are_refused(tiny_llm, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model = tiny_llm()
    with pytest.raises(InputError, match="'lasst'.*'last'"):
        edit_positions(model, {1: Recorder()}, positions="lasst").__enter__()
    with pytest.raises(InputError, match="unknown positions 'True'"):
        edit_positions(model, {1: Recorder()}, positions=True).__enter__()
    with pytest.raises(InputError, match="counts from 0, got -1"):
        edit_positions(model, {1: Recorder()}, positions=-1).__enter__()
    for wrong in (MASK, COLUMNS[0], COLUMNS[:0]):
        with pytest.raises(InputError, match="bool .*got torch"):
            edit_positions(model, {1: Recorder()}, positions=wrong).__enter__()
    with edit_positions(model, {1: Recorder()}, positions=COLUMNS[:, 1:]):
        with pytest.raises(InputError, match="6 columns.* 7"):
            model(IDS)
    with edit_positions(model, {1: Recorder()}, positions=COLUMNS):
        with pytest.raises(InputError, match="2 rows.* 3"):
            model(IDS[[0, 1, 1]])
    with pytest.raises(InputError, match="layer 4 is out of range"):
        edit_positions(model, {4: Recorder()}).__enter__()
    with pytest.raises(InputError, match="compiled"):
        edit_positions(torch.compile(model, backend="eager"), {1: Recorder()}).__enter__()
    assert not any(m._forward_pre_hooks for m in model.modules())


# what was done, and never a silent nothing


def test_counts_add_up_to_what_was_seen(tiny_llm):
    model = tiny_llm()
    with edit_positions(model, {1: Recorder(), 2: Recorder()}, positions="last") as counts:
        assert counts.seen == counts.edited == 0
        generate(model)
    # Each of two layers sees 2 x 7 columns of the prompt, then 2 x (NEW - 1) tokens.
    assert counts.passed_over == {"first": 4, "padding": 6, "sink": 0, "not asked for": 2 * (5 + 2)}
    assert counts.edited == 2 * 2 * NEW and counts.seen == 2 * 2 * (7 + NEW - 1)
    assert "40 positions seen, 16 edited" in str(counts)
    assert EditCounts([counts, counts]).edited == 2 * counts.edited


def test_sinks_are_passed_over_and_counted(tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}, sinks=lambda hidden, layer: IDS[:, : hidden.shape[1]] == 34) as counts:
        model(IDS, attention_mask=MASK)
    assert counts.passed_over["sink"] == 1 and (0, 4) not in recorder.edited() and counts.edited == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 50}, "no sequence reached position 50"),
        ({"positions": torch.eye(2, 7).bool()[:, [0, 1, 1, 1, 1, 1, 1]] & False}, "first positions and padding at"),
        (
            {"sinks": lambda hidden, layer: torch.ones(hidden.shape[:2]).bool()},
            "all 9 positions .* are attention sinks",
        ),
    ],
)
def test_an_edit_that_touched_nothing_is_an_error(options, message, tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with pytest.raises(InputError, match=message), edit_positions(model, {1: recorder}, **options):
        model(IDS, attention_mask=MASK)
    assert not recorder.calls
    with edit_positions(model, {1: recorder}, **options):
        pass  # the model did not run


def test_a_layer_that_the_model_does_not_run_through_is_an_error(tiny_llm):
    model = tiny_llm()
    model.model.layers[2].forward = model.model.layers[3].forward
    model.model.layers[2].__class__ = type(
        "Skipped", (type(model.model.layers[2]),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )
    with pytest.raises(InputError, match=r"layers \[2\]"):
        with edit_positions(model, {1: Recorder(), 2: Recorder()}):
            model(IDS)


def test_counts_in_and_out_of_inference_mode(tiny_llm):
    model = tiny_llm()
    with edit_positions(model, {1: Recorder()}) as counts:
        with torch.inference_mode():
            model(IDS)
        model(IDS)
    assert counts.edited == 2 * 2 * 6


def test_an_error_inside_is_not_covered_by_that_of_nothing_edited(tiny_llm):
    model = tiny_llm()
    with pytest.raises(KeyError), edit_positions(model, {1: Recorder()}, positions=50):
        model(IDS)
        raise KeyError


# what a forward pass is, whatever its arguments are called


class Renamed(transformers.LlamaForCausalLM):
    """Takes its cache under a name that nobody knows, and neither mask nor positions."""

    opaque = False

    def forward(self, input_ids=None, memory=None, use_cache=None, **kwargs):
        cache = memory.inner if isinstance(memory, Opaque) else memory
        out = super().forward(input_ids=input_ids, use_cache=use_cache, **cached(self.plain, cache))
        return out

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        known = 0 if cache is None else cache.get_seq_length()
        memory = Opaque(cache) if self.opaque and cache is not None else cache
        return {"input_ids": input_ids[:, known:], "memory": memory, "use_cache": cache is not None}


class Opaque:
    """A cache that does not say how long it is."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def renamed(tiny_llm, *, opaque: bool) -> nn.Module:
    plain = tiny_llm()
    model = tiny_llm()
    model.__class__ = type("Renamed", (Renamed,), {"opaque": opaque, "plain": plain, "__module__": Renamed.__module__})
    return model


@pytest.mark.parametrize("positions", ["all", "last", "generated", 3])
def test_a_cache_under_an_unknown_name_and_no_mask(positions, tiny_llm):
    ids, plain = IDS[:1], tiny_llm()
    with edit_positions(plain, {1: Recorder(-2.0)}, positions=positions):
        expected = generate(plain, ids, MASK[:1], use_cache=False)
    model, recorder = renamed(tiny_llm, opaque=False), Recorder(-2.0)
    with edit_positions(model, {1: recorder}, positions=positions) as counts:
        assert_same(generate(model, ids, None), expected)
    assert len(recorder.calls) >= NEW - 1 and counts.passed_over["first"] <= 1


@pytest.mark.parametrize("positions", ["all", "last", "generated", 3])
def test_a_cache_that_tells_nothing_is_an_error(positions, tiny_llm):
    model = renamed(tiny_llm, opaque=True)
    with pytest.raises(InputError, match="do not tell which positions"):
        with edit_positions(model, {1: Recorder(-2.0)}, positions=positions):
            generate(model, IDS[:1], None)


def test_a_cache_of_another_kind_under_a_known_name_is_an_error(tiny_llm):
    model = tiny_llm()
    with pytest.raises(InputError, match="get_seq_length"), edit_positions(model, {1: Recorder()}):
        model(IDS[:, :1], past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_position_ids_tell_what_no_cache_and_no_mask_do(tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}):
        model(IDS[:, :1], position_ids=torch.tensor([[6]]))
        model(IDS[:, :2], position_ids=torch.tensor([[3, 4]]))
    assert [sorted(call) for call in recorder.calls] == [[(0, 6), (1, 6)], [(r, p) for r in (0, 1) for p in (3, 4)]]


def test_positions_that_count_padding_do_not_hide_the_first_token(tiny_llm):
    model, recorder = tiny_llm(), Recorder()
    with edit_positions(model, {1: recorder}):
        model(IDS, attention_mask=MASK, position_ids=torch.arange(7)[None])
    assert recorder.edited() == [*sites_of("all", 7, 7, 0), *sites_of("all", 4, 4, 1)]


def test_a_mask_that_leaves_out_cached_columns_is_an_error(tiny_llm):
    model = tiny_llm()
    cache = model(IDS, use_cache=True)[cache_argument(model)]
    with pytest.raises(InputError, match="3 columns.* 8"), edit_positions(model, {1: Recorder()}):
        model(IDS[:, :1], attention_mask=MASK[:, :3], **cached(model, cache))


def test_prompts_are_known_by_their_tokens(tiny_llm):
    """Wherever a prompt stands, however it is padded, and with its cache made before."""
    model, found = tiny_llm(), []

    def note(x: Tensor, at: EditedPositions) -> Tensor:
        found.append(at.prompts)
        return x

    with edit_positions(model, {1: note}):
        generate(model)
        generate(model, IDS.flip(0), MASK.flip(0), use_cache=False)
        generate(model, IDS[1:, 3:], MASK[1:, 3:], num_beams=2)
        cache = model(IDS[1:, 3:6], use_cache=True)[cache_argument(model)]
        generate(model, IDS[1:, 3:], MASK[1:, 3:], **cached(model, cache))
        model(IDS, attention_mask=MASK)
    first, second = found[0]
    assert first != second and all(keys == [first, second] for keys in found[:NEW])
    assert all(keys == [second, first] for keys in found[NEW : 2 * NEW])
    assert all(keys == [second, second] for keys in found[2 * NEW : 3 * NEW])
    assert found[3 * NEW] != [second]  # three of its tokens, by hand
    assert all(keys == [second] for keys in found[3 * NEW + 1 : -1])
    assert found[-1] == [first, second]
