"""The endpoint judge against a server that speaks the protocol over HTTP and fails in every way that they do."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from chat_server import Reply, completion
from latentprior.config import JudgeConfig, SteerConfig
from latentprior.data.prompts import Prompts
from latentprior.judge import Cost, EndpointJudge, RatingRequest, endpoint_key
from latentprior.judge.answers import Malformed
from latentprior.judge.cache import read_cache
from latentprior.judge.endpoint import endpoint_of
from latentprior.lm.hooks import Hookpoint
from latentprior.steer import Direction
from latentprior.steer.rate import rate_texts
from latentprior.steer.tasks import SteeringTask
from latentprior.utils.errors import InputError

KEY = "sk-very-secret"
LONG = 30.0


def rated(rating: int) -> Reply:
    return Reply(completion(f'{{"rating": {rating}}}'))


def judge_at(url: str, folder: Path, **options: Any) -> EndpointJudge:
    settings = {"key": KEY, "backoff": 0.001, "timeout": LONG, "concurrency": 3} | options
    return EndpointJudge(url, "judge-1", cache=folder / "cache.jsonl", **settings)


def about(*texts: str) -> list[RatingRequest]:
    return [RatingRequest("concept", text, description="praise") for text in texts]


def numbered(count: int) -> list[RatingRequest]:
    return about(*(f"text {i}" for i in range(count)))


def rating_of(text: str) -> int:
    return int(text.split()[1]) % 3


def right(text: str, n: int) -> Reply:
    return rated(rating_of(text))


def first(*replies: Reply) -> Callable[[str, int], Reply]:
    """A script: these replies to the first calls about a text, then its rating."""
    return lambda text, n: replies[n] if n < len(replies) else right(text, n)


def test_ratings_come_in_the_order_of_the_requests_and_are_paid_once(serve, tmp_path):
    server = serve(right)
    judge = judge_at(server.url, tmp_path)
    requests = numbered(20) + about("text 3", "text 4")
    ratings = judge(requests)
    assert ratings.values().tolist() == [i % 3 for i in range(20)] + [0, 1]
    assert (ratings.failed, ratings.calls, ratings.failures) == (0, 20, Counter())
    again = judge_at(serve(right).url, tmp_path, key=None)(requests)  # another endpoint: the same ratings
    assert np.array_equal(again.values(), ratings.values()) and again.calls == 0
    assert set(server.paid.values()) == {1} and server.calls.total() == 20
    for line in read_cache(judge.cache).values():
        assert line["usage"]["prompt_tokens"] == 100 and line["model"] == "judge-1"
    assert KEY not in judge.cache.read_text()


def test_what_is_sent(serve, tmp_path):
    server = serve(right)
    request = RatingRequest("concept", "text 1", description="praise")
    judge_at(server.url, tmp_path)([request])
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["Content-Type"] == "application/json"
    expected = {"model": "judge-1", "messages": request.messages(), "temperature": 0.0, "max_tokens": 256}
    assert server.bodies == [expected]
    judge_at(server.url, tmp_path, key=None, options={"max_completion_tokens": 900})([request])  # another content
    assert "Authorization" not in server.headers[1]
    assert server.bodies[1] == {k: expected[k] for k in ("model", "messages")} | {"max_completion_tokens": 900}


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (Reply(status=429), "429"),
        (Reply(status=429, headers={"Retry-After": "0.01"}), "429"),
        (Reply(status=429, headers={"Retry-After": "soon"}), "429"),
        (Reply(status=500, body=b"<html>oh no</html>"), "500"),
        (Reply(status=503, body=b'{"error": {"message": "overloaded"}}'), "503"),
        (Reply(b'{"choices": [{"mess'), "not JSON"),
        (Reply(b"<html>busy</html>"), "not JSON"),
        (Reply(b"\xff\xfe"), "not JSON"),
        (Reply(b""), "not JSON"),
        (Reply(b"[1, 2]"), "not JSON"),
        (Reply(b'{"choices": []}'), "not JSON"),
        (Reply(b'{"choices": [{"message": "no"}]}'), "not JSON"),
        (Reply(completion("I would say two.")), "malformed"),
        (Reply(completion('{"rating": 7}')), "malformed"),
        (Reply(completion(None)), "malformed"),
        (Reply(completion([{"type": "text"}])), "malformed"),
        (Reply(drop=-1), "connection"),
        (Reply(completion('{"rating": 0}'), drop=30), "connection"),
    ],
)
def test_what_fails_once_is_asked_again(serve, tmp_path, reply, failure):
    server = serve(first(reply))
    ratings = judge_at(server.url, tmp_path)(numbered(4))
    assert ratings.values().tolist() == [0, 1, 2, 0]
    assert ratings.failures == {failure: 4} and ratings.calls == 8
    assert set(server.calls.values()) == {2}
    judge_at(server.url, tmp_path)(numbered(4))
    assert server.calls.total() == 8


def test_a_slow_server_is_asked_again_after_the_timeout(serve, tmp_path):
    late = threading.Event()
    server = serve(first(Reply(until=late)))
    ratings = judge_at(server.url, tmp_path, timeout=0.3)(numbered(2))
    late.set()
    assert ratings.values().tolist() == [0, 1] and ratings.failures == {"time-out": 2}


def test_the_timeout_is_for_the_whole_response(serve, tmp_path):
    server = serve(lambda text, n: Reply(completion("x" * 400), trickle=True))
    (result,) = judge_at(server.url, tmp_path, timeout=0.3, attempts=1)(numbered(1)).results
    assert result.failures == ("time-out",) and result.reason == "no response within 0.3 s"


def test_a_failure_is_counted_and_never_scored_and_asked_for_again_by_the_next_run(serve, tmp_path):
    bad = {"text 1": Reply(status=500), "text 3": Reply(completion("two")), "text 4": Reply(status=400, body=b"long")}
    server = serve(lambda text, n: bad.get(text) or right(text, n))
    ratings = judge_at(server.url, tmp_path, attempts=4, reasks=2)(numbered(6))
    assert np.isnan(ratings.values()).tolist() == [False, True, False, True, True, False]
    assert ratings.failed == 3
    assert server.calls == {"text 0": 1, "text 1": 4, "text 2": 1, "text 3": 3, "text 4": 1, "text 5": 1}
    reasons = [result.reason for result in ratings.results]
    assert "500" in reasons[1] and "malformed answer: no JSON object" in reasons[3] and "400: long" in reasons[4]
    assert reasons[0] == "" and ratings.results[1].value is None
    bad.clear()
    again = judge_at(server.url, tmp_path)(numbered(6))
    assert again.values().tolist() == [0, 1, 2, 0, 1, 2] and again.calls == 3
    assert server.paid["text 0"] == 1


def test_an_answer_without_a_rating_is_shown_to_the_model_with_what_is_wanted(serve, tmp_path):
    server = serve(first(Reply(completion("I would say two.")), Reply(completion(None))))
    judge_at(server.url, tmp_path)(numbered(1))
    asked, reminded, unanswered = (body["messages"] for body in server.bodies)
    assert reminded[:2] == asked == unanswered
    assert reminded[2] == {"role": "assistant", "content": "I would say two."} and len(reminded) == 4


def test_retry_after_is_waited_for(serve, tmp_path):
    date = format_datetime(datetime.now(UTC) + timedelta(days=-1), usegmt=True)  # past: no wait
    server = serve(
        first(Reply(status=429, headers={"Retry-After": date}), Reply(status=429, headers={"Retry-After": "0.4"}))
    )
    judge_at(server.url, tmp_path)(numbered(1))
    assert server.times[1] - server.times[0] < 0.4 <= server.times[2] - server.times[1]


def test_a_retry_after_that_is_too_long_fails_the_request(serve, tmp_path):
    server = serve(lambda text, n: Reply(status=429, headers={"Retry-After": "3600"}))
    ratings = judge_at(server.url, tmp_path)(numbered(2))
    assert ratings.failed == 2 and server.calls.total() == 2


def test_the_wait_doubles_and_is_spread(serve, tmp_path):
    judge = judge_at("http://127.0.0.1:9/v1", tmp_path, backoff=1.0, longest_wait=10.0)
    for key, share in (("00000000", 0.5), ("ffffffff", 1.0)):
        waits = [judge._backoff(key, tries) for tries in range(1, 7)]
        assert waits == pytest.approx([share * wait for wait in (1, 2, 4, 8, 10, 10)])


@dataclass(frozen=True)
class Colour:
    """A request that is no rating: it wants a colour, as `{"colour": ...}`."""

    text: str
    kind = "colour"
    version: ClassVar[int] = 3
    answer_tokens: ClassVar[int] = 5

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": "colours"}, {"role": "user", "content": f"<text>{self.text}</text>"}]

    def parse(self, answer: str) -> dict[str, str]:
        if not answer.startswith("it is "):
            raise Malformed("no colour")
        return {"colour": answer.removeprefix("it is ")}

    def again(self, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "again"}]


def test_a_request_brings_its_own_parser_reminder_and_cost(serve, tmp_path):
    server = serve(lambda text, n: Reply(completion("it is red" if n or text == "a" else "red")))
    judge, requests = judge_at(server.url, tmp_path, reasks=1), [Colour("a"), Colour("b")]
    assert judge.estimate(requests).answer_tokens == 10 and judge.recall(requests) == [None, None]
    answers = judge.ask(requests)
    assert [answer.value for answer in answers.results] == [{"colour": "red"}] * 2 == judge.recall(requests)
    assert (answers.failed, answers.calls, answers.failures) == (0, 3, {"malformed": 1})
    assert [len(body["messages"]) for body in server.bodies].count(3) == 1
    assert judge.ask(requests).calls == 0 and server.calls.total() == 3
    (rating,) = judge(about("a")).results  # another kind of request about the same text, in the same cache
    assert rating.value is None and len(read_cache(judge.cache)) == 2


def test_keys_of_paid_ratings_never_change(tmp_path):
    """Else every rating that anybody paid for would be asked for again."""
    ((key, _),) = judge_at("https://host", tmp_path)._keyed(about("text 1"))
    assert key == "0d7064cfb4ce1b34db7f7af857e93b1867cc0720503337aa1fbf74723e57ba0e"


@pytest.mark.parametrize("status", [301, 302, 307, 401, 402, 404])
def test_an_endpoint_that_refuses_everything_ends_the_run(serve, tmp_path, status):
    other = serve(right)
    said = json.dumps({"error": {"message": f"no\nfor {KEY}"}}).encode()
    location = {"Location": f"{other.url}/chat/completions"}
    server = serve(lambda text, n: right(text, n) if text == "text 0" else Reply(said, status, location))
    judge = judge_at(server.url, tmp_path, concurrency=1)
    with pytest.raises(InputError, match=f"{status}: no for") as error:
        judge(numbered(50))
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    assert server.calls.total() < 10 and not other.calls
    assert len(read_cache(judge.cache)) == 1


def test_a_dead_server_is_given_up(tmp_path, serve):
    server = serve(lambda text, n: Reply(status=503))
    ratings = judge_at(server.url, tmp_path, attempts=2, patience=5)(numbered(200))
    assert ratings.failed == 200
    asked = [result for result in ratings.results if result.calls]
    assert 5 <= len(asked) < 100 and {r.reason for r in ratings.results if not r.calls} == {"not asked"}


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (result,) = judge_at("http://127.0.0.1:9/v1", tmp_path, attempts=2)(numbered(1)).results
    assert result.value is None and result.failures == ("connection",) * 2 and "connection failed" in result.reason


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_calls_at_a_time_than_allowed(serve, tmp_path, concurrency):
    full = threading.Event()

    def script(text: str, n: int) -> Reply:
        if server.at_once + 1 == concurrency:
            full.set()
        return Reply(right(text, n).body, until=full)

    server = serve(script)
    judge_at(server.url, tmp_path, concurrency=concurrency)(numbered(12))
    assert server.most_at_once == concurrency


def rate_numbered(url: str, folder: str, count: int) -> None:
    judge_at(url, Path(folder))(numbered(count))


def test_killed_in_the_middle_nothing_is_lost_or_paid_twice(serve, tmp_path):
    answered, concurrency = 7, 3
    never = threading.Event()

    def script(text: str, n: int) -> Reply:
        return right(text, n) if server.calls.total() < answered or never.is_set() else Reply(until=never)

    server = serve(script)
    process = multiprocessing.get_context("forkserver").Process(
        target=rate_numbered, args=(server.url, str(tmp_path), 20)
    )
    process.start()
    server.wait_for_calls(answered + concurrency)  # every thread is in a call that gets no answer
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = tmp_path / "cache.jsonl"
    assert len(read_cache(cache)) == answered == server.paid.total()
    never.set()
    judge = judge_at(server.url, tmp_path)
    assert judge.estimate(numbered(20)).calls == 20 - answered
    ratings = judge(numbered(20))
    assert ratings.values().tolist() == [i % 3 for i in range(20)]
    assert ratings.calls == 20 - answered
    assert server.paid == {f"text {i}": 1 for i in range(20)}


def test_an_interrupt_keeps_what_is_under_way(serve, tmp_path):
    server = serve(right)

    def interrupt(done: int, total: int | None, figures: Any) -> None:
        raise KeyboardInterrupt

    judge = judge_at(server.url, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        judge(numbered(100), report=interrupt)
    assert len(read_cache(judge.cache)) == server.paid.total() < 100
    judge(numbered(100))
    assert server.paid == {f"text {i}": 1 for i in range(100)}


def test_progress_is_reported(serve, tmp_path):
    seen = []
    judge = judge_at(serve(right).url, tmp_path)
    judge(numbered(2))
    judge(numbered(5), report=lambda done, total, figures: seen.append((done, total, figures)))
    assert seen == [(i, 3, {"failed": 0}) for i in (1, 2, 3)]


def test_the_estimate_counts_only_what_is_not_known(serve, tmp_path):
    judge = judge_at(serve(right).url, tmp_path)
    requests = numbered(4)
    characters = sum(len(m["content"]) for r in requests for m in r.messages())
    before = judge.estimate([*requests, requests[0]], prompt_price=2.0, answer_price=10.0)
    assert (before.calls, before.known, before.answer_tokens) == (4, 1, 48)
    assert before.prompt_tokens == pytest.approx(characters / 4, abs=1)
    assert before.money == pytest.approx((before.prompt_tokens * 2 + 480) / 1e6)
    judge(requests)
    assert judge.estimate(requests) == Cost(calls=0, known=4, prompt_tokens=0, answer_tokens=0, money=None)


def test_the_key_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert endpoint_key("SOME_KEY") == KEY
    monkeypatch.setenv("SOME_KEY", " ")
    for variable in ("SOME_KEY", "OTHER_KEY"):
        with pytest.raises(InputError, match=variable):
            endpoint_key(variable)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://host", "https://host/v1/chat/completions"),
        ("https://host:1/api/v1/", "https://host:1/api/v1/chat/completions"),
        ("http://host/v1/chat/completions", "http://host/v1/chat/completions"),
    ],
)
def test_urls(tmp_path, url, path):
    assert judge_at(url, tmp_path).url == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "host/v1"}, "URL"),
        ({"url": "file:///etc/passwd"}, "URL"),
        ({"url": "http://["}, "URL"),
        ({"key": "a\nb"}, "key"),
        ({"key": ""}, "key"),
        ({"model": " "}, "model"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0.0}, "timeout"),
        ({"backoff": float("nan")}, "backoff"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, change, message):
    settings = {"url": "https://host", "model": "m", "key": KEY, "cache": tmp_path / "l"} | change
    with pytest.raises(InputError, match=message):
        EndpointJudge(**settings)


def test_an_experiments_texts_are_rated_once_and_failures_are_not_scored(serve, tmp_path, monkeypatch):
    """Concept and fluency of every row; the offline score is kept; the second time nothing is asked."""
    server = serve(lambda text, n: Reply(status=400) if text == "bad" else rated(1 if text == "a" else 2))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    hookpoint = Hookpoint("tiny", 1, 4)
    prompts = Prompts(["p"], torch.tensor([[1]]), torch.tensor([[True]]))
    direction = Direction.of(torch.ones(4), hookpoint, "praise", "random")
    task = SteeringTask(direction, prompts, lambda texts: np.zeros(len(texts)), {}, "much praise")
    texts = ["a", "b", "bad", "a"]
    columns = {"direction": ["praise"] * 4, "prompt_text": ["p"] * 4, "text": texts, "concept": [0.1, 0.2, 0.3, 0.4]}
    judge = JudgeConfig(url=server.url, model="judge-1", key_variable="JUDGE_KEY", timeout=LONG, input_price=1.0)
    shown: list[tuple[int, int, dict]] = []

    def phase(name: str):
        return lambda done, total, figures: shown.append((done, total, dict(figures)))

    config, endpoint = SteerConfig(["p"], "o", judge=judge), endpoint_of(judge, tmp_path / "ratings.jsonl")
    table, found = rate_texts(config, endpoint, pa.table(columns), [task], phase)
    assert table["concept"].to_pylist() == [0.5, 1.0, None, 0.5]
    assert table["fluency"].to_pylist() == [0.5, 1.0, None, 0.5]
    assert table["concept_offline"].to_pylist() == [0.1, 0.2, 0.3, 0.4]
    assert found["failed"] == 2 and found["model"] == "judge-1"
    assert shown[0][:2] == (0, 6) and shown[0][2]["cost"] > 0  # two kinds of three texts; before the first call
    assert server.paid == {"a": 2, "b": 2, "bad": 0}
    assert any("much praise" in body["messages"][1]["content"] for body in server.bodies)
    calls = server.calls.total()
    again, _ = rate_texts(config, endpoint, pa.table(columns), [task], phase)
    assert again.equals(table) and server.calls.total() == calls + 2  # only what failed
    assert (tmp_path / "ratings.jsonl").is_file()


def test_without_an_endpoint_nothing_is_rated():
    table = pa.table({"concept": [0.5]})
    assert endpoint_of(JudgeConfig(), "ratings.jsonl") is None
    assert rate_texts(SteerConfig(["p"], "o"), None, table, [], lambda name: lambda *_: None) == (table, None)


def test_a_missing_key_is_found_before_anything_runs(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(InputError, match="JUDGE_KEY"):
        endpoint_of(JudgeConfig(url="http://127.0.0.1:1/v1", model="m", key_variable="JUDGE_KEY"), "ratings.jsonl")
