"""Recorded activations equal transformers' hidden states, whatever the batching, padding and architecture."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from torch import Tensor

from latentprior.data.activations import ActivationBatch, activations, finite_rows, record_activations, split_sinks
from latentprior.data.sinks import sink_threshold
from latentprior.data.text import Document
from latentprior.data.tokens import tokenize
from latentprior.lm.hooks import edit, find_blocks
from latentprior.utils.errors import InputError

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma3", "mistral", "phi", "falcon")
TEXTS = [
    "The fox jumps.",
    "A language model keeps what it knows in its activations, and forgets what it does not.",
    "It was the best of times.",
    "Shells.",
    "She sells sea shells by the sea shore, and so on.",
]


def ids_of(text: str, tokenizer) -> Tensor:
    return torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_equals_hidden_states_of_each_text_alone(family, padding_side, batch_tokens, tiny_llm, tiny_tokenizer):
    model = tiny_llm(family)
    batch = record_activations(
        model, tiny_tokenizer, TEXTS, [2, 0], padding_side=padding_side, batch_tokens=batch_tokens
    )
    start = 0
    for layer in (2, 0):
        for doc, text in enumerate(TEXTS):
            ids = ids_of(text, tiny_tokenizer)
            hidden = model(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]
            rows = batch.select(slice(start, start + len(hidden)))
            torch.testing.assert_close(rows.x, hidden, atol=1e-5, rtol=1e-5)
            assert rows.layer.unique().tolist() == [layer] and rows.doc.unique().tolist() == [doc]
            assert torch.equal(rows.position, torch.arange(1, ids.shape[1]))
            assert torch.equal(rows.token, ids[0, 1:])
            start += len(hidden)
    assert start == len(batch)


def test_input_side_is_the_previous_blocks_output(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    inputs = record_activations(model, tiny_tokenizer, TEXTS, [2], side="input")
    outputs = record_activations(model, tiny_tokenizer, TEXTS, [1])
    assert torch.equal(inputs.x, outputs.x) and inputs.at_layer(2) is not None


def test_the_last_layer_is_not_normalised(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    batch = record_activations(model, tiny_tokenizer, TEXTS[:1], [3])
    final = model(ids_of(TEXTS[0], tiny_tokenizer), output_hidden_states=True).hidden_states[-1][0, 1:]
    torch.testing.assert_close(model.model.norm(batch.x), final, atol=1e-5, rtol=1e-5)


def test_one_batch_for_each_token_batch(tiny_llm, tiny_tokenizer):
    tokens = list(tokenize((Document(i + 7, t) for i, t in enumerate(TEXTS)), tiny_tokenizer, batch_tokens=40))
    recorded = list(activations(tiny_llm(), tokens, [1, 0]))
    assert len(recorded) == len(tokens) > 1
    for batch, source in zip(recorded, tokens, strict=True):
        real = source.mask & (source.position > 0)
        assert torch.equal(batch.token, source.ids[real].repeat(2))
        assert torch.equal(batch.layer, torch.tensor([1, 0]).repeat_interleave(int(real.sum())))
        assert torch.equal(batch.doc, source.doc[:, None].expand_as(real)[real].repeat(2))


def test_last_position(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    whole = record_activations(model, tiny_tokenizer, TEXTS, [1, 3])
    for side in ("right", "left"):
        last = record_activations(model, tiny_tokenizer, TEXTS, [1, 3], positions="last", padding_side=side)
        assert last.doc.tolist() == [0, 1, 2, 3, 4] * 2
        for layer in (1, 3):
            rows, every = last.at_layer(layer), whole.at_layer(layer)
            for doc in range(5):
                torch.testing.assert_close(rows.x[doc], every.x[every.doc == doc][-1], atol=1e-5, rtol=1e-5)


def test_random_positions_do_not_depend_on_batching(tiny_llm, tiny_tokenizer):
    def places(**options) -> list[tuple[int, int]]:
        options = {"positions": "random", "positions_per_document": 3, "generator": 0, **options}
        batch = record_activations(tiny_llm(), tiny_tokenizer, TEXTS, [0], **options)
        return list(zip(batch.doc.tolist(), batch.position.tolist(), strict=True))

    drawn = places()
    assert drawn == places(batch_tokens=1) == places(padding_side="left") == sorted(set(drawn))
    assert drawn != places(generator=1)
    torch.manual_seed(3)
    fresh = [places(generator=None) for _ in range(2)]
    torch.manual_seed(3)
    assert fresh[0] != fresh[1] and fresh == [places(generator=None) for _ in range(2)]
    assert all(position > 0 for _, position in drawn)
    lengths = [ids_of(text, tiny_tokenizer).shape[1] - 1 for text in TEXTS]
    assert [sum(d == doc for d, _ in drawn) for doc in range(5)] == [min(3, n) for n in lengths]
    assert len(places(positions_per_document=10_000)) == sum(lengths)


def test_dtype_device_and_gradients(tiny_llm, tiny_tokenizer):
    batch = record_activations(tiny_llm().bfloat16().requires_grad_(True), tiny_tokenizer, TEXTS, [1])
    assert batch.x.dtype == torch.bfloat16 and batch.x.device.type == "cpu"
    assert not batch.x.requires_grad and not batch.x.is_inference()
    assert batch.norms().dtype == torch.float32
    torch.testing.assert_close(batch.norms(), batch.x.float().norm(dim=1))


def test_rows_that_are_not_finite_are_left_out_and_counted(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    whole = record_activations(model, tiny_tokenizer, TEXTS, [1])

    def spoil(h: Tensor) -> Tensor:
        h[:, 1, 0] = float("inf")
        h[:, 2, 5] = float("nan")
        return h

    with edit(model, {1: spoil}), pytest.warns(UserWarning, match="^10 activations were not finite"):
        kept = record_activations(model, tiny_tokenizer, TEXTS, [1])
    assert torch.equal(kept.x, whole.x[whole.position > 2])
    with edit(model, {1: lambda h: h / 0}), pytest.raises(InputError, match="infinite"), pytest.warns(UserWarning):
        record_activations(model, tiny_tokenizer, TEXTS, [1])


def test_finite_rows_and_sinks():
    norms = torch.tensor([1.0, 1.0, 2.0, 10.5, 3.0, 4.0, 4.0, 39.0, 41.0, float("nan")])
    layer = torch.tensor([2, 2, 2, 2, 5, 5, 5, 5, 5, 5])
    row = torch.arange(10)
    batch = ActivationBatch(torch.stack([norms, 0 * norms], 1), layer, row, row, row)
    batch, left_out = finite_rows(batch)
    assert left_out == 1 and batch.doc.tolist() == list(range(9))
    assert finite_rows(batch) == (batch, 0)
    assert sink_threshold(float(batch.at_layer(5).norms().median())) == 40
    ordinary, sinks = split_sinks(batch, {2: 1.0, 5: 4.0})
    assert sinks.doc.tolist() == [3, 8] and ordinary.doc.tolist() == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(InputError, match="unknown layer '5'"):
        split_sinks(batch, {2: 1.0})


def test_sinks_are_dropped_by_each_layers_median(tiny_llm, tiny_tokenizer):
    model = tiny_llm()

    def sink(h: Tensor) -> Tensor:
        h[:, 1] *= 1000
        return h

    with edit(model, {1: sink}), edit(model, {3: lambda h: h * 1000}):
        kept = record_activations(model, tiny_tokenizer, TEXTS, [1, 3])
        dropped = record_activations(model, tiny_tokenizer, TEXTS, [1, 3], sinks="drop")
    assert torch.equal(dropped.at_layer(1).x, kept.at_layer(1).x[kept.at_layer(1).position > 1])
    norms = kept.at_layer(3).norms()
    assert torch.equal(dropped.at_layer(3).x, kept.at_layer(3).x[norms <= 10 * norms.median()])


def test_batches_join_and_select():
    def make(n: int, layer: int) -> ActivationBatch:
        index = torch.arange(n)
        return ActivationBatch(torch.randn(n, 3), torch.full((n,), layer), index, index, index)

    a, b = make(2, 0), make(3, 4)
    both = ActivationBatch.cat([a, b])
    assert len(both) == 5
    assert torch.equal(both.at_layer(4).x, b.x)
    assert both.select(torch.tensor([4, 0])).layer.tolist() == [4, 0]
    assert both.select(both.doc == 1).layer.tolist() == [0, 4]
    with pytest.raises(InputError, match="unknown layer '3'.*valid: 0, 4"):
        both.at_layer(3)
    with pytest.raises(InputError, match="no activations"):
        ActivationBatch.cat([])


def test_layers_given_twice_are_recorded_once(tiny_llm, tiny_tokenizer):
    once, twice = (record_activations(tiny_llm(), tiny_tokenizer, TEXTS, layers) for layers in ([2, 1], [2, 1, 2]))
    assert torch.equal(once.x, twice.x) and torch.equal(once.layer, twice.layer)


def test_bad_input_is_one_line(tiny_llm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model = tiny_llm()
    for texts, message in [
        ([], "nothing to record"),
        (["", ""], "nothing to record"),
        ("one string", "list of strings"),
        (["The fox jumps. " * 100], "context 256: lower max_length"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            record_activations(model, tiny_tokenizer, texts, [1])
        assert "\n" not in str(caught.value)
    for option, value in [("positions", "first"), ("sinks", "skip"), ("side", "middle"), ("padding_side", "top")]:
        with pytest.raises(InputError, match=f"unknown {option} '{value}'"):
            record_activations(model, tiny_tokenizer, TEXTS, [1], **{option: value})
    with pytest.raises(InputError, match="layer 4 is out of range"):
        record_activations(model, tiny_tokenizer, TEXTS, [4])


def test_long_texts_are_cut_to_the_context(tiny_llm, tiny_tokenizer):
    batch = record_activations(tiny_llm("gpt2"), tiny_tokenizer, ["The fox jumps. " * 100], [1], max_length=256)
    assert batch.position.tolist() == list(range(1, 256))


def test_recording_never_runs_the_head_or_later_blocks(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    for module in (find_blocks(model)[2], find_blocks(model)[3], model.lm_head):
        module.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    record_activations(model, tiny_tokenizer, TEXTS, [1])
