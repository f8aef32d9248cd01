"""A server whose answers follow from seed and position alone, and which misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCABULARY = 320
FIRST = 10  # ids below it are never drawn
LOGPROB = -0.5
PATIENCE = 120  # seconds that a test waits for what must happen; never how long something takes


def token_at(seed: int, position: int) -> int:
    """What an answer with this seed has at a position of its sequence."""
    return FIRST + (seed * 7919 + position * 104729) % (VOCABULARY - FIRST)


def answer(seed: int, prompt: list[int], most: int) -> list[int]:
    """The whole answer."""
    return [token_at(seed, len(prompt) + i) for i in range(most)]


def reply(body: dict[str, Any], version: int) -> dict[str, Any]:
    """A reply of /v1/completions as `kimi_jax.serve` gives it."""
    tokens = answer(body["seed"], body["prompt"], body["max_tokens"])
    logprobs = {
        "tokens": ["a"] * len(tokens), "token_logprobs": [LOGPROB] * len(tokens),
        "top_logprobs": [{}] * len(tokens), "text_offset": list(range(len(tokens))),
    }  # fmt: skip
    choice = {
        "index": 0, "text": "a" * len(tokens), "logprobs": logprobs, "prompt_token_ids": body["prompt"],
        "token_ids": tokens, "weight_versions": [version] * len(tokens), "finish_reason": "length",
    }  # fmt: skip
    return {"id": "cmpl-0", "object": "text_completion", "choices": [choice], "usage": {}}


class Stub(ThreadingHTTPServer):
    """Behaves well unless `misbehave` is set: called with the open socket, the path and the body instead, and what it
    returns is the reply (None: it has written one itself, or none)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version, self.drawn, self.changes = 0, 0, 0
        self.misbehave: Callable[[Stub, socket.socket, str, dict[str, Any]], dict[str, Any] | None] | None = None
        self.stopping = threading.Event()
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""

    def well(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a good server replies."""
        with self.changed:
            if path == "/v1/weights":
                self.version, self.changes = body["step"], self.changes + 1
                found = {"object": "weights", "step": self.version, "version": self.version}
            else:
                self.drawn += 1
                found = reply(body, self.version)
            self.changed.notify_all()
        return found

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until a call has made something true."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, wrong = self.server, self.server.misbehave
        value = wrong(server, self.connection, self.path, body) if wrong else server.well(self.path, body)
        if value is not None:
            send(self.connection, json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


def send(connection: socket.socket, body: bytes, status: str = "200 OK", *, headers: str = "") -> None:
    """A reply with its length."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nX-Weight-Version: 0\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)


@contextlib.contextmanager
def stubs(count: int) -> Iterator[list[Stub]]:
    """Running ones."""
    servers = [Stub() for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield servers
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.stopping.set()
            server.shutdown()
            server.server_close()
            thread.join(PATIENCE)
