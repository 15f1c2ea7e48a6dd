"""One HTTP request with a JSON body, and the three ways in which it can fail.

By the standard library's client, which sends what it is told to and nothing else: the openai client adds values from
the environment, follows redirects, and has neither one deadline nor a largest size for a response.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from textwrap import shorten
from typing import Any

_LARGEST_RESPONSE = 2**22  # bytes
_PASSING = frozenset({408, 409, 425, 429})  # and every status from 500 on
# A redirect would carry the key to another host; the others say that no request to this URL with this key will do.
_FOR_ALL = frozenset({301, 302, 303, 307, 308, 401, 402, 404, 405})


class PostError(Exception):
    """A request failed; the message is one line, `failure` an HTTP status, "time-out", "connection" or "not JSON"."""

    def __init__(self, failure: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.failure, self.retry_after = failure, retry_after


class Unavailable(PostError):
    """It may work later; `retry_after` are the seconds that the server asks to wait, if it does."""


class Rejected(PostError):
    """This request will never work."""


class Refused(PostError):
    """No request to this URL with this key will work."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def opener() -> urllib.request.OpenerDirector:
    """A client for `post_json` that follows no redirects; it goes through the system's proxies."""
    return urllib.request.build_opener(_NoRedirects)


def post_json(
    client: urllib.request.OpenerDirector, url: str, body: Mapping[str, Any], *, key: str | None, timeout: float
) -> Any:
    """The JSON that the server responds with; `key` is a bearer token, `timeout` seconds for the whole exchange."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "latentprior"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    deadline = time.monotonic() + timeout
    try:
        with client.open(request, timeout=timeout) as response:
            data = _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _of_status(error, key) from error
    except (OSError, HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise Unavailable("time-out", f"no response within {timeout:g} s") from error
        raise Unavailable("connection", f"the connection failed: {shorten(str(cause), 200)}") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unavailable("not JSON", f"the response is not JSON: {_shown(data, key)}") from error


def _read(response: HTTPResponse, deadline: float) -> bytes:
    expected, data = response.length, b""
    while part := response.read1(2**16):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > _LARGEST_RESPONSE:
            raise ConnectionAbortedError(f"the response is over {_LARGEST_RESPONSE} bytes long")
    if expected is not None and len(data) < expected:
        raise ConnectionResetError(f"it ended after {len(data)} of {expected} bytes")
    return data


def _of_status(error: urllib.error.HTTPError, key: str | None) -> PostError:
    try:
        said = _shown(error.read(2**14), key)
    except (OSError, HTTPException):
        said = ""
    status, message = str(error.code), f"HTTP status {error.code}: {said or error.reason}"
    if error.code in _PASSING or error.code >= 500:
        return Unavailable(status, message, _seconds(error.headers.get("Retry-After")))
    return (Refused if error.code in _FOR_ALL else Rejected)(status, message)


def _shown(data: bytes, key: str | None) -> str:
    """The error message in a response, or its beginning, on one line and without the key."""
    text = data.decode(errors="replace")
    try:
        text = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return shorten(text.replace(key, "***") if key else text, 200)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, a number of seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return None if math.isnan(seconds) else max(seconds, 0.0)
