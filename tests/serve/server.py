"""A tiny checkpoint with a tokenizer that fits it, an engine that says what it is told to, and a running server."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import openai
import PIL.Image
import uvicorn

from kimi_jax.config import ModelConfig
from kimi_jax.data.kimi_tokenizer import KimiTokenizer
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.infer.line import NOBODY, Caller
from kimi_jax.infer.request import Request, TokenEvent
from kimi_jax.model import Model, load
from kimi_jax.serve.app import Server
from kimi_jax.serve.guard import uvicorn_settings
from kimi_jax.serve.worker import EngineWorker
from tests.environment import FIXTURES

PATIENCE = 120  # seconds that a test waits for what must happen; never how long something takes


def byte_vocabulary() -> bytes:
    """A `tiktoken.model` of the 256 bytes: with the 256 special tokens, the 512 ids of the fixtures."""
    return b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def byte_tokenizer() -> KimiTokenizer:
    """Each byte a token, the released special tokens behind them."""
    return KimiTokenizer(byte_vocabulary())


def checkpoint(folder: Path) -> Path:
    """The fixture's weights, with the ids of `byte_tokenizer`."""
    source = FIXTURES / "tiny_fp32"
    tokenizer = byte_tokenizer()
    config = json.loads((source / "config.json").read_text())
    config["media_placeholder_token_id"] = tokenizer.media_pad_id
    for section in (config, config["text_config"]):
        section["bos_token_id"], section["eos_token_id"] = tokenizer.bos_id, tokenizer.eos_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tiktoken.model").write_bytes(byte_vocabulary())
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not the released vocabulary
        assert load_tokenizer(folder).vocab_size == config["text_config"]["vocab_size"]
    return folder


def load_checkpoint(folder: Path) -> Model:
    """`checkpoint` with its tokenizer, as a user loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is not the released vocabulary
        model = load(checkpoint(folder))
        assert model.tokenizer.vocab_size == model.config.vocab_size
    return model


def image_uri(width: int = 40, height: int = 30, value: int = 90) -> str:
    """A PNG of one colour."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def video_bytes(frames: int = 12, size: int = 32) -> bytes:
    """An mp4 of four frames a second that become brighter."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = size
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


class ScriptedEngine:
    """The interface of `infer.engine.Engine`; requests are answered with the tokens `script` gives for a prompt.

    slots of them at a time; after the script comes <|im_end|>. patient: a token only for each `permits.release()`.
    """

    def __init__(self, tokenizer: KimiTokenizer, script: Callable[[str], Sequence[int]], slots=4, patient=False):
        self.tokenizer, self.script, self.slots = tokenizer, script, slots
        self.permits = threading.Semaphore(0) if patient else None
        self.requests: dict[int, Request] = {}
        self.callers: dict[int, Caller] = {}
        self.left: dict[int, list[int]] = {}
        self.cancelled: list[int] = []
        self.changed = threading.Condition()
        self.broken = False
        self.version = 0
        self.doomed: set[int] = set()  # requests that will fail

    def submit(self, request: Request, caller: Caller = NOBODY) -> int:
        if len(request.token_ids) > 1000:
            raise ValueError(f"the prompt has {len(request.token_ids)} tokens, more than 1000")
        number = len(self.requests)
        self.requests[number] = request
        self.callers[number] = caller
        tokens = [*self.script(self.tokenizer.decode(request.token_ids)), self.tokenizer.special_id("<|im_end|>")]
        with self.changed:
            self.left[number] = tokens[: request.sampling.max_new_tokens]
            self.changed.notify_all()
        return number

    def set_params(self, params, version: int, running: str) -> None:
        self.version = version

    def cancel(self, number: int) -> None:
        with self.changed:
            if self.left.pop(number, None) is not None:
                self.cancelled.append(number)
            self.changed.notify_all()

    def step(self) -> list[TokenEvent]:
        if self.permits is not None and not self.permits.acquire(timeout=0.01):
            return []
        if self.broken:
            raise RuntimeError("the machine is on fire")
        events = []
        for number in sorted(self.left)[: self.slots]:
            if number in self.doomed:
                del self.left[number]
                events.append(TokenEvent(number, None, None, (), "error", "vision: MemoryError: too large"))
                continue
            token, sampling = self.left[number].pop(0), self.requests[number].sampling
            reason = "stop" if token in sampling.stop_ids else None if self.left[number] else "length"
            if reason:
                del self.left[number]
            top = tuple((i, -1.0 - i) for i in range(sampling.top_logprobs))
            events.append(TokenEvent(number, token, -0.5, top, reason, version=self.version))
        return events

    @property
    def idle(self) -> bool:
        return not self.left

    def stats(self) -> dict[str, int]:
        return {"waiting": max(len(self.left) - self.slots, 0), "running": min(len(self.left), self.slots)}

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until something that submitting or cancelling brings about is true."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextlib.contextmanager
def serving(engine, tokenizer: KimiTokenizer, config: ModelConfig, limit=64, **settings) -> Iterator[str]:
    """The address of a real server on a free port, in a thread; shut down at the end."""
    server = Server("tiny", tokenizer, config, EngineWorker(engine, limit), 4096, **settings)
    http = _Uvicorn(
        uvicorn.Config(server.app(), port=0, log_level="warning", timeout_graceful_shutdown=1, **uvicorn_settings())
    )
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        assert http.ready.wait(PATIENCE), "the server does not start"
        yield f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"


def client(address: str) -> openai.OpenAI:
    """The official client, which does not repeat what fails."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
