"""One engine over many hosts: host 0 decides what is asked for and when a step is taken, the others do the same.

Every host has an engine of the same sizes over one mesh. What an engine does follows from its requests and the order of
its steps alone (docs/architecture.md section 9), so host 0 sends what was asked for since the last step along with the
next one, and every host begins the same programs. Masks of a grammar take as long as they take: host 0 computes them
and sends them within the step. With every step goes a checksum of what the last one gave, so that a host whose numbers
differ ends instead of answering nonsense.

Programs that do the same on all hosts anyway, such as a training run that draws its own rollouts, need none of this:
they call their engines alike.

A host whose connection ends is lost, and with it all others, since the programs need every one of them. Host 0 learns
it first and tells the rest by name: a program that waits for a device that is gone may wait for ever.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hmac
import json
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NoReturn

import numpy as np

from kimi_jax import hosts
from kimi_jax.config import ModelConfig
from kimi_jax.infer.engine import Engine, Running
from kimi_jax.infer.line import NOBODY, Caller
from kimi_jax.infer.request import Grammar, GrammarError, Matcher, Request, TokenEvent
from kimi_jax.infer.unfinished import Unfinished

MEET_SECONDS = 120.0  # for all hosts to connect, once each of them has compiled
VERDICT_SECONDS = 20.0  # after a failed step: for the word that another host is lost, which explains it
SILENT_SECONDS = 30  # a machine that does not answer for so long is gone
HELLO_BYTES, MOST_BYTES = 1 << 10, 1 << 32  # of a frame: before a host has said who it is, and after
_LENGTH = struct.Struct(">Q")


class HostLost(RuntimeError):
    """A host is gone; the message names it."""


class Link:
    """A connection to another host, of this name: JSON objects in frames, any thread may send."""

    def __init__(self, connection: socket.socket, name: str):
        self.name, self._connection, self._lock = name, connection, threading.Lock()
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", SILENT_SECONDS // 5 - 1)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        """Raises OSError if the other side is gone."""
        data = json.dumps(message).encode()
        with self._lock:
            self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when there are no more."""
        try:
            return _receive(self._connection, MOST_BYTES)
        except (OSError, ValueError):
            return None


