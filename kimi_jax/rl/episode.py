"""Turns of an episode: the calls in what a model wrote, interpreters that run them, and their results as tokens.

Source: Kimi K2.5 report (arXiv 2602.02276) appendix D (token in, token out); docs/rl.md section 9.

Whatever the model writes and whatever a call does is a result that the model reads: a tool that does not exist,
arguments that are no JSON, a call that hangs or kills its process. Results are bounded before they are encoded.

Interpreters run beside the sampler and belong to one `RolloutWorker.draw`: an episode that goes on in a later one gets
a fresh interpreter, in which its earlier calls are run again. So nothing of a checkpoint lies in a process, and a run
that was killed goes on as one that was not. What the calls gave the first time stays in the history; who differs is
counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_jax.config import ConfigError, nearest
from kimi_jax.config_rl import ToolConfig
from kimi_jax.data import conversation, example
from kimi_jax.data.example import Encoded, Image
from kimi_jax.data.reply import ToolCall, parse_reply
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.eval.agent import shorten
from kimi_jax.rl.tasks import Problem
from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.pool import Pool, PooledSession
from kimi_jax.sandbox.session import CellResult
from kimi_jax.sandbox.tool import IPYTHON, BadArguments, conversation_images, read_code

TOOLS: dict[str, Mapping[str, Any]] = {"ipython": IPYTHON}
KILLED = "killed"  # status of a call that took the interpreter with it


@dataclass(frozen=True)
class ExecutedCall:
    """A call and what the model was told of it.

    code: what was run; "" if nothing was. status: as `sandbox.session.CellResult` has it, or "bad_call" (a tool that
    there is not, arguments that are none), "refused" (one too many in a reply), "failed" (no interpreter started).
    """

    id: str
    code: str
    text: str
    status: str


# --------------------------------------------------------------------------------------------------------------- tokens


def check_tools(names: Sequence[str]) -> None:
    """Raises ConfigError for one that there is not."""
    for name in names:
        if name not in TOOLS:
            raise ConfigError(f"no tool is called {name!r:.60}{nearest(name, TOOLS)}; there are: {', '.join(TOOLS)}")


def user_message(problem: Problem) -> dict[str, Any]:
    """The problem as a message."""
    content = [
        {"type": "image", "image": part.image} if isinstance(part, Image) else {"type": "text", "text": part.text}
        for part in problem.parts
    ]
    return {"role": "user", "content": content}


def encode_prompt(
    problem: Problem, tools: Sequence[str], thinking: bool, tokenizer: Tokenizer, limits: example.EncodeLimits
) -> Encoded:
    """The problem as a conversation that waits for an answer, its tools declared. Raises as `data.example.encode`."""
    declared = [TOOLS[name] for name in tools]
    given = conversation.encode([user_message(problem)], declared, thinking=thinking, key=problem.key)
    return example.encode(given, tokenizer, limits)


def find_calls(turn: Sequence[int], tokenizer: Tokenizer, thinking: bool) -> tuple[ToolCall, ...]:
    """The calls of a reply that the model itself has ended with <|im_end|>, by the ids of special tokens."""
    reply = parse_reply(turn, tokenizer, thinking)
    return reply.tool_calls if reply.finished else ()


def encode_results(calls: Sequence[ExecutedCall], tokenizer: Tokenizer, thinking: bool) -> list[int]:
    """What follows a reply with these calls: their results, and the header of the next reply."""
    messages = [{"role": "tool", "tool_call_id": call.id, "content": call.text} for call in calls]
    parts = conversation.encode(messages, thinking=thinking, add_generation_prompt=True).parts
    return [token for span in example.token_spans(parts, (), tokenizer) for token in span.ids]


def answer_text(turn: Sequence[int], tokenizer: Tokenizer, thinking: bool) -> str:
    """What the last reply says, without its reasoning."""
    return parse_reply(turn, tokenizer, thinking).content


def transcript(calls: Sequence[ExecutedCall], text: str) -> str:
    """An episode for people: each call with its result, and the answer."""
    return "\n".join([*(f"[{call.status}] {call.code or call.id}\n=> {call.text.rstrip()}" for call in calls), text])


# --------------------------------------------------------------------------------------------------------- interpreters


@dataclass(frozen=True)
class Finished:
    """The results of one reply's calls. replayed: earlier calls that were run again; differed: how many of those gave
    another result than the one in the history."""

    key: int
    calls: tuple[ExecutedCall, ...]
    replayed: int = 0
    differed: int = 0


class Interpreters:
    """Runs the calls of many episodes at once, each in an interpreter of its own, in an event loop of its own thread.

    Used by one thread. `run` returns at once and `finished` tells of results; `release` ends an episode's interpreter,
    and somebody who waits for one gets the next. Raises ConfigError if the machine has not the walls that are asked
    for.
    """

    def __init__(self, config: ToolConfig):
        self._config = config
        self._limits = SandboxLimits(
            timeout_seconds=config.timeout_seconds, memory_mb=config.memory_mb, output_images=0
        )
        try:
            self._walls = walls.choose(config.sandbox)
        except SandboxError as error:
            raise ConfigError(f"config.rl.tools: {error}") from error
        self._results: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._inboxes: dict[int, asyncio.Queue[Sequence[ToolCall] | None]] = {}
        self._running = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._episodes: set[asyncio.Task[None]] = set()  # the loop's

    @property
    def busy(self) -> bool:
        """Whether calls run whose results `finished` has not told."""
        return self._running > 0

    def run(
        self, key: int, calls: Sequence[ToolCall], before: Sequence[ExecutedCall], images: Mapping[str, np.ndarray]
    ) -> None:
        """Runs the calls of the next reply of episode `key`.

        before: all earlier calls of the episode, images: by the names that code knows them by; both are looked at only
        if it has no interpreter.
        """
        self._running += 1
        if key not in self._inboxes:
            loop = self._open()
            inbox = self._inboxes[key] = asyncio.Queue[Sequence[ToolCall] | None]()
            loop.call_soon_threadsafe(self._begin, key, inbox, before, images)
        self._send(key, calls)

    def finished(self, wait: bool) -> list[Finished]:
        """The results that have come; with `wait` and if calls run, at least those of one reply."""
        found: list[Finished] = []
        with contextlib.suppress(queue.Empty):
            while self._running:
                found.append(self._results.get(block=wait and not found))
                self._running -= 1
        return found

    def release(self, key: int) -> None:
        """The episode needs its interpreter no more."""
        if key in self._inboxes:
            self._send(key, None)
            del self._inboxes[key]

    def close(self) -> None:
        """Ends every interpreter, whatever runs in it."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()
        self._inboxes.clear()
        self._running, self._results = 0, queue.SimpleQueue()

    def _open(self) -> asyncio.AbstractEventLoop:
        """The event loop, with a pool of interpreters in it; made for the first call."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="tools", daemon=True)
            self._thread.start()
            self._pool = Pool(self._config.sessions, self._walls, self._limits)
            asyncio.run_coroutine_threadsafe(self._pool.__aenter__(), self._loop).result()
        return self._loop

    def _send(self, key: int, calls: Sequence[ToolCall] | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._inboxes[key].put_nowait, calls)

    def _begin(self, *arguments: Any) -> None:
        episode = asyncio.get_running_loop().create_task(self._episode(*arguments))
        self._episodes.add(episode)
        episode.add_done_callback(self._episodes.discard)

    async def _end(self) -> None:
        for episode in self._episodes:
            episode.cancel()
        await asyncio.gather(*self._episodes, return_exceptions=True)
        await self._pool.__aexit__()

    async def _episode(
        self, key: int, inbox: asyncio.Queue[Sequence[ToolCall] | None], before: Sequence[ExecutedCall],
        images: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        """An interpreter from an episode's first call to its release. Without one every call fails, and says why."""
        calls: Sequence[ToolCall] | None = ()
        try:
            async with self._pool.session(images) as session:
                replayed, differed = await self._replay(session, before)
                while (calls := await inbox.get()) is not None:
                    done = [await self._run_call(session, i, call) for i, call in enumerate(calls)]
                    self._results.put(Finished(key, tuple(done), replayed, differed))
                    replayed = differed = 0
        except Exception as error:  # whatever it is: who waits for a result must get one
            text = shorten(f"error: the interpreter failed: {error}", self._config.characters)
            while calls is not None:
                if calls:
                    self._results.put(Finished(key, tuple(ExecutedCall(call.id, "", text, "failed") for call in calls)))
                calls = await inbox.get()

    async def _replay(self, session: PooledSession, before: Sequence[ExecutedCall]) -> tuple[int, int]:
        """Brings a fresh interpreter to where the episode was: (calls run again, those that gave something else).

        What lies before a call that killed the interpreter left nothing behind.
        """
        killed = max((i for i, call in enumerate(before) if call.status == KILLED), default=-1)
        again = [call for call in before[killed + 1 :] if call.code]
        results = [self._shown(await session.run(call.code)) for call in again]
        return len(again), sum(text != call.text for text, call in zip(results, again, strict=True))

    async def _run_call(self, session: PooledSession, number: int, call: ToolCall) -> ExecutedCall:
        most = self._config.characters
        if number >= self._config.calls:
            return ExecutedCall(
                call.id, "", f"error: not run: at most {self._config.calls} calls in one message", "refused"
            )
        if call.name not in TOOLS:
            return ExecutedCall(call.id, "", shorten(f"error: there is no tool {call.name!r:.100}", most), "bad_call")
        try:
            code = read_code(call.arguments if call.arguments.strip() else "{}", self._limits)
        except BadArguments as error:
            return ExecutedCall(call.id, "", shorten(f"error: {call.error or error}", most), "bad_call")
        result = await session.run(code)
        return ExecutedCall(call.id, code, self._shown(result), result.status)

    def _shown(self, result: CellResult) -> str:
        return shorten(result.text or "(no output)", self._config.characters)


def named_images(problem: Problem) -> dict[str, np.ndarray]:
    """What code in an interpreter finds: image_1, ..., uint8 [h, w, 3]."""
    return conversation_images([user_message(problem)])
