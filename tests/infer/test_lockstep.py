"""An engine over many hosts: real processes with gloo between them, and what host 0 and the others say to each other.

The processes compile for a mesh each, so that all of it stands behind the mark `slow` but for the messages, which need
no model.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

from kimi_jax import hosts
from kimi_jax.data.example import MediaItem
from kimi_jax.infer import lockstep
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import GrammarError, Request, Sampling, TokenEvent
from tests.environment import REPO
from tests.train.processes import environment, free_port

PATIENCE = 60


def start(count: int, devices: int, *tasks: str) -> list[subprocess.Popen]:
    """`engine_hosts.py` on so many hosts with so many devices each."""
    command = [sys.executable, str(REPO / "tests" / "infer" / "engine_hosts.py"), *tasks]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if count == 1:
        return [subprocess.Popen(command, cwd=REPO, env=environment(devices), **pipes)]
    more = {"KIMI_HOSTS": ",".join(["127.0.0.1"] * count), "KIMI_PORT": str(free_port())}
    return [
        subprocess.Popen(command, cwd=REPO, env=environment(devices, KIMI_HOST=str(n), **more), **pipes)
        for n in range(count)
    ]


def results(process: subprocess.Popen, status: int = 0) -> list:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == status, out + errors
    return [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]


@pytest.fixture(scope="module")
def one():
    """What one process on one device says to the requests."""
    (process,) = start(1, 1, "alike")
    return results(process)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_hosts_give_the_tokens_of_one_process(one, count, devices):
    """All hosts calling their engines alike, and host 0 leading. But the last request, whose seed nobody gives: the
    hosts have drawn the same one, or their devices would not have the same sampling settings."""
    found = [results(process) for process in start(count, devices, "alike", "lead")]
    alike, led = found[0]
    assert alike[:-1] == led[:-1] == one[:-1]
    assert [host[0] for host in found] == [alike] * count
    assert [host[1] for host in found[1:]] == [None] * (count - 1)


@pytest.mark.slow
def test_hosts_end_with_the_name_of_the_one_that_was_killed():
    processes = start(4, 1, "die")
    *others, last = processes
    for process in others:
        (why,) = results(process, hosts.RESTART)
        assert why == "host 3 (127.0.0.1) is lost"
    assert last.wait() == -9


# ------------------------------------------------------------------------------------------------------------- messages


class Recorder(Engine):
    """An engine that writes down what it is asked, and gives one token a step."""

    def __init__(self):
        self.asked: list = []
        self.requests: list[Request] = []
        self.matcher = None
        self.drawn = 5

    def submit(self, request, caller=("", "")):
        if not len(request.token_ids):
            raise ValueError("the prompt is empty")
        self.asked.append(("submit", len(self.requests), caller))
        self.requests.append(request)
        if request.grammar is not None:
            self.matcher = request.grammar.start()
        return len(self.requests) - 1

    def cancel(self, number):
        self.asked.append(("cancel", number))

    def step(self, tokens=None):
        mask = None
        if self.matcher is not None:
            self.matcher.accept(7)
            try:
                mask = self.matcher.allowed().tolist()
            except GrammarError as error:
                mask = str(error)
        self.asked.append(("step", tokens, mask))
        return [TokenEvent(0, self.drawn, -0.5, (), None)]


class Picky:
    """A grammar that allows two words of tokens once, and then finds that it takes too long."""

    def __init__(self):
        self.left = 1

    def start(self):
        return self

    def accept(self, token):
        if self.left == 0:
            raise GrammarError("too long")

    def allowed(self):
        self.left -= 1
        return np.array([3, 1 << 31], np.uint32)


class Pair:
    """A leader and a follower in this process, over a real connection."""

    def __init__(self):
        server, client = _tcp_pair()
        self.near, self.far = lockstep.Link(server, "host 1 (there)"), lockstep.Link(client, "host 0 (here)")
        self.engine, self.copy = Recorder(), Recorder()
        self.leader = lockstep.Leader(self.engine, [self.near])
        self.lost: queue.Queue[str] = queue.Queue()
        self.ended: queue.Queue[Exception | None] = queue.Queue()
        self.leader.watch(lambda why: self.lost.put(f"host 0: {why}"))
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self):
        try:
            lockstep.follow(self.copy, self.far, lambda why: self.lost.put(f"host 1: {why}"))
        except Exception as error:
            self.ended.put(error)
        else:
            self.ended.put(None)


def _tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return server.accept()[0], client


def test_followers_are_asked_what_host_0_was_asked():
    """Submissions with media and settings, cancellations, steps; not what host 0 refused. Masks of a grammar, too."""
    pair = Pair()
    item = MediaItem(np.arange(48, dtype=np.uint8).reshape(4, 12), (1, 2, 2))
    request = Request(np.arange(5, dtype=np.int32), (item,), Sampling(0.5, 0.9, None, 7, (3, 4), top_logprobs=2))
    pair.leader.submit(request, ("place", "user"))
    with pytest.raises(ValueError, match="empty"):
        pair.leader.submit(Request(np.zeros(0, np.int32)))
    pair.leader.step()
    pair.leader.submit(Request(np.arange(3, dtype=np.int32), grammar=Picky()))
    pair.leader.cancel(0)
    for tokens in (4, None):
        pair.leader.step(tokens)
    pair.leader.close()
    assert pair.ended.get(timeout=PATIENCE) is None
    assert pair.copy.asked == pair.engine.asked
    assert [each[-1] for each in pair.copy.asked if each[0] == "step"] == [None, [3, 1 << 31], "too long"]
    (copy, wanted) = pair.copy.requests[0], pair.engine.requests[0]
    assert copy.sampling == wanted.sampling and np.array_equal(copy.token_ids, wanted.token_ids)
    assert np.array_equal(copy.media[0].patches, item.patches) and copy.media[0].grid == item.grid


def test_follower_whose_tokens_differ_ends_and_host_0_learns_why():
    pair = Pair()
    pair.copy.drawn = 6
    pair.leader.step()
    pair.leader.step()
    assert "other tokens here" in str(pair.ended.get(timeout=PATIENCE))
    assert "host 0: host 1 (there) is lost: RuntimeError: the last step gave other tokens" in pair.lost.get(
        timeout=PATIENCE
    )


def test_follower_hears_that_host_0_is_gone():
    pair = Pair()
    pair.leader.step()
    pair.near._connection.shutdown(socket.SHUT_RDWR)
    assert isinstance(pair.ended.get(timeout=PATIENCE), lockstep.HostLost)
    said = {pair.lost.get(timeout=PATIENCE) for _ in range(2)}
    assert said == {"host 1: host 0 (here) is lost", "host 0: host 1 (there) is lost"}


HELLOS = [
    b"",
    b"\xff" * 8,  # longer than a greeting may be
    b"\0" * 7 + b"\x12",  # shorter than it says
    *(
        struct.pack(">Q", len(text)) + text
        for text in (b"{}", b"[]", b"[" * 1024, b'{"password": "\xc3\xa4"}', b"\xff")
    ),
]


@pytest.mark.parametrize("hello", HELLOS)
def test_strangers_on_the_port_are_turned_away(hello):
    """And the host that comes after them is not."""
    found = hosts.Hosts(("a", "b"), 0, ("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: queue.Queue = queue.Queue()
        threading.Thread(target=lambda: accepted.put(lockstep._accept(found, server, "sesame")), daemon=True).start()
        with socket.create_connection(server.getsockname()) as stranger:
            stranger.sendall(hello)
        connection = socket.create_connection(server.getsockname())
        lockstep.Link(connection, "host 0").send({"host": 1, "password": "sesame"})
        (link,) = accepted.get(timeout=PATIENCE)
        assert link.name == "host 1 (b)"
        link.send({"end": True})
        connection.close()
