"""Who runs: a limited number of slots, a queue that drops nobody, and fewer slots while the endpoint complains.

A child holds a slot while it runs. It gives it back while it waits for children of its own (otherwise a nested swarm
would wait for itself) and while it waits to repeat a request. Its timeout counts only the time with a slot.

Slots follow additive increase, multiplicative decrease: a 429 halves them, at most once for the requests that were
under way together; as many successes as there are slots add one, up to the limit that was given.
"""

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from kimi_jax.agents.events import Status


class Scheduler:
    """Slots. limit: how many may run now, from 1 to `max_parallel`; running: how many do; peak: the most that did."""

    def __init__(self, max_parallel: int):
        if max_parallel < 1:
            raise ValueError(f"max_parallel must be at least 1, not {max_parallel}")
        self.max_parallel = self.limit = max_parallel
        self.running = self.peak = 0
        self._queue: deque[anyio.Event] = deque()
        self._successes = 0
        self._shrunk_at = -math.inf

    @property
    def queued(self) -> int:
        return len(self._queue)

    async def acquire(self, first: bool = False) -> None:
        """Waits for a slot; `first` before those who have not begun yet."""
        event = anyio.Event()
        self._queue.insert(0, event) if first else self._queue.append(event)
        self._grant()
        try:
            await event.wait()
        except BaseException:
            if event.is_set():  # granted and cancelled at once
                self.release()
            else:
                self._queue.remove(event)
            raise

    def release(self) -> None:
        """Gives a slot back."""
        self.running -= 1
        self._grant()

    def _grant(self) -> None:
        while self._queue and self.running < self.limit:
            self.running += 1
            self.peak = max(self.peak, self.running)
            self._queue.popleft().set()

    def shrink(self, began: float) -> None:
        """A request that began at this time was answered with 429."""
        if began > self._shrunk_at:  # not one of those that the last halving already answers
            self.limit = max(1, self.limit // 2)
            self._shrunk_at = anyio.current_time()
        self._successes = 0

    def succeeded(self) -> None:
        """A request was answered."""
        self._successes += 1
        if self._successes >= self.limit and self.limit < self.max_parallel:
            self.limit += 1
            self._successes = 0
            self._grant()


class Lease:
    """One agent's right to run, and the stopwatch of its timeout. The orchestrator's needs no slot.

    scope: what the agent runs in; it is cancelled when the time with a slot, or the deadline, is over.
    """

    def __init__(self, scheduler: Scheduler | None, timeout: float, deadline: float):
        self._scheduler, self._timeout, self._deadline = scheduler, timeout, deadline
        self.scope = anyio.CancelScope()
        self.ran = 0.0  # seconds with a slot, up to `_since`
        self._since: float | None = None

    @property
    def running_for(self) -> float:
        """Seconds with a slot."""
        return self.ran + (anyio.current_time() - self._since if self._since is not None else 0.0)

    @property
    def expired(self) -> Status | None:
        """Why the scope was cancelled: `timeout`, `budget` (the deadline) or None (not by this lease)."""
        if not self.scope.cancel_called:
            return None
        return "budget" if anyio.current_time() >= self._deadline else "timeout"

    async def acquire(self, first: bool = False) -> None:
        """Waits for a slot and starts the watch."""
        if self._scheduler:
            await self._scheduler.acquire(first)
        self._since = anyio.current_time()
        self.scope.deadline = min(self._deadline, self._since + self._timeout - self.ran)

    def release(self) -> None:
        """Gives the slot back, if there is one, and stops the watch."""
        if self._since is None:
            return
        self.ran, self._since = self.running_for, None
        self.scope.deadline = self._deadline
        if self._scheduler:
            self._scheduler.release()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Without the slot, and with the watch stopped, while the body runs."""
        self.release()
        yield
        await self.acquire(first=True)
