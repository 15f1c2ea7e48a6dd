"""Rating requests ask for what they must, and only an answer with one valid rating counts."""

from __future__ import annotations

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.judge.ratings import SCALES, Malformed, RatingRequest, parse_rating
from latentprior.utils.errors import InputError

REQUESTS = [
    RatingRequest("concept", "It was {grand}.", description="praise {x}"),
    RatingRequest("fluency", "It was {grand}."),
    RatingRequest("instruction", "It was {grand}.", prompt="How was {it}?"),
    RatingRequest("trait", "It was {grand}.", prompt="How was {it}?", description="praise {x}"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.kind)
def test_a_request_shows_everything_it_is_about(request_):
    system, user = request_.messages()
    assert (system["role"], user["role"]) == ("system", "user")
    for part in (request_.continuation, request_.prompt, request_.description, str(SCALES[request_.kind])):
        assert part in user["content"]
    assert '{"rating": n}' in system["content"]


def test_a_request_without_what_it_needs_is_refused(monkeypatch):
    with pytest.raises(InputError, match="needs a description"):
        RatingRequest("concept", "text")
    with pytest.raises(InputError, match="needs a prompt"):
        RatingRequest("instruction", "text", prompt=" ")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests: "concpet" is no `Kind`
    with pytest.raises(InputError, match="unknown kind of rating 'concpet'; did you mean 'concept'"):
        RatingRequest("concpet", "text")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer",
    [
        '{"rating": 2}',
        ' {"rating":2.0}\n',
        '```json\n{"rating": 2}\n```',
        'The concept is {clearly} there. {"reason": "it {is}", "rating": 2} That is all.',
        '{"rating": 2}\n{"rating": 2}',
        '{"other": 1} {"rating": 2}',
        '<think>Perhaps {"rating": 1}?</think>{"rating": 2}',
    ],
)
def test_the_rating_is_found(answer):
    assert parse_rating(answer, "concept") == 2


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "2",
        "rating: 2",
        "{'rating': 2}",
        '{"rating": 3}',
        '{"rating": -1}',
        '{"rating": 1.5}',
        '{"rating": "2"}',
        '{"rating": true}',
        '{"rating": null}',
        '{"rating": NaN}',
        '{"rating": Infinity}',
        '{"rating": [2]}',
        '{"rating": 1, "rating": 2}',
        '{"rating": 1} or {"rating": 2}',
        '{"result": {"rating": 2}}',
        '{"rating": 2',
        '{"Rating": 2}',
        '{"rating": ' + "[" * 100_000,
        '<think>{"rating": 2}</think>',
    ],
)
def test_anything_else_is_malformed(answer):
    with pytest.raises(Malformed) as error:
        parse_rating(answer, "concept")
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


def test_the_scale_is_that_of_the_kind():
    assert parse_rating('{"rating": 100}', "trait") == 100
    with pytest.raises(Malformed, match="0 to 100, got 101"):
        parse_rating('{"rating": 101}', "trait")


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    try:
        assert parse_rating(text, "trait") in range(101)
    except Malformed:
        pass


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="{}"), max_size=30), st.integers(0, 100))
def test_text_around_is_tolerated(text, rating):
    assert parse_rating(f'{text}{{"rating": {rating}}}', "trait") == rating


def test_an_empty_answer_is_not_quoted_in_the_reminder():
    assert RatingRequest("fluency", "text").again(" ") == []
    assert [message["role"] for message in RatingRequest("fluency", "text").again("two")] == ["assistant", "user"]
