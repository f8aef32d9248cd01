"""Frames between the parent and the process inside the sandbox, over two pipes.

A frame: magic, id (16 random bytes that the parent draws for each request and the reply repeats), the lengths of two
parts, then a JSON object and raw bytes. Nothing is ever unpickled, and no image file decoded: images are uint8.

What the parent reads was written by an enemy: lengths are compared with their limits before anything is read, and every
step has a deadline. An id that cannot be guessed means that a reply forged ahead of its request is recognised.

h, w  height and width of an image in pixels; images are uint8 [h, w, 3]
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

HEADER = struct.Struct("<4s16sII")
MAGIC = b"KSB1"
MAX_JSON = 8 * 2**20
MAX_SIDE = 16_384
TICK_SECONDS = 0.05  # how often the parent looks at the process while it waits
CHUNK = 1 << 20


class ProtocolError(Exception):
    """What came is not the reply to what was asked."""


class Deadline(Exception):
    """The other side did not read or write in time."""


class Ended(Exception):
    """The other side closed its pipe."""


class Frame(NamedTuple):
    """id: 16 bytes. head: a JSON object. body: raw bytes."""

    id: bytes
    head: dict[str, Any]
    body: bytes


def pack(frame: Frame) -> bytes:
    """The bytes of a frame."""
    head = json.dumps(frame.head).encode()
    return HEADER.pack(MAGIC, frame.id, len(head), len(frame.body)) + head + frame.body


def read_frame(read: Callable[[int], bytes], max_json: int, max_body: int) -> Frame:
    """One frame through `read`, which returns exactly as many bytes as it is asked for.

    Raises ProtocolError for another magic, a part above its limit, or JSON that is no object.
    """
    magic, id, json_size, body_size = HEADER.unpack(read(HEADER.size))
    if magic != MAGIC:
        raise ProtocolError("what came is not a frame")
    if json_size > max_json or body_size > max_body:
        raise ProtocolError(f"a frame of {json_size} and {body_size} bytes; at most {max_json} and {max_body} are read")
    try:
        head = json.loads(read(json_size))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the head of a frame is not JSON") from error
    if not isinstance(head, dict):
        raise ProtocolError("the head of a frame is not an object")
    return Frame(id, head, read(body_size))


def read_blocking(descriptor: int, size: int) -> bytes:
    """Exactly `size` bytes, however long it takes. Raises Ended."""
    found = bytearray()
    while len(found) < size:
        data = os.read(descriptor, min(size - len(found), CHUNK))
        if not data:
            raise Ended
        found += data
    return bytes(found)


def write_blocking(descriptor: int, data: bytes) -> None:
    """All of `data`, however long it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Pipes:
    """The parent's ends, which do not block. `watch` is called while waiting, and raises to give up."""

    def __init__(self, write_to: int, read_from: int, watch: Callable[[], None]):
        self._write_to, self._read_from, self._watch = write_to, read_from, watch
        os.set_blocking(write_to, False)
        os.set_blocking(read_from, False)

    def unread(self) -> bool:
        """Whether something came that nobody asked for, or the pipe was closed."""
        poll = select.poll()
        poll.register(self._read_from, select.POLLIN)
        return bool(poll.poll(0))

    def write(self, data: bytes, deadline: float) -> None:
        """All of `data` before `deadline` (time.monotonic). Raises Deadline, Ended, and what `watch` raises."""
        view = memoryview(data)
        while view:
            self._wait(self._write_to, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._write_to, view[:CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError as error:  # EPIPE
                raise Ended from error

    def read(self, size: int, deadline: float) -> bytes:
        """Exactly `size` bytes before `deadline`. Raises as `write` does."""
        found = bytearray()
        while len(found) < size:
            self._wait(self._read_from, select.POLLIN, deadline)
            try:
                data = os.read(self._read_from, min(size - len(found), CHUNK))
            except BlockingIOError:
                continue
            if not data:
                raise Ended
            found += data
        return bytes(found)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Deadline
            if poll.poll(min(left, TICK_SECONDS) * 1000):
                return
            self._watch()

    def close(self) -> None:
        """Closes both ends."""
        os.close(self._write_to)
        os.close(self._read_from)
