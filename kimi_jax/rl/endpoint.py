"""One server of this project (`python -m kimi_jax.serve`) as a sampler of token ids: HTTP over asyncio.

docs/rl.md section 13. Token ids go to /v1/completions and come back with the log-probability and the version of the
weights of each; /v1/weights makes the server read others. What comes back is taken for hostile: a reply has a time in
all, a size that follows from what was asked for, one type for each field, and every number has its bounds. Whatever is
wrong is an `EndpointError`; nothing else leaves this file.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from kimi_jax.infer.request import Request
from kimi_jax.untrusted import describe, parse_object

CONNECT_SECONDS = 10.0
MAX_HEADER_BYTES = 32 << 10
BASE_BYTES = 64 << 10  # of any reply
BYTES_A_TOKEN = 2048  # of an answer's token: its text, escaped, in two places, its log-probability, id and version
BYTES_A_PROMPT_TOKEN = 16
MAX_VERSION = 1 << 31
MAX_LOGPROB = 1e-3  # above 0 by rounding only
MIN_LOGPROB = -1e4  # the server writes -9999 for minus infinity


class EndpointError(ValueError):
    """Why an endpoint is not used for a while. reason: under which it is counted."""

    reason = "failed"


class Unreachable(EndpointError):
    """No connection, or one that ended too early."""

    reason = "unreachable"


class TimedOut(EndpointError):
    """It did not answer in time."""

    reason = "timeout"


class Busy(EndpointError):
    """It has no room now (429), or reads other weights (409)."""

    reason = "busy"


class Refused(EndpointError):
    """It answered with an error."""

    reason = "refused"


class FailedRequest(EndpointError):
    """It could not answer this one request (500)."""

    reason = "request_failed"


class Oversized(EndpointError):
    """The reply has more bytes than an answer to the request can have."""

    reason = "oversized"


class Malformed(EndpointError):
    """The reply is not what a server of this project sends."""

    reason = "malformed"


class WrongVersion(EndpointError):
    """Its weights are not those that it was given, or too old."""

    reason = "stale"


@dataclass(frozen=True)
class Drawn:
    """An answer. versions: as the server numbers its weights. stopped: by a stop id, which is part of it; else by
    length."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stopped: bool


