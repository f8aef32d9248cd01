"""What stands before the routes: the key, the number and size of headers; and how a request is refused.

Connections that send their headers, or read their answer, too slowly are closed by `Connection`, which uvicorn uses
for its protocol; `uvicorn_settings` has the other limits of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kimi_jax.serve.protocol import ApiError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10  # request line and headers together
MAX_CONNECTIONS = 1024
HEADER_SECONDS = 10.0  # from a connection's first byte, or its opening, to the end of the headers
STALLED_SECONDS = 60.0  # that a client may leave its answer unread
DRAIN_SECONDS, DRAIN_BYTES = 5.0, 64 << 20


class Guard:
    """An ASGI application around another: refuses calls with too many headers, or without the key if there is one.

    GET /health needs no key. Keys are compared by their digests, in constant time.
    """

    def __init__(self, app: ASGIApp, api_key: str = ""):
        self._app, self._digest = app, _digest(api_key.encode()) if api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on, or refuses it before a byte of its body is read."""
        if scope["type"] == "http":
            problem = self._problem(scope)
            if problem:
                await refuse(problem, receive, send, unread=True)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        if len(scope["headers"]) > MAX_HEADERS:
            return ApiError(431, f"more than {MAX_HEADERS} headers")
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if size > MAX_HEADER_BYTES:  # the parser limits only headers that come in several pieces
            return ApiError(431, f"more than {MAX_HEADER_BYTES} bytes of headers")
        if not self._digest or scope["path"] == "/health":
            return None
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._digest):
            return None
        return ApiError(401, "this server needs its key: Authorization: Bearer KEY", code="invalid_api_key")


def read_api_key(flag: str, file: str, environment: str) -> str:
    """The key from the first of the three that is there; file: its path. "" for none.

    Raises ValueError for one that no header can carry, OSError for a file that cannot be read.
    """
    key = flag or (Path(file).read_text(encoding="utf-8").strip() if file else environment)
    if (file and not key) or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the API key must be printable ASCII without spaces, and a file of it not empty")
    return key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def declared_length(scope: Scope) -> int:
    """Content-Length, 0 without one. The HTTP parser has refused what is no number."""
    return next((int(value) for name, value in scope["headers"] if name.lower() == b"content-length"), 0)


async def refuse(problem: ApiError, receive: Receive, send: Send, unread: bool) -> None:
    """Sends an error as JSON.

    unread: the body may still be on its way. It is taken in and thrown away for a short time, since a connection that
    is closed on incoming data is reset, and the client would not see the answer.
    """
    content = json.dumps(problem.body(), allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if problem.status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if unread:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": unread})
    if unread:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await _drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    count = 0
    while count <= DRAIN_BYTES:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        count += len(message.get("body", b""))


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit on the time that headers take and that an answer stays unread.

    uvicorn itself limits only the pause between two requests of a connection.
    """

    header_seconds, stalled_seconds = HEADER_SECONDS, STALLED_SECONDS
    _header_timer: Any = None  # a handle of whatever event loop there is
    _stalled_timer: Any = None

    def connection_made(self, transport: Any) -> None:
        """The time for the first headers begins."""
        super().connection_made(transport)
        self._time_headers()

    def data_received(self, data: bytes) -> None:
        """It ends with the last header, and begins anew with the first byte of the next request."""
        super().data_received(data)
        self._time_headers()

    def on_response_complete(self) -> None:
        """Bytes of the next request may have come during the last one."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._time_headers()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stalled_timer = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        _cancel(self._stalled_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is timed any more."""
        _cancel(self._header_timer)
        _cancel(self._stalled_timer)
        super().connection_lost(exc)

    def _time_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._header_timer)
            self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._headers_late)

    def _headers_late(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _cancel(timer: Any) -> None:
    if timer is not None:
        timer.cancel()


def uvicorn_settings() -> dict[str, Any]:
    """What `uvicorn.run` and `uvicorn.Config` are given: the limits of HTTP, and no websockets."""
    return {
        "http": Connection, "ws": "none", "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "limit_concurrency": MAX_CONNECTIONS, "timeout_keep_alive": 5, "server_header": False,
        "proxy_headers": False,
    }  # fmt: skip