def _receive(connection: socket.socket, most: int) -> dict[str, Any]:
    """Raises OSError at the end, ValueError for what is no message."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > most:
        raise ValueError(f"a message of {length} bytes, of at most {most}")
    message = json.loads(_read(connection, length))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("the connection has ended")
        parts += part
    return bytes(parts)


def meet() -> list[Link]:
    """Connects host 0 with all others: on host 0 the links to them in order, elsewhere the one to host 0; no links for
    a single host. All hosts call it at the same point, after `hosts.start`.

    Host 0 listens on a port that the system gives it; port and password go over the devices. Raises HostMissing.
    """
    found = hosts.find()
    if found is None or len(found.names) == 1:
        return []
    if found.this:
        port, password = hosts.gather(None)[0]
        try:
            connection = socket.create_connection((found.coordinator[0], port), timeout=MEET_SECONDS)
        except OSError as error:
            raise hosts.HostMissing(f"{found.name(0)} cannot be reached on port {port}: {error}") from error
        link = Link(connection, found.name(0))
        link.send({"host": found.this, "password": password})
        return [link]
    password = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=1024) as server:
        hosts.gather([server.getsockname()[1], password])
        return _accept(found, server, password)


def _accept(found: hosts.Hosts, server: socket.socket, password: str) -> list[Link]:
    links: dict[int, Link] = {}
    deadline, wanted = time.monotonic() + MEET_SECONDS, set(range(1, len(found.names)))
    while missing := wanted - set(links):
        left = deadline - time.monotonic()
        if left <= 0:
            names = ", ".join(found.name(n) for n in sorted(missing))
            raise hosts.HostMissing(f"{names} did not connect to {found.name(0)} within {MEET_SECONDS:.0f} s")
        server.settimeout(left)
        with contextlib.suppress(OSError, ValueError, RecursionError):  # not one of ours
            connection, _ = server.accept()
            connection.settimeout(min(left, 10))
            said = _receive(connection, HELLO_BYTES)
            given = str(said.get("password")).encode()
            if hmac.compare_digest(given, password.encode()) and said.get("host") in missing:
                links[said["host"]] = Link(connection, found.name(said["host"]))
            else:
                connection.close()
    return [links[n] for n in sorted(links)]


# ------------------------------------------------------------------------------------------------------------- commands


def join() -> None:
    """What a command does first: joins this host to the others, if there are any; see `hosts`. Ends the process
    with the reason if that fails, with the status that asks to be started again if a host did not come."""
    try:
        hosts.start()
    except hosts.HostMissing as error:
        leave(str(error))
    except ValueError as error:
        sys.exit(f"error: {error}")


# --------------------------------------------------------------------------------------------------------------- host 0


class Leader:
    """Host 0's engine, with the others' behind it: `infer.engine.Engine` for those who submit, cancel and step.

    `watch` it before the first step, `close` it at the end, so that the others end too.
    """

    def __init__(self, engine: Engine, links: Sequence[Link]):
        self._engine, self._links = engine, links
        self._asked: list[dict[str, Any]] = []
        self._seen = 0
        self._loss, self._lost = "", threading.Event()
        self._closing = False
        self._lock = threading.Lock()

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self._engine.config

    @property
    def version(self) -> int:
        """See `Engine`."""
        return self._engine.version

    @property
    def idle(self) -> bool:
        """See `Engine`."""
        return self._engine.idle

    def stats(self) -> dict[str, int]:
        """See `Engine`: the hosts have the same numbers."""
        return self._engine.stats()

    def submit(self, request: Request, caller: Caller = NOBODY) -> int:
        """See `Engine`. What it refuses, the other hosts never hear of."""
        plain = dataclasses.replace(request, grammar=None)
        if request.grammar is not None:
            request = dataclasses.replace(request, grammar=_Telling(request.grammar, self._tell))
        number = self._engine.submit(request, caller)
        self._asked.append(
            {"submit": number, "request": Unfinished(plain).to_json(), "grammar": request.grammar is not None,
             "caller": list(caller)}
        )  # fmt: skip
        return number

    def set_params(self, params: Any, version: int | None = None, running: Running | None = None) -> None:
        """Raises RuntimeError: weights are everybody's, so each host sets its own on its own engine."""
        raise RuntimeError("weights of an engine over many hosts are set on each of them, not through host 0")

    def cancel(self, request_id: int) -> None:
        """See `Engine`."""
        self._engine.cancel(request_id)
        self._asked.append({"cancel": request_id})

    def step(self, tokens: int | None = None) -> list[TokenEvent]:
        """See `Engine`. Raises HostLost, naming the host, if one is gone."""
        asked, self._asked = self._asked, []
        try:
            self._tell({"asked": asked, "tokens": tokens, "seen": self._seen})
            events = self._engine.step(tokens)
        except Exception as error:
            if self._lost.wait(VERDICT_SECONDS):
                raise HostLost(self._loss) from error
            raise
        self._seen = _checksum(events)
        return events

    def watch(self, lost: Callable[[str], None]) -> None:
        """From now on tells `lost`, in a thread of its own and once, that a host is gone, and why."""
        for link in self._links:
            threading.Thread(target=self._watch, args=(link, lost), name=f"watch {link.name}", daemon=True).start()

    def close(self) -> None:
        """The other hosts end."""
        with self._lock:
            self._closing = True
        with contextlib.suppress(OSError):
            self._tell({"end": True})

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links:
            link.send(message)

    def _watch(self, link: Link, lost: Callable[[str], None]) -> None:
        said = link.receive() or {}
        with self._lock:
            if self._closing or self._loss:
                return
            self._loss = f"{link.name} is lost" + (f": {said['error']}" if "error" in said else "")
        self._lost.set()
        for other in self._links:
            if other is not link:
                with contextlib.suppress(OSError):
                    other.send({"lost": self._loss})
        lost(self._loss)


class _Telling:
    """A grammar whose masks the other hosts are told."""

    def __init__(self, grammar: Grammar, tell: Callable[[dict[str, Any]], None]):
        self._grammar, self._tell = grammar, tell

    def start(self) -> Matcher:
        return _TellingMatcher(self._grammar.start(), self._tell)