class Endpoint:
    """A server at `url`, http://HOST:PORT.

    key: sent with every call. seconds: for a whole answer, and for a change of weights. vocab_size: ids are below it.
    Every method raises EndpointError.
    """

    def __init__(self, url: str, key: str, seconds: float, vocab_size: int):
        self.url = url.rstrip("/")
        self._key, self._seconds, self._vocab_size = key, seconds, vocab_size
        parts = urlsplit(self.url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port, self._authority = parts.port or (443 if self._secure else 80), parts.netloc

    async def draw(self, request: Request) -> Drawn:
        """The answer to a prompt without media. A stop token of the server's own, which nobody asked for, ends a reply
        but not the answer: it goes on from there, with the tokens that it would have got."""
        sampling, tokens, logprobs, versions = request.sampling, list[int](), list[float](), list[int]()
        prompt = request.token_ids.tolist()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    most = sampling.max_new_tokens - len(tokens)
                    asked = {
                        "prompt": prompt + tokens, "max_tokens": most, "temperature": sampling.temperature,
                        "top_p": sampling.top_p, "seed": sampling.seed, "stop_token_ids": list(sampling.stop_ids),
                        "logprobs": 0, "return_token_ids": True,
                    }  # fmt: skip
                    size = BASE_BYTES + BYTES_A_TOKEN * most + BYTES_A_PROMPT_TOKEN * (len(prompt) + len(tokens))
                    reply = await self._post("/v1/completions", asked, size)
                    part = read_drawn(reply, prompt + tokens, most, sampling.stop_ids, self._vocab_size)
                    tokens += part.token_ids
                    logprobs += part.logprobs
                    versions += part.versions
                    stopped = tokens[-1] in sampling.stop_ids
                    if stopped or len(tokens) >= sampling.max_new_tokens:
                        return Drawn(tuple(tokens), tuple(logprobs), tuple(versions), stopped)
        except TimeoutError as error:
            raise TimedOut(f"no answer within {self._seconds:g} s") from error

    async def change_weights(self, number: int) -> None:
        """Makes the server go on with the weights of this number, answers that still run included."""
        try:
            async with asyncio.timeout(self._seconds):
                reply = await self._post("/v1/weights", {"step": number, "running": "recompute"}, BASE_BYTES)
        except TimeoutError as error:
            raise TimedOut(f"no new weights within {self._seconds:g} s") from error
        if type(reply.get("version")) is not int or reply["version"] != number:
            raise WrongVersion(f"asked for the weights {number}, it says it has {describe(reply.get('version'))}")

    async def _post(self, path: str, value: Any, max_bytes: int) -> dict[str, Any]:
        """The JSON object that a call is answered with."""
        try:
            status, body = await self._exchange(path, json.dumps(value, allow_nan=False).encode(), max_bytes)
        except TimeoutError:  # the caller says of what
            raise
        except h11.ProtocolError as error:
            raise Malformed(f"no HTTP: {error}") from error
        except (OSError, EOFError, ssl.SSLError, UnicodeError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return parse_object(body, "the reply", Malformed)
        kind = {409: Busy, 429: Busy, 500: FailedRequest}.get(status, Refused)
        raise kind(f"status {status}: {describe(body[:300].decode('utf-8', 'replace'))}")

    async def _exchange(self, path: str, body: bytes, max_bytes: int) -> tuple[int, bytes]:
        """(status, body) of one call on a connection of its own."""
        context = ssl.create_default_context() if self._secure else None
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=context, limit=1 << 16)
        try:
            connection = h11.Connection(h11.CLIENT, MAX_HEADER_BYTES)
            headers = [("Host", self._authority), ("Content-Type", "application/json"), ("Connection", "close")]
            headers += [("Content-Length", str(len(body))), ("Accept-Encoding", "identity")]
            headers += [("Authorization", f"Bearer {self._key}")] if self._key else []
            writer.write(connection.send(h11.Request(method="POST", target=path, headers=headers)))
            writer.write(connection.send(h11.Data(data=body)))
            writer.write(connection.send(h11.EndOfMessage()))
            await writer.drain()
            return await _receive(connection, reader, max_bytes)
        finally:
            writer.transport.abort()


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader, max_bytes: int) -> tuple[int, bytes]:
    """(status, body). Raises Oversized, Malformed, EOFError, h11.ProtocolError."""
    status, data = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            piece = await reader.read(1 << 16)
            if not piece:  # our servers say how long a reply is, so its end is no end of a connection
                raise EOFError("the connection ended before the reply")
            connection.receive_data(piece)
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = dict(event.headers)
            if headers.get(b"content-encoding", b"identity") != b"identity":
                raise Malformed("the reply is compressed, which nobody asked for")
        elif isinstance(event, h11.Data):
            if len(data) + len(event.data) > max_bytes:
                raise Oversized(f"the reply has more than {max_bytes} bytes")
            data += event.data
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(data)
        elif not isinstance(event, h11.InformationalResponse):
            raise Malformed("no reply of HTTP")


def read_drawn(
    reply: dict[str, Any], prompt: Sequence[int], most: int, stop_ids: Sequence[int], vocab_size: int
) -> Drawn:
    """What a reply of /v1/completions says of its one answer: at least one token and at most `most` of them.

    Raises Malformed for everything that a server of this project would not send.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed(f"choices must be a list of one object, not {describe(choices)}")
    choice = choices[0]
    if choice.get("prompt_token_ids") != list(prompt):
        raise Malformed("prompt_token_ids are not those of the request")
    tokens = _integers(choice, "token_ids", vocab_size)
    versions = _integers(choice, "weight_versions", MAX_VERSION)
    scores = choice.get("logprobs")
    logprobs = scores.get("token_logprobs") if isinstance(scores, dict) else None
    if not isinstance(logprobs, list) or not all(map(_is_logprob, logprobs)):
        raise Malformed(f"token_logprobs must be numbers from {MIN_LOGPROB:g} to 0, not {describe(logprobs)}")
    if not len(tokens) == len(versions) == len(logprobs) or not 1 <= len(tokens) <= most:
        raise Malformed(
            f"{len(tokens)} token_ids, {len(versions)} weight_versions and {len(logprobs)} token_logprobs, where 1 to "
            f"{most} of each were asked for"
        )
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length") or (reason == "length" and len(tokens) < most):
        raise Malformed(
            f"finish_reason {describe(reason)} after {len(tokens)} of {most} tokens (is the server's "
            "--max_sequence_length below config.data.sequence_length?)"
        )
    if any(token in stop_ids for token in tokens[:-1]) or (tokens[-1] in stop_ids) > (reason == "stop"):
        raise Malformed("the answer goes on behind a stop id")
    return Drawn(tuple(tokens), tuple(map(float, logprobs)), tuple(versions), reason == "stop")


def _integers(choice: dict[str, Any], name: str, end: int) -> list[int]:
    values = choice.get(name)
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < end for value in values):
        raise Malformed(f"{name} must be a list of integers from 0 to {end - 1}, not {describe(values)}")
    return values


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and MIN_LOGPROB <= value <= MAX_LOGPROB  # which NaN and infinities are not
