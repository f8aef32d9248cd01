"""The engine in a thread of its own, and what the event loop hands it and hears from it.

The engine is synchronous and knows one thread. Here the loop puts tasks into an inbox, the thread does them between
two steps, and what a step yields goes back to the loop in one call. So a slow step (a program that is compiled) never
stops the server from answering, and nothing is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kimi_jax.infer.line import NOBODY, Caller
from kimi_jax.infer.request import Request, TokenEvent

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine, Running
    from kimi_jax.infer.lockstep import Leader


SHARE = 8  # of the room one place may take at most 8/9; of a small room all of it


class Overloaded(Exception):
    """As many requests as the server takes are running and waiting."""


class EngineFailed(Exception):
    """The engine raised, or the server is stopping; the message says what. Nobody is answered any more."""


class RequestFailed(Exception):
    """The engine could not answer this one request; the message says why. The others go on."""


class Submission:
    """Requests that were submitted together (the choices of one call), for the event loop.

    Iterate over `events`; `stop` a choice that needs no more tokens; `close` it at the end, whatever happened.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[Request], caller: Caller):
        self.requests, self.caller = requests, caller
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrived: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        self.numbers: list[int] = []  # of the engine; the thread's
        self.running = set(range(len(requests)))
        self._worker = worker

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(number of the choice, event) until every choice has ended or was stopped.

        Raises RequestFailed if one of them cannot be answered, EngineFailed if the engine has ended.
        """
        while self.running:
            index, event = await self.arrived.get()
            if index not in self.running:
                continue
            if event.finish_reason == "error":
                raise RequestFailed(event.error)
            if event.finish_reason == "cancelled":  # nobody here cancels what is in `running`
                raise EngineFailed(event.error)
            if event.finish_reason is not None:
                self.running.discard(index)
            yield index, event

    def stop(self, index: int) -> None:
        """No more tokens of this choice are wanted."""
        if index in self.running:
            self.running.discard(index)
            self._worker.cancel(self, index)

    def close(self) -> None:
        """Frees the slots of whatever still runs."""
        for index in tuple(self.running):
            self.stop(index)


class EngineWorker:
    """Runs an engine. `start` and `stop` it inside the event loop that uses it.

    limit: how many requests may run and wait together. stats: the engine's, after its last step. failure: what the
    engine died of, "" while it lives.
    """

    def __init__(self, engine: Engine | Leader, limit: int):
        self._engine, self.limit = engine, limit
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._places: dict[int, tuple[Submission, int]] = {}  # the thread's: engine's number -> run, choice
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.stats: dict[str, Any] = engine.stats()
        self.failure = ""
        self.admitted = 0
        self._runs: set[Submission] = set()  # that are not closed
        self._held: Counter[str] = Counter()  # by place

    # ------------------------------------------------------------------------------------------------ the event loop's

    @property
    def version(self) -> int:
        """Of the weights that the next token is drawn with."""
        return self._engine.version

    async def set_params(self, params: Any, version: int, running: Running = "drain") -> None:
        """Go on with other weights; see `infer.engine.Engine.set_params`, and raises as it does, or EngineFailed.

        Returns when the engine knows of them; with "drain" the version changes once the last answer of the old weights
        is complete.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put(lambda: self._set_params(done, params, version, running))
        await done

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends every request as cancelled and waits for the thread."""
        self._inbox.put(self._leave)
        await asyncio.to_thread(self._thread.join)

    @contextlib.contextmanager
    def admit(self, count: int, place: str | None = None) -> Iterator[None]:
        """Room for `count` requests while the context lasts. Raises Overloaded, and ValueError if it can never be.

        place: where they come from. One place may take what is left while it holds less than SHARE times that, so that
        it never has all the room for long and somebody else finds some. None: whoever runs this process.
        """
        if count > self.limit:
            raise ValueError(f"{count} choices in one call; this server takes {self.limit} at a time")
        if self.admitted + count > self.limit:
            raise Overloaded(f"{self.admitted} requests are running and waiting, of {self.limit}; try again later")
        if place is not None and count and self._held[place] >= SHARE * (self.limit - self.admitted):
            raise Overloaded(f"{self._held[place]} requests of yours are running and waiting; try again later")
        self.admitted += count
        if place is not None:
            self._held[place] += count
        try:
            yield
        finally:
            self.admitted -= count
            if place is not None:
                self._held[place] -= count
                self._held += Counter()  # drops what is 0

    @contextlib.asynccontextmanager
    async def submit(self, requests: Sequence[Request], caller: Caller = NOBODY) -> AsyncIterator[Submission]:
        """The requests as a Submission, which is closed at the end; callers take turns.

        Raises what the engine says to a request, EngineFailed.
        """
        if self.failure:
            raise EngineFailed(self.failure)
        run = Submission(self, requests, caller)
        self._runs.add(run)
        self._inbox.put(lambda: self._begin(run))
        try:
            await run.accepted
            yield run
        finally:
            self._runs.discard(run)
            run.close()

    def cancel(self, run: Submission, index: int) -> None:
        """Ends one choice."""
        self._inbox.put(lambda: self._end(run, index))

    def fail(self, why: str) -> None:
        """Nobody is answered any more; from any thread, since the engine's may wait for a device that is gone."""
        self.failure = self.failure or why
        if self._loop is not None:
            self._call(self._end_all, self.failure)

    def _end_all(self, why: str) -> None:
        for run in tuple(self._runs):
            _set_exception(run.accepted, EngineFailed(why))
            for index in tuple(run.running):
                run.arrived.put_nowait((index, TokenEvent(-1, None, None, (), "cancelled", why)))

    # ----------------------------------------------------------------------------------------------------- the thread's

    def _work(self) -> None:
        while not self._stopping:
            with contextlib.suppress(queue.Empty):
                self._inbox.get(block=bool(self.failure) or self._engine.idle)()
                continue  # all tasks first
            try:
                self._deliver(self._engine.step())
                self.stats = self._engine.stats()
            except Exception as error:  # whatever it is: those who wait must hear of it
                logging.exception("the engine failed; the server answers no more requests")
                self.fail(f"{type(error).__name__}: {error}")
        self.fail("the server is stopping")
        while not self._inbox.empty():
            self._inbox.get()()

    def _begin(self, run: Submission) -> None:
        try:
            if self.failure:
                raise EngineFailed(self.failure)
            for index, request in enumerate(run.requests):
                number = self._engine.submit(request, run.caller)
                run.numbers.append(number)
                self._places[number] = (run, index)
        except Exception as error:
            for index in range(len(run.numbers)):
                self._end(run, index)
            self._call(_set_exception, run.accepted, error)
        else:
            self._call(_set_result, run.accepted)

    def _set_params(self, done: asyncio.Future[None], params: Any, version: int, running: Running) -> None:
        try:
            if self.failure:
                raise EngineFailed(self.failure)
            self._engine.set_params(params, version, running)
        except Exception as error:
            self._call(_set_exception, done, error)
        else:
            self._call(_set_result, done)

    def _end(self, run: Submission, index: int) -> None:
        if index < len(run.numbers) and run.numbers[index] in self._places:
            del self._places[run.numbers[index]]
            self._engine.cancel(run.numbers[index])

    def _leave(self) -> None:
        self._stopping = True

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        arrived = []
        for event in events:
            if event.request_id in self._places:
                arrived.append((*self._places[event.request_id], event))
                if event.finish_reason is not None:
                    del self._places[event.request_id]
        if arrived:
            self._call(_hand_out, arrived)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _hand_out(arrived: list[tuple[Submission, int, TokenEvent]]) -> None:
    for run, index, event in arrived:
        run.arrived.put_nowait((index, event))


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():  # it is when the client went away
        future.set_result(None)


def _set_exception(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
