"""The body of a request: read within a time and a memory limit, and its JSON bounded before it is parsed.

Parsing builds about 100 bytes for every value, however short it is written, and calls itself for every level. So values
and levels are counted first, over the bytes outside strings, in time linear in the body.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from kimi_jax.serve.protocol import ApiError
from kimi_jax.untrusted import refuse_constant

MAX_LEVELS = 64
MAX_VALUES = 1 << 20  # a prompt of token ids has as many
MAX_QUOTES = 1 << 23  # escaped ones included, before strings are looked at
COPIES = 4  # of a body that are held at once: as it arrived, as text, parsed, and its media from base64
VALUE_BYTES = 100
# an unterminated string matches up to the end: no byte is looked at twice
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z|\\\Z)', re.DOTALL)
_OTHER_BYTES = bytes(set(range(256)) - set(b"{}[],:"))
_LEVELS = np.zeros(256, np.int8)
_LEVELS[list(b"{[")], _LEVELS[list(b"}]")] = 1, -1


async def read_body(
    receive: Receive, declared: int, max_body: int, seconds: float, reserve: Callable[[int], None]
) -> bytes:
    """The whole body.

    declared: its Content-Length, 0 if there is none. seconds: for all of it together. reserve: takes the memory, and
    gives it back for a negative number. Raises ApiError(408 | 413), ClientDisconnect, and what `reserve` raises.
    """
    if declared > max_body:
        raise ApiError(413, f"the body has more than {max_body} bytes", code="too_large")
    reserve(COPIES * declared)  # is there room for it now? What only was announced holds nothing
    reserve(-COPIES * declared)
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece = message.get("body", b"")
                if len(data) + len(piece) > max_body:
                    raise ApiError(413, f"the body has more than {max_body} bytes", code="too_large")
                reserve(COPIES * len(piece))
                data += piece
                if not message.get("more_body", False):
                    return bytes(data)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", code="timeout") from error


def count_values(data: bytes) -> int:
    """How many values a JSON text has at most. Raises ApiError(400) for too many of them or too many levels."""
    if data.count(b'"') > MAX_QUOTES:
        raise ApiError(400, f"the body has more than {MAX_QUOTES} quotation marks")
    structure = _STRING.sub(b"", data).translate(None, _OTHER_BYTES)
    if len(structure) > 2 * MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values")
    if structure and np.cumsum(_LEVELS[np.frombuffer(structure, np.uint8)], dtype=np.int32).max() > MAX_LEVELS:
        raise ApiError(400, f"the body is nested too deeply: more than {MAX_LEVELS} levels")
    return len(structure) + 1


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ApiError(400)."""
    try:
        return json.loads(data, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
