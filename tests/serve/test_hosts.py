"""`python -m kimi_jax.serve` on two hosts: real processes with gloo between them, asked by the official client."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import openai
import pytest

from kimi_jax import hosts
from tests.environment import REPO
from tests.serve.server import PATIENCE, checkpoint, client, image_uri
from tests.serve.test_app import WEATHER, user
from tests.train.processes import environment, free_port

pytestmark = pytest.mark.slow

ASKED = 64


class Servers:
    """Two hosts of one device each that serve the fixture's weights; `address` of host 0."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "kimi_jax.serve", f"--model={checkpoint(folder / 'tiny')}", "--port=0"]
        command += ["--slots=8", "--dtype=float32", "--max_sequence_length=512", "--grace_seconds=20"]
        more = {"KIMI_HOSTS": "127.0.0.1,127.0.0.1", "KIMI_PORT": str(free_port())}
        self.processes = [
            subprocess.Popen(
                command, cwd=REPO, env=environment(1, KIMI_HOST=str(n), **more), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True,
            )
            for n in range(2)
        ]  # fmt: skip
        self.said: list[list[str]] = [[], []]
        self.ready = threading.Event()
        for n in range(2):
            threading.Thread(target=self._read, args=(n,), daemon=True).start()
        assert self.ready.wait(5 * PATIENCE), self.said
        self.address = re.search(r"running on (http://\S+)", "".join(self.said[0]))[1]  # type: ignore[index]

    def _read(self, number: int) -> None:
        for line in self.processes[number].stderr:  # type: ignore[union-attr]
            self.said[number].append(line)
            if "running on http://" in line:
                self.ready.set()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture
def servers(tmp_path):
    found = Servers(tmp_path)
    yield found
    found.kill()


def status(address: str) -> int:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_two_hosts_stream_tools_and_images_64_at_once(servers):
    """The same question gets the same answer from everybody; SIGTERM to host 0 ends both."""
    with client(servers.address) as api, concurrent.futures.ThreadPoolExecutor(ASKED) as pool:

        def ask(number):
            image = {"type": "image_url", "image_url": {"url": image_uri(value=number % 4)}}
            pieces = list(api.chat.completions.create(
                model="tiny", messages=user([image, {"type": "text", "text": "weather?"}]), tools=[WEATHER],
                max_tokens=4, seed=1, stream=True, stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
            ))  # fmt: skip
            assert pieces[-2].choices[0].finish_reason in ("length", "stop")
            return tuple(i for p in pieces[:-1] for i in getattr(p.choices[0], "token_ids", None) or ())

        answers = list(pool.map(ask, range(ASKED)))
    assert all(1 <= len(answer) <= 4 for answer in answers)
    assert [answers[i] for i in range(ASKED)] == [answers[i % 4] for i in range(ASKED)]
    servers.processes[0].send_signal(signal.SIGTERM)
    assert [process.wait(PATIENCE) for process in servers.processes] == [0, 0]


def test_server_says_503_when_a_host_is_killed_and_ends_with_its_name(servers):
    """Those who wait for an answer, too."""
    with client(servers.address) as api, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = {"model": "tiny", "messages": user("hi"), "max_tokens": 400, "temperature": 5, "stream": True}
        stream = iter(api.chat.completions.create(**asked))
        next(stream)
        servers.processes[1].kill()
        waiting = pool.submit(list, stream)
        with pytest.raises(openai.APIError, match=r"host 1 \(127.0.0.1\) is lost"):
            waiting.result(PATIENCE)
        assert status(servers.address) == 503
        with pytest.raises(openai.InternalServerError, match=r"host 1 \(127.0.0.1\) is lost"):
            api.chat.completions.create(**asked | {"stream": False})
    assert servers.processes[0].wait(PATIENCE) == hosts.RESTART
    assert "host 1 (127.0.0.1) is lost" in "".join(servers.said[0])
