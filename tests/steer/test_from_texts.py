"""Rows of texts and responses equal transformers' hidden states, and directions are what is estimated from them."""

from __future__ import annotations

import logging
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor

from latentprior.data.activations import record_activations
from latentprior.data.chat import prompt_ids, response_span
from latentprior.lm.hooks import Hookpoint, edit
from latentprior.steer import estimate, from_texts
from latentprior.steer.direction import Direction, read_direction, write_direction
from latentprior.steer.from_texts import (
    labelled_direction,
    paired_direction,
    persona_conversations,
    persona_direction,
)
from latentprior.steer.traits import TRAITS, Trait
from latentprior.utils.errors import InputError
from latentprior.utils.random import keyed_generator, seed_of

FAMILIES = ("llama", "gpt2", "gemma3", "opt")
TEXTS = [
    "The fox jumps.",
    "A language model keeps what it knows in its activations, and forgets what it does not.",
    "It was the best of times.",
    "Shells.",
    "She sells sea shells by the sea shore, and so on.",
]
LABELS = [1, 0, 1, 0, 1]
# What ChatML looks like; the tiny tokenizer's own template is of another kind.
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def text_rows(*args, **options) -> Tensor:
    return from_texts.text_activations(*args, **options).x


def response_rows(*args, **options) -> Tensor:
    return from_texts.response_activations(*args, **options).x


def unit(vector: Tensor) -> Tensor:
    return (vector / vector.norm()).float()


def chat(response: str, question: str = "How are you?", system: str | None = "Be kind.") -> list[dict[str, str]]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": question}, {"role": "assistant", "content": response}]


CHATS = [
    chat("The fox is well."),
    chat("It was the best of times, it was the worst of times.", "And then?", None),
    chat("  Sea shells \n", "She sells sea shells?"),
]


def hidden_states(model, ids: list[int], point: Hookpoint) -> Tensor:
    """[T, d] of one unpadded sequence."""
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return states[point.layer + (point.side == "output")][0]


def text_ids(text: str, tokenizer) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_text_rows_equal_hidden_states(family, side, batch_tokens, tiny_llm, tiny_tokenizer):
    model = tiny_llm(family)
    point = Hookpoint.of(model, 2, side)
    last, mean = (
        text_rows(model, tiny_tokenizer, TEXTS, point, read=read, batch_tokens=batch_tokens)
        for read in ("last", "mean")
    )
    assert last.dtype == mean.dtype == torch.float32
    for i, text in enumerate(TEXTS):
        hidden = hidden_states(model, text_ids(text, tiny_tokenizer), point)
        torch.testing.assert_close(last[i], hidden[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mean[i], hidden[1:].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_the_tokenizers_padding(family, tiny_llm, make_tokenizer):
    model = tiny_llm(family)
    point = Hookpoint.of(model, 1)
    variants = [
        make_tokenizer(padding_side=side, pad=has_pad, adds_bos=adds_bos)
        for side, has_pad, adds_bos in [("right", True, False), ("left", True, False), ("left", False, True)]
    ]
    for read in ("last", "mean"):
        rows = [text_rows(model, tokenizer, TEXTS, point, read=read) for tokenizer in variants]
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    rows = [response_rows(model, tokenizer, CHATS, point) for tokenizer in variants]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_rows_are_those_that_are_recorded(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)
    batch = record_activations(model, tiny_tokenizer, TEXTS, [1], positions="last", max_length=9)
    found = text_rows(model, tiny_tokenizer, TEXTS, point, max_length=9)
    torch.testing.assert_close(found, batch.x, atol=1e-5, rtol=1e-5)
    assert batch.position.tolist() == [min(len(text_ids(text, tiny_tokenizer)), 9) - 1 for text in TEXTS]


def test_half_precision_models_give_float32_rows(tiny_llm, tiny_tokenizer):
    model = tiny_llm().to(torch.bfloat16)
    point = Hookpoint.of(model, 1)
    found = text_rows(model, tiny_tokenizer, TEXTS[:1], point, read="mean")
    hidden = hidden_states(model, text_ids(TEXTS[0], tiny_tokenizer), point)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], hidden[1:].double().mean(0).float())


