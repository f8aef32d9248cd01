"""`python -m kimi_jax.serve` as a user starts it: on the fixture's weights, asked by the official client."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import subprocess
import sys

import openai
import PIL.Image
import pytest

from tests.environment import REPO
from tests.serve.server import PATIENCE, checkpoint, client, image_uri
from tests.serve.test_app import WEATHER, user

pytestmark = pytest.mark.slow


def test_streams_tools_and_images_32_at_once(tmp_path):
    """Images as data URIs and, as the flag allows, from a folder; a URL is still refused. Ctrl-C ends it."""
    model = checkpoint(tmp_path / "tiny")
    (tmp_path / "media").mkdir()
    PIL.Image.new("RGB", (30, 40), "red").save(tmp_path / "media" / "red.png")
    command = [sys.executable, "-m", "kimi_jax.serve", f"--model={model}", "--port=0", "--slots=4", "--dtype=float32"]
    command += ["--max_sequence_length=512", f"--allow_media_folder={tmp_path / 'media'}"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = []
            for line in server.stderr:
                said.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                pytest.fail("the server ended: " + "".join(said))
            with client(found[1]) as api, concurrent.futures.ThreadPoolExecutor(32) as pool:

                def ask(address):
                    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "weather?"}]
                    return list(api.chat.completions.create(
                        model="tiny", messages=user(parts), tools=[WEATHER], max_tokens=4, seed=1, stream=True,
                        stream_options={"include_usage": True},
                    ))  # fmt: skip

                for pieces in pool.map(ask, [image_uri(value=i) if i % 2 else "red.png" for i in range(32)]):
                    assert 1 <= pieces[-1].usage.completion_tokens <= 4
                    assert pieces[-2].choices[0].finish_reason in ("length", "stop")
                with pytest.raises(openai.BadRequestError, match="allow_remote_media"):
                    ask("http://127.0.0.1:1/a.png")
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
