"""A server on this machine that speaks the chat completions protocol and fails in the ways that a test asks for."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONG = 30.0  # seconds


def completion(content: Any) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 6}
    return json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode()


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None
    """Close the connection after so many bytes of the body; -1: before the status."""
    trickle: bool = False
    """Send a byte every 20 ms."""
    until: threading.Event | None = None
    """Send nothing before this is set."""


@dataclass
class Server:
    """A stand-in: `script(text, n)` makes the reply to the n-th call about a text, counted from 0.

    The text is what stands between <text> tags, or all that the user says.
    """

    script: Callable[[str, int], Reply]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    """Ratings sent, by text."""
    at_once: int = 0
    most_at_once: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_calls(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.calls.total() >= count, timeout=120)


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        state: Server = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][1]["content"]
        text = question.partition("<text>")[2].partition("</text>")[0] or question
        with state.changed:
            reply = state.script(text, state.calls[text])
            state.calls[text] += 1
            state.bodies.append(body)
            state.headers.append(dict(self.headers))
            state.paths.append(self.path)
            state.times.append(time.monotonic())
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
            state.paid[text] += reply.drop is None and b"rating" in reply.body and reply.status == 200
            state.changed.notify_all()
        try:
            self.reply(reply)
        except OSError:
            pass  # the judge hung up
        finally:
            with state.changed:
                state.at_once -= 1

    def reply(self, reply: Reply) -> None:
        if reply.until is not None:
            reply.until.wait(LONG)
        if reply.drop == -1:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for i in range(len(reply.body) if reply.trickle else 0):
            self.wfile.write(reply.body[i : i + 1])
            time.sleep(0.02)
        if not reply.trickle:
            self.wfile.write(reply.body[: reply.drop])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Callable[[Callable[[str, int], Reply]], Server]]:
    """A function that starts a `Server` with a script; it runs until the context ends."""
    running = []

    def start(script: Callable[[str, int], Reply]) -> Server:
        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        state = Server(script, f"http://127.0.0.1:{http.server_port}/v1")
        http.state = state  # type: ignore[attr-defined]
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(http)
        return state

    yield start
    for http in running:
        http.shutdown()
        http.server_close()