def test_sinks_are_not_averaged_but_read_as_a_last_token(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)

    def with_sink(column: int, read: str) -> Tensor:
        def grow(hidden: Tensor) -> Tensor:
            hidden[:, column] *= 1000
            return hidden

        with edit(model, {1: grow}):
            return text_rows(model, tiny_tokenizer, TEXTS[4:], point, read=read)[0]

    hidden = hidden_states(model, text_ids(TEXTS[4], tiny_tokenizer), point)
    kept = torch.ones(len(hidden), dtype=torch.bool)
    kept[[0, 3]] = False
    torch.testing.assert_close(with_sink(3, "mean"), hidden[kept].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_sink(-1, "last"), 1000 * hidden[-1], atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("read", ["last", "mean"])
def test_a_direction_of_two_lists_of_texts_is_the_labelled_one_and_knows_the_mean_norm(tiny_llm, tiny_tokenizer, read):
    model = tiny_llm()
    positive, negative = TEXTS[:3], TEXTS[3:]
    found = Direction.from_texts(model, tiny_tokenizer, positive, negative, layer=1, read=read, name="happy")
    point = Hookpoint.of(model, 1)
    expected = labelled_direction(model, tiny_tokenizer, TEXTS, [1, 1, 1, 0, 0], point, read=read, name="happy")
    assert torch.equal(found.vector, expected.vector) and found.hookpoint == point and found.name == "happy"
    assert found.provenance == expected.provenance and found.provenance["positive"] == 3
    rows = [hidden_states(model, text_ids(text, tiny_tokenizer), point)[1:] for text in TEXTS]
    assert found.mean_norm == pytest.approx(float(torch.cat(rows).norm(dim=1).mean()), rel=1e-5)
    default = Direction.from_texts(model, tiny_tokenizer, negative, positive, layer=1, read=read)
    torch.testing.assert_close(default.vector, -found.vector)


def test_sinks_are_not_in_the_mean_norm(tiny_llm, tiny_tokenizer):
    model = tiny_llm()

    def grow(hidden: Tensor) -> Tensor:
        hidden[:, 3] *= 1000
        return hidden

    with edit(model, {1: grow}):
        found = Direction.from_texts(model, tiny_tokenizer, TEXTS[1:2], TEXTS[4:], layer=1)
    rows = [hidden_states(model, text_ids(text, tiny_tokenizer), found.hookpoint) for text in (TEXTS[1], TEXTS[4])]
    kept = torch.cat([torch.cat([row[1:3], row[4:]]) for row in rows])
    assert found.mean_norm == pytest.approx(float(kept.norm(dim=1).mean()), rel=1e-5)


def test_a_text_in_place_of_a_list_is_refused(tiny_llm, tiny_tokenizer):
    for sides in (("one", ["two"]), (["one"], "two")):
        with pytest.raises(InputError, match="lists"):
            Direction.from_texts(tiny_llm(), tiny_tokenizer, *sides, layer=1)
    with pytest.raises(InputError, match="both classes"):
        Direction.from_texts(tiny_llm(), tiny_tokenizer, ["one"], [], layer=1)


def test_bad_texts_are_one_line(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)
    for texts, options, message in [
        (["Shells.", "", "The fox", ""], {}, "2 of 4 texts have no token .* number 1"),
        (["Shells."], {"max_length": 1}, "max_length must be at least 2"),
        ([], {}, "at least one string"),
        (["word " * 300], {"max_length": 400}, "the model's context 256"),
        (["Shells."], {"batch_tokens": 0}, "batch_tokens must be at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            text_rows(model, tiny_tokenizer, texts, point, **options)


def test_unknown_options_are_one_line(tiny_llm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model = tiny_llm()
    point = Hookpoint.of(model, 1)
    with pytest.raises(InputError, match="'first'"):
        text_rows(model, tiny_tokenizer, TEXTS, point, read="first")
    with pytest.raises(InputError, match="'pca'"):
        labelled_direction(model, tiny_tokenizer, TEXTS, LABELS, point, kind="pca", name="a")
    with pytest.raises(InputError, match="'probe'"):
        paired_direction(model, tiny_tokenizer, TEXTS, TEXTS, point, kind="probe", name="a")
    with pytest.raises(InputError, match="list"):
        text_rows(model, tiny_tokenizer, "one string", point)


def test_another_model_layer_or_width_is_refused_before_anything_runs(tiny_llm, tiny_tokenizer, monkeypatch):
    model = tiny_llm()
    monkeypatch.setattr(model, "forward", None)
    point = Hookpoint.of(model, 1)
    trait = tiny_trait()
    for wrong, message in [
        (replace(point, model="tiny-gpt2", weights=None), "belongs to model 'tiny-gpt2'"),
        (replace(point, layer=9), "layer 9 is out of range"),
        (replace(point, width=8), "width 8"),
    ]:
        for call in (
            lambda p=wrong: text_rows(model, tiny_tokenizer, TEXTS, p),
            lambda p=wrong: response_rows(model, tiny_tokenizer, CHATS, p),
            lambda p=wrong: persona_direction(model, tiny_tokenizer, trait, p),
            lambda p=wrong: labelled_direction(model, tiny_tokenizer, TEXTS, LABELS, p, kind="random", name="a"),
            lambda p=wrong: paired_direction(model, tiny_tokenizer, TEXTS, TEXTS, p, name="a"),
        ):
            with pytest.raises(InputError, match=message):
                call()


# -- responses -------------------------------------------------------------------------------------------------------


def chatml(tokenizer):
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_responses_tokens_by_hand(tiny_tokenizer):
    tokenizer = chatml(tiny_tokenizer)
    ids, (start, stop) = response_span(tokenizer, CHATS[0])
    before = "<|system|>\nBe kind.<|end|>\n<|user|>\nHow are you?<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(ids) == f"<bos>{before}The fox is well.<|end|>\n"
    assert tokenizer.decode(ids[:start]) == f"<bos>{before}"
    assert tokenizer.decode(ids[start:stop]) == "The fox is well."
    assert tokenizer.decode(ids[stop:]) == "<|end|>\n"
    assert ids[:start] == prompt_ids(tokenizer, CHATS[0][:-1])


def test_the_template_decides_whether_bos_is_there(tiny_tokenizer):
    ids, (start, stop) = response_span(tiny_tokenizer, chat("shells."))  # its template begins with BOS
    assert ids[:2].count(tiny_tokenizer.bos_token_id) == 1
    # The space of "assistant: " goes into one token with the response's first word, which counts as the response's.
    assert tiny_tokenizer.decode(ids[start:stop]) == " shells."
    assert ids[stop:] == [tiny_tokenizer.eos_token_id]


def test_only_the_last_response_counts_and_not_its_copy_in_the_question(tiny_tokenizer):
    tokenizer = chatml(tiny_tokenizer)
    talk = [*chat("Shells.", "Say Shells."), {"role": "user", "content": "Shells. Again."}, *chat("Shells.")[2:]]
    ids, (start, stop) = response_span(tokenizer, talk)
    assert tokenizer.decode(ids[start:stop]) == "Shells."
    assert tokenizer.decode(ids[stop:]) == "<|end|>\n"
    assert "Again." in tokenizer.decode(ids[:start])


def test_what_a_template_puts_before_the_response_is_context(tiny_tokenizer):
    tiny_tokenizer.chat_template = CHATML.replace(
        "{{ m.content | trim }}", "{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content | trim }}"
    )
    ids, (start, stop) = response_span(tiny_tokenizer, CHATS[0])
    assert tiny_tokenizer.decode(ids[start:stop]) == "The fox is well."


def test_characters_of_several_tokens(tiny_tokenizer):
    tokenizer = chatml(tiny_tokenizer)
    ids, (start, stop) = response_span(tokenizer, chat("Žlutý 🦊!"))
    assert tokenizer.decode(ids[start:stop]) == "Žlutý 🦊!"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_response_rows_equal_hidden_states(family, batch_tokens, tiny_llm, tiny_tokenizer):
    model, tokenizer = tiny_llm(family), chatml(tiny_tokenizer)
    point = Hookpoint.of(model, 1)
    found = response_rows(model, tokenizer, CHATS, point, batch_tokens=batch_tokens)
    for row, conversation in zip(found, CHATS, strict=True):
        before = tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
        start = tokenizer(f"<bos>{before}")["input_ids"]
        response = tokenizer(conversation[-1]["content"].strip())["input_ids"]
        hidden = hidden_states(model, start + response, point)
        torch.testing.assert_close(row, hidden[len(start) :].mean(0), atol=1e-5, rtol=1e-5)


def test_long_responses_are_cut(tiny_llm, tiny_tokenizer):
    model, tokenizer = tiny_llm(), chatml(tiny_tokenizer)
    point = Hookpoint.of(model, 1)
    ids, (start, _) = response_span(tokenizer, CHATS[0])
    found = response_rows(model, tokenizer, CHATS[:1], point, max_length=start + 2)
    hidden = hidden_states(model, ids, point)
    torch.testing.assert_close(found[0], hidden[start : start + 2].mean(0), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=f"token {start}.*max_length"):
        response_rows(model, tokenizer, CHATS[:1], point, max_length=start)


def test_bad_conversations_are_one_line(tiny_llm, tiny_tokenizer, make_tokenizer):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)

    def refused(conversation, message, template=CHATML):
        tiny_tokenizer.chat_template = template
        with pytest.raises(InputError, match=message) as caught:
            response_rows(model, tiny_tokenizer, [CHATS[0], conversation] if conversation else [], point)
        assert "\n" not in str(caught.value)

    refused(None, "at least one conversation")
    refused(CHATS[0][:-1], "conversation 1 must be messages that end in one of the role 'assistant'")
    refused(CHATS[0][-1:], "must be messages that end")
    refused(chat(" \n"), "conversation 1 has no response")
    upper = CHATML.replace("m.content | trim", "m.content | upper if m.content == 'shout' else m.content")
    refused(chat("shout"), "conversation 1 has a response that the chat template changes", upper)
    refuses = "{% if messages[0].content == 'x' %}{{ raise_exception('No x:\nnever') }}{% endif %}" + CHATML
    refused(chat("y", system="x"), "chat template refuses conversation 1: No x: never", refuses)
    thinking = CHATML.replace("<|assistant|>\n{%", "<|assistant|>\n<think>\n{%")
    refused(CHATS[1], "renders conversation 0 otherwise than as its prompt and then the response", thinking)
    with pytest.raises(InputError, match="chat template"):
        response_rows(model, make_tokenizer(chat=False), CHATS, point)


# -- personas --------------------------------------------------------------------------------------------------------


def tiny_trait(**changes) -> Trait:
    trait = Trait("loud", "It shouts.", ["Shout.", "Be loud, always."], ["Whisper."], ["How?", "Where is the fox?"])
    return replace(trait, **changes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_greedy_answers_equal_those_of_one_prompt_at_a_time(family, tiny_llm, tiny_tokenizer):
    model = tiny_llm(family)
    questions = ["How?", "Where is the quick brown fox that jumps over the lazy dog?", "Why not?"]
    talks = persona_conversations(model, tiny_tokenizer, questions, "Be kind.", max_new_tokens=6, batch=2)
    for question, talk in zip(questions, talks, strict=True):
        assert [m["role"] for m in talk] == ["system", "user", "assistant"]
        assert talk[0]["content"] == "Be kind." and talk[1]["content"] == question
        ids = torch.tensor([prompt_ids(tiny_tokenizer, talk[:-1])])
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        new = ids[0, len(prompt_ids(tiny_tokenizer, talk[:-1])) :].tolist()
        new = new[: new.index(1)] if 1 in new else new
        assert talk[2]["content"] == tiny_tokenizer.decode(new, skip_special_tokens=True).strip()


def test_sampled_answers_follow_the_seed_and_leave_the_global_generator(tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    before = torch.random.get_rng_state()

    def answers(seed: int, **options) -> list[str]:
        options = {"temperature": 1.0, "max_new_tokens": 8} | options
        talks = persona_conversations(model, tiny_tokenizer, ["How?"] * 3, None, seed=seed, **options)
        assert [m["role"] for m in talks[0]] == ["user", "assistant"]
        return [talk[-1]["content"] for talk in talks]

    first = answers(1)
    torch.rand(3)
    assert answers(1) == first and answers(2) != first and len(set(first)) == 3
    assert len(set(answers(1, temperature=0.0))) == 1
    assert len(set(answers(1, temperature=1e-4))) == 1  # nearly greedy
    torch.random.set_rng_state(before)
    answers(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_answers_do_not_depend_on_the_models_sampling_defaults(tiny_llm, tiny_tokenizer, caplog):
    def answers(drawn_at: float, **defaults) -> list:
        model = tiny_llm()
        for name, value in defaults.items():
            setattr(model.generation_config, name, value)
        return persona_conversations(
            model, tiny_tokenizer, ["How?", "Why?"], None, max_new_tokens=8, temperature=drawn_at
        )

    chat_defaults = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1}
    with caplog.at_level(logging.WARNING):
        assert answers(0.0, **chat_defaults) == answers(0.0)
        assert answers(1.5, **chat_defaults) == answers(1.5)
    assert not caplog.records


def test_persona_direction_is_the_difference_of_mean_responses(tiny_llm, tiny_tokenizer, tmp_path):
    model = tiny_llm()
    point, trait = Hookpoint.of(model, 1), tiny_trait()
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1}
    direction = persona_direction(model, tiny_tokenizer, trait, point, **options)

    def rows(prompts: list[str], side: int) -> Tensor:
        talks = []
        for i, prompt in enumerate(prompts):
            seed = seed_of(keyed_generator(1, side, i))
            talks += persona_conversations(
                model, tiny_tokenizer, trait.questions, prompt, max_new_tokens=5, temperature=1.0, seed=seed
            )
        return response_rows(model, tiny_tokenizer, talks, point)

    expected = rows(trait.positive, 0).mean(0) - rows(trait.negative, 1).mean(0)
    torch.testing.assert_close(direction.vector * direction.norm, expected, atol=1e-5, rtol=1e-4)
    assert (direction.name, direction.kind, direction.hookpoint) == ("loud", "persona", point)
    assert direction.provenance == {"trait": "loud", "positive": 4, "negative": 2, "empty": 0, "read": "response"} | (
        options | {"batch": 32}
    )
    back = read_direction(write_direction(direction, tmp_path / "loud.safetensors"))
    assert back.provenance == direction.provenance and torch.equal(back.vector, direction.vector)


def test_no_two_system_prompts_of_any_two_seeds_draw_alike(monkeypatch):
    seeds = []
    monkeypatch.setattr(from_texts, "persona_conversations", lambda *args, seed, **options: seeds.append(seed) or [])
    for seed in range(10):
        from_texts.persona_answers(None, None, tiny_trait(), seed=seed)
    assert len(seeds) == len(set(seeds)) == 10 * 3


def test_empty_answers_are_left_out_and_counted(tiny_llm, tiny_tokenizer, monkeypatch):
    model = tiny_llm()
    point, whole = Hookpoint.of(model, 1), persona_conversations

    def silent(model, tokenizer, questions, system_prompt, **options):
        talks = whole(model, tokenizer, questions, system_prompt, **options)
        if system_prompt == silenced:
            talks[0][-1]["content"] = ""
        return talks

    monkeypatch.setattr(from_texts, "persona_conversations", silent)
    silenced = "Shout."
    direction = persona_direction(model, tiny_tokenizer, tiny_trait(), point, max_new_tokens=4)
    assert direction.provenance["positive"] == 3 and direction.provenance["empty"] == 1
    silenced = "Whisper."
    with pytest.raises(InputError, match="'loud'"):
        persona_direction(model, tiny_tokenizer, tiny_trait(questions=["How?"]), point, max_new_tokens=4)


def test_bad_personas_are_one_line(tiny_llm, tiny_tokenizer, make_tokenizer):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)
    for options, message in [
        ({"max_new_tokens": 0}, "at least"),
        ({"batch": 0}, "at least"),
        ({"temperature": -1.0}, "at least"),
    ]:
        with pytest.raises(InputError, match=message):
            persona_conversations(model, tiny_tokenizer, ["How?"], None, **options)
    with pytest.raises(InputError, match="at least one"):
        persona_conversations(model, tiny_tokenizer, [], None)
    with pytest.raises(InputError, match="chat template"):
        persona_conversations(model, make_tokenizer(chat=False), ["How?"], None)
    for field in ("positive", "negative", "questions"):
        with pytest.raises(InputError, match="positive and negative"):
            persona_direction(model, tiny_tokenizer, tiny_trait(**{field: []}), point)


def test_traits_are_complete_and_their_held_out_questions_are_new():
    assert set(TRAITS) == {"hostile", "flattering", "inventing"}
    every = [q for trait in TRAITS.values() for q in trait.questions + trait.held_out_questions]
    assert len({q.lower() for q in every}) == len(every) == 120
    for name, trait in TRAITS.items():
        assert trait.name == name and trait.description
        assert len(set(trait.positive)) == len(set(trait.negative)) == 3
        assert len(trait.questions) == len(trait.held_out_questions) == 20
        assert not set(trait.positive) & set(trait.negative)


# -- directions from texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["last", "mean"])
def test_labelled_directions_are_the_estimators(read, tiny_llm, tiny_tokenizer):
    model = tiny_llm()
    point, mask = Hookpoint.of(model, 2), torch.tensor(LABELS).bool()
    x = text_rows(model, tiny_tokenizer, TEXTS, point, read=read)

    def direction(kind: str, **options):
        found = labelled_direction(
            model, tiny_tokenizer, TEXTS, LABELS, point, kind=kind, read=read, name="a", **options
        )
        assert (found.kind, found.name, found.hookpoint) == (kind, "a", point)
        return found

    means = direction("difference_of_means")
    assert torch.equal(means.vector, estimate.difference_of_means(x[mask], x[~mask]))
    assert means.norm == pytest.approx(float((x[mask].mean(0) - x[~mask].mean(0)).norm()), rel=1e-4)
    assert means.provenance == {"positive": 3, "negative": 2, "read": read, "max_length": 128}
    probe = direction("probe", l2=0.5)
    torch.testing.assert_close(probe.vector, estimate.probe_normal(x, LABELS, l2=0.5))
    assert probe.provenance["l2"] == 0.5 and probe.norm == pytest.approx(1)
    shuffled = direction("shuffled", seed=3)
    assert torch.equal(shuffled.vector, unit(estimate.shuffled_mean_difference(x, LABELS, 3)))
    assert shuffled.provenance["seed"] == 3


def test_a_random_direction_reads_no_text(tiny_llm, tiny_tokenizer, monkeypatch):
    model = tiny_llm()
    point = Hookpoint.of(model, 2)
    monkeypatch.setattr(model, "forward", None)
    found = labelled_direction(model, tiny_tokenizer, [], [], point, kind="random", name="a", seed=5)
    assert torch.equal(found.vector, estimate.random_direction(32, 5)) and found.provenance == {"seed": 5}


def test_paired_directions_are_the_estimators(tiny_llm, tiny_tokenizer):
    model = tiny_llm("gpt2")
    point = Hookpoint.of(model, 1, "input")
    positives, negatives = TEXTS[:2], TEXTS[2:4]
    p, n = (text_rows(model, tiny_tokenizer, texts, point, read="mean") for texts in (positives, negatives))

    def direction(**options):
        return paired_direction(model, tiny_tokenizer, positives, negatives, point, read="mean", name="a", **options)

    torch.testing.assert_close(direction().vector, estimate.paired_pca(p, n), atol=1e-5, rtol=1e-4)
    means = direction(kind="difference_of_means")
    torch.testing.assert_close(means.vector, estimate.difference_of_means(p, n), atol=1e-5, rtol=1e-4)
    assert direction().kind == "pca" and means.kind == "difference_of_means"
    assert means.provenance == {"pairs": 2, "read": "mean", "max_length": 128}


def test_bad_labels_and_pairs_are_refused_before_anything_runs(tiny_llm, tiny_tokenizer, monkeypatch):
    model = tiny_llm()
    point = Hookpoint.of(model, 1)
    monkeypatch.setattr(model, "forward", None)
    for labels, message in [([1] * 5, "both classes"), (LABELS[:4], "one label"), ([0, 1, 2, 0, 1], "0 or 1")]:
        with pytest.raises(InputError, match=message):
            labelled_direction(model, tiny_tokenizer, TEXTS, labels, point, name="a")
    with pytest.raises(InputError, match="got 5 and 4"):
        paired_direction(model, tiny_tokenizer, TEXTS, TEXTS[:4], point, name="a")
