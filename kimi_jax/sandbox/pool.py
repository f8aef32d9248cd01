"""Pre-started sessions for RL: every rollout gets a fresh interpreter without waiting for its start.

  async with Pool(size=8) as pool:
      async with pool.session(images) as session:
          result = await session.run(code)

A session serves one conversation and is then ended, so that nothing which one rollout wrote reaches another; its
replacement starts in the background. Sessions live in worker threads, one each, because they block on pipes and end
with the thread that started them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from kimi_jax.sandbox import walls as walling
from kimi_jax.sandbox.limits import SandboxLimits
from kimi_jax.sandbox.session import PRELOAD, CellResult, Session
from kimi_jax.sandbox.tool import run_tool
from kimi_jax.sandbox.walls import Walls

T = TypeVar("T")


class PooledSession:
    """A session of the pool, for one conversation. A cancelled call ends what runs inside at once."""

    def __init__(self, session: Session, executor: ThreadPoolExecutor):
        self._session, self._executor = session, executor
        self._call: asyncio.Future[Any] | None = None

    async def run(self, code: str) -> CellResult:
        """As `Session.run`."""
        return await self._in_thread(self._session.run, code)

    async def run_tool(self, arguments: str | Mapping[str, Any]) -> list[dict[str, Any]]:
        """As `tool.run_tool`."""
        return await self._in_thread(run_tool, self._session, arguments)

    async def put(self, images: Mapping[str, np.ndarray]) -> None:
        """As `Session.put`."""
        await self._in_thread(self._session.put, images)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        self._call = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        try:
            return await asyncio.shield(self._call)
        except asyncio.CancelledError:
            self._session.kill()
            raise

    async def end(self) -> None:
        """Ends the process, after the call that is still in its thread."""
        self._session.kill()
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self._executor, self._session.close)


class Pool:
    """At most `size` sessions at once, kept started. Used within one event loop of asyncio.

    walls: from `walls.choose`; None: the strongest that hold here. Raises as `walls.choose` does.
    """

    def __init__(
        self,
        size: int,
        walls: Walls | None = None,
        limits: SandboxLimits | None = None,
        preload: Sequence[str] = PRELOAD,
    ):
        if size < 1:
            raise ValueError(f"a pool has at least one session, not {size}")
        self._size = size
        self._arguments = (walls or walling.choose(), limits or SandboxLimits(), tuple(preload))

    async def __aenter__(self) -> Pool:
        """Starts all sessions; does not wait for them."""
        self._executor = ThreadPoolExecutor(self._size, thread_name_prefix="sandbox")
        self._starting: asyncio.Queue[asyncio.Task[Session]] = asyncio.Queue()
        self._ending: set[asyncio.Task[None]] = set()
        for _ in range(self._size):
            self._starting.put_nowait(asyncio.create_task(self._start()))
        return self

    async def __aexit__(self, *reason: object) -> None:
        """Ends all sessions and waits until they are gone; nobody may use one any more."""
        await asyncio.gather(*self._ending)
        while not self._starting.empty():
            with contextlib.suppress(Exception):  # one that did not start has told whoever asked for it, or nobody did
                await PooledSession(await self._starting.get_nowait(), self._executor).end()
        self._executor.shutdown()

    @contextlib.asynccontextmanager
    async def session(self, images: Mapping[str, np.ndarray] | None = None) -> AsyncIterator[PooledSession]:
        """A fresh session with `images` (see `Session.put`), once there is a free one.

        Raises SandboxError if it did not start; the pool then tries again for the next who asks.
        """
        task = await self._starting.get()
        session: PooledSession | None = None
        try:
            session = PooledSession(await asyncio.shield(task), self._executor)
            if images:
                await session.put(images)
            yield session
        finally:
            ending = asyncio.create_task(self._end(session) if session else self._return(task))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _start(self) -> Session:
        return await asyncio.get_running_loop().run_in_executor(self._executor, Session, *self._arguments)

    async def _end(self, session: PooledSession) -> None:
        await session.end()
        self._starting.put_nowait(asyncio.create_task(self._start()))

    async def _return(self, task: asyncio.Task[Session]) -> None:
        """Of a start that failed, or whose user went away before it was done."""
        await asyncio.wait([task])
        if task.cancelled() or task.exception() is not None:
            self._starting.put_nowait(asyncio.create_task(self._start()))
        else:
            self._starting.put_nowait(task)
