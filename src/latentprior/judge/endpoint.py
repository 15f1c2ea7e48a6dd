"""Answers of a language model behind any endpoint that speaks the chat completions protocol of OpenAI."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from latentprior.config import JudgeConfig
from latentprior.judge.answers import Answer, Answers, Malformed, Message, Request
from latentprior.judge.cache import VALUE, AnswerCache, content_key, read_cache
from latentprior.judge.post import Refused, Rejected, Unavailable, opener, post_json
from latentprior.judge.ratings import RatingRequest
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent

CHARACTERS_PER_TOKEN = 4
OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
LEAST = {"concurrency": 1, "attempts": 1, "patience": 1, "reasks": 0, "backoff": 0, "longest_wait": 0}
NOT_ASKED, MALFORMED = "not asked", "malformed"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Cost:
    """What asking will take, estimated beforehand."""

    calls: int  # if none fails
    known: int  # answers that need no call: in the cache already, or asked for twice
    prompt_tokens: int  # characters of the prompts / 4
    answer_tokens: int
    money: float | None  # in the currency of the prices; None if no price is known

    def figures(self) -> dict[str, Any]:
        """What progress shows of it: tokens, and money where prices are known."""
        tokens = {"tokens": self.prompt_tokens + self.answer_tokens}
        return tokens if self.money is None else tokens | {"cost": self.money}


class Ratings(Answers[int]):
    """Ratings in the order of their requests."""

    def values(self) -> np.ndarray:
        """[N] float64, NaN where there is no rating."""
        return np.array([np.nan if result.value is None else result.value for result in self.results], np.float64)


def endpoint_key(variable: str) -> str:
    """The key in an environment variable, which must be set; nothing else here reads the environment."""
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"the judge's key is read from the environment variable {variable!r}, which is not set")
    return key


def endpoint_of(config: JudgeConfig, cache: str | Path) -> EndpointJudge | None:
    """The judge that `config` names, with its key from the environment; None if it names none."""
    if config.url is None or config.model is None:
        return None
    key = endpoint_key(config.key_variable) if config.key_variable else None
    options: dict[str, Any] = {"concurrency": config.workers, "timeout": config.timeout, "attempts": config.attempts}
    return EndpointJudge(config.url, config.model, key, cache=cache, **options)


@dataclass(eq=False)
class EndpointJudge:
    """Asks an endpoint, for ratings or anything else; every answer is paid for once and kept in a file.

    A call that fails for now (no connection, time-out, status 408, 409, 425, 429 or 5xx, a response that is not JSON)
    is repeated after `backoff` seconds, twice that, and so on, and never before the server's Retry-After. A request
    that fails for good gets no value and a reason; the next run asks for it again. Paid answers are found by model,
    messages, options, kind and version of the wording.
    """

    url: str  # base URL, such as "https://api.example.com/v1"; a bare host stands for its /v1
    model: str
    key: str | None = field(default=None, repr=False)  # bearer token, if the endpoint needs one
    _: KW_ONLY
    cache: str | Path  # file of paid answers (`AnswerCache`)
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6  # most failed calls for one request
    reasks: int = 2  # how often a malformed answer is asked for again
    backoff: float = 1.0
    longest_wait: float = 120.0  # longer back-off is cut to it, a longer Retry-After fails the request
    patience: int = 20  # after so many requests in a row that got no answer at all, the others are not asked
    options: Mapping[str, Any] = field(default_factory=lambda: dict(OPTIONS))  # further fields of the body

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} of a judge must be at least {least}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"timeout of a judge must be positive, got {self.timeout}")
        if not self.model.strip():
            raise InputError("name the judge's model")
        key = self.key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise InputError("the judge's key must be printable ASCII without spaces around it")
        self.url, self.cache = _completions_url(self.url), Path(self.cache)
        self._client = opener()

    def estimate(
        self, requests: Sequence[Request[Any]], *, prompt_price: float | None = None, answer_price: float | None = None
    ) -> Cost:
        """What asking `requests` will take, given what the cache holds; calls nothing. Prices: of a million tokens."""
        known = read_cache(self.cache)
        pending = {key: request for key, request in self._keyed(requests) if key not in known}
        texts = (message["content"] for request in pending.values() for message in request.messages())
        prompt_tokens = -(-sum(map(len, texts)) // CHARACTERS_PER_TOKEN)
        answer_tokens = sum(request.answer_tokens for request in pending.values())
        money = None
        if prompt_price is not None or answer_price is not None:
            money = (prompt_tokens * (prompt_price or 0.0) + answer_tokens * (answer_price or 0.0)) / 1e6
        return Cost(len(pending), len(requests) - len(pending), prompt_tokens, answer_tokens, money)

    def __call__(self, requests: Sequence[RatingRequest], *, report: Report = silent) -> Ratings:
        """The ratings of `requests`; see `ask`."""
        return Ratings(self.ask(requests, report=report).results)

    def ask(self, requests: Sequence[Request[Value]], *, report: Report = silent) -> Answers[Value]:
        """The answers to `requests`, in their order; `InputError` if the endpoint refuses every one.

        If it is interrupted, the calls that are under way are waited for, as they are paid for; the next run goes on.
        """
        keyed = self._keyed(requests)
        with AnswerCache(self.cache) as cache:
            known = {key: Answer(cache.entries[key][VALUE]) for key, _ in keyed if key in cache.entries}
            pending = {key: request for key, request in keyed if key not in known}
            results = known | self._ask_all(pending, cache, report)
        return Answers([results[key] for key, _ in keyed])

    def recall(self, requests: Sequence[Request[Value]]) -> list[Value | None]:
        """What the cache holds of the answers to `requests`, None where it has none; calls nothing."""
        known = read_cache(self.cache)
        return [known[key][VALUE] if key in known else None for key, _ in self._keyed(requests)]

    def _keyed(self, requests: Sequence[Request[Value]]) -> list[tuple[str, Request[Value]]]:
        return [(content_key(self._body(r.messages()) | {"kind": r.kind, "version": r.version}), r) for r in requests]

    def _body(self, messages: list[Message]) -> dict[str, Any]:
        return {**self.options, "model": self.model, "messages": messages}

    def _ask_all(
        self, pending: Mapping[str, Request[Value]], cache: AnswerCache, report: Report
    ) -> dict[str, Answer[Value]]:
        results: dict[str, Answer[Value]] = {}
        failed = unanswered = 0
        stop, pool = threading.Event(), ThreadPoolExecutor(self.concurrency)
        try:
            futures = {pool.submit(self._ask_one, key, item, cache, stop): key for key, item in pending.items()}
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                failed += result.value is None
                answered = result.value is not None or MALFORMED in result.failures
                unanswered = 0 if answered else unanswered + 1
                report(len(results), len(pending), {"failed": failed})
                if unanswered >= self.patience:
                    stop.set()
        except Refused as error:
            raise InputError(f"the judge {self.url} refuses every request: {error}") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return results

    def _ask_one(self, key: str, request: Request[Value], cache: AnswerCache, stop: threading.Event) -> Answer[Value]:
        """Ask until there is a value or the request has failed; a value is in the cache before this returns."""
        messages, failures, calls, malformed = request.messages(), [], 0, 0
        answer, reason, pause = "", NOT_ASKED, 0.0
        while not stop.wait(pause):
            calls += 1
            try:
                answer, usage = self._post(messages)
                value = request.parse(answer)
            except Refused:
                stop.set()  # the other threads need not find out for themselves
                raise
            except Rejected as error:
                return Answer(None, str(error), calls, (*failures, error.failure))
            except Unavailable as error:
                failures.append(error.failure)
                reason, asked_to_wait = str(error), error.retry_after or 0.0
                if len(failures) - malformed >= self.attempts or asked_to_wait > self.longest_wait:
                    break
                pause = max(asked_to_wait, self._backoff(key, len(failures)))
            except Malformed as error:
                failures.append(MALFORMED)
                malformed += 1
                reason, pause = f"malformed answer: {error}", 0.0
                if malformed > self.reasks:
                    break
                messages = request.messages() + request.again(answer)
            else:
                cache.add(key, value, model=self.model, kind=request.kind, answer=answer, usage=usage)
                return Answer(value, "", calls, tuple(failures))
        return Answer(None, reason, calls, tuple(failures))

    def _post(self, messages: list[Message]) -> tuple[str, Any]:
        response = post_json(self._client, self.url, self._body(messages), key=self.key, timeout=self.timeout)
        try:
            answer = response["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise Unavailable("not JSON", "the response is not that of a chat completion") from error
        return answer if isinstance(answer, str) else "", response.get("usage")

    def _backoff(self, key: str, tries: int) -> float:
        """Seconds to wait after so many failures; spread by the key, so that threads do not return all at once."""
        return min(self.backoff * 2.0 ** (tries - 1), self.longest_wait) * (0.5 + int(key[:8], 16) / 2**33)


def _completions_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"the judge's URL must be like https://host/v1, got {url!r}")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"