class _TellingMatcher:
    def __init__(self, matcher: Matcher, tell: Callable[[dict[str, Any]], None]):
        self._matcher, self._tell = matcher, tell
        self._accepted: list[int] = []

    def accept(self, token: int) -> None:
        self._accepted.append(token)  # what can go wrong goes wrong in `allowed`, of which the others hear

    def allowed(self) -> np.ndarray:
        try:
            for token in self._accepted:
                self._matcher.accept(token)
            self._accepted.clear()
            mask = self._matcher.allowed()
        except GrammarError as error:
            self._tell({"refused": str(error)})
            raise
        self._tell({"mask": base64.b64encode(np.ascontiguousarray(mask, np.uint32).tobytes()).decode()})
        return mask


# ----------------------------------------------------------------------------------------------------------- the others


def obey(engine: Engine, link: Link) -> None:
    """What a command does on hosts other than 0: `follow`, and nothing else. Signals are for host 0, which finishes
    what runs; a lost host ends the process, with the status that asks to be started again."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(engine, link, leave)
    except Exception as error:
        leave(f"{type(error).__name__}: {error}")


def leave(why: str) -> NoReturn:
    """Ends the process at once, with the reason: the ordinary way out waits for all hosts."""
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(hosts.RESTART)


def follow(engine: Engine, link: Link, lost: Callable[[str], None]) -> None:
    """Does what host 0 does until it is told to end.

    lost: told, in a thread of its own, that a host is gone; it should end the process, since this thread may wait for
    a device for ever. Raises HostLost if it does not, RuntimeError if this host's numbers differ from those of host 0.
    """
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    reader = threading.Thread(target=_read_orders, args=(link, inbox, lost), name="orders", daemon=True)
    reader.start()
    seen = 0
    while "end" not in (order := inbox.get()):
        if "lost" in order:
            raise HostLost(order["lost"])
        try:
            if order["seen"] != seen:
                raise RuntimeError("the last step gave other tokens here than on host 0: are software and chips alike?")
            for asked in order["asked"]:
                _ask(engine, asked, inbox)
            seen = _checksum(engine.step(order["tokens"]))
        except Exception as error:
            reader.join(VERDICT_SECONDS)
            if not reader.is_alive():
                raise HostLost(inbox.get()["lost"]) from error
            link.send({"error": f"{type(error).__name__}: {error}"})
            raise


def _read_orders(link: Link, inbox: SimpleQueue[dict[str, Any]], lost: Callable[[str], None]) -> None:
    while True:
        order = link.receive() or {"lost": f"{link.name} is lost"}
        if "lost" in order:
            lost(order["lost"])
        inbox.put(order)
        if "lost" in order or "end" in order:
            return


def _ask(engine: Engine, asked: dict[str, Any], inbox: SimpleQueue[dict[str, Any]]) -> None:
    if "cancel" in asked:
        engine.cancel(asked["cancel"])
        return
    request = Unfinished.from_json(asked["request"]).request
    if asked["grammar"]:
        request = dataclasses.replace(request, grammar=_Told(inbox))
    place, user = asked["caller"]
    number = engine.submit(request, (place, user))
    if number != asked["submit"]:
        raise RuntimeError(f"request {asked['submit']} of host 0 is number {number} here")


class _Told:
    """Grammar and matcher at once: what may come next, host 0 says."""

    def __init__(self, inbox: SimpleQueue[dict[str, Any]]):
        self._inbox = inbox

    def start(self) -> Matcher:
        return self

    def accept(self, token: int) -> None:
        pass

    def allowed(self) -> np.ndarray:
        order = self._inbox.get()
        if "refused" in order:
            raise GrammarError(order["refused"])
        if "mask" not in order:
            self._inbox.put(order)  # host 0 is lost, or has gone another way
            raise RuntimeError("host 0 sent no mask for an answer that has a grammar")
        return np.frombuffer(base64.b64decode(order["mask"]), np.uint32)


def _checksum(events: Sequence[TokenEvent]) -> int:
    """Of what a step has given."""
    return zlib.crc32(repr([(e.request_id, e.token_id, e.finish_reason) for e in events]).encode())
