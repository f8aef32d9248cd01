"""The sampler that rollouts, swarms and evaluations are written against, and the engine of this process as one.

A sampler takes token ids and gives token ids, with the log-probability and the version of the weights of each token
and, on request, the experts that it was routed to. Others may stand behind the same three names: an endpoint, a script,
a recording.

`LocalSampler` steps an engine in a thread of its own. Whoever asks waits on an event loop (any number of loops in any
threads); what they want done goes through an inbox between two steps, so nothing of the engine is locked. A task that
is cancelled while it waits frees its slot.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from kimi_jax.infer.engine import Engine, Running
from kimi_jax.infer.request import Completion, Request, TokenEvent, completion
from kimi_jax.infer.unfinished import Unfinished

T = TypeVar("T")


class Sampler(Protocol):
    """Whatever completes token ids."""

    @property
    def version(self) -> int:
        """Of the weights that the next token is drawn with."""

    async def sample(self, request: Request) -> Completion:
        """The completion of one request; many may be awaited together. Raises ValueError for one that cannot be
        served, SamplerFailed when the sampler cannot go on."""

    def set_params(self, params: Any, version: int, running: Running) -> None:
        """Go on with other weights; see `infer.engine.Engine.set_params`."""


class SamplerFailed(Exception):
    """Why no answer comes any more, or none to this request."""


class _Wanted:
    """One completion that somebody waits for."""

    def __init__(self, prompt_tokens: int, past: Sequence[TokenEvent] = ()):
        self.prompt_tokens, self.events = prompt_tokens, list(past)
        self.future: concurrent.futures.Future[Completion] = concurrent.futures.Future()
        self.number = -1

    def end(self, error: Exception | None = None) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # nobody waits any more
            if error is None:
                self.future.set_result(completion(self.events, self.prompt_tokens))
            else:
                self.future.set_exception(error)


class LocalSampler:
    """A `Sampler` over an engine that nobody else uses; the engine's `tokens_per_call` is how many tokens a call gives.

    Use it in a `with` block, or `close` it: the thread ends, and with it every request that still waits.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wanted: dict[int, _Wanted] = {}  # by the engine's numbers; the thread's
        self._failure: SamplerFailed | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def __enter__(self) -> LocalSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------- for any thread

    @property
    def version(self) -> int:
        """Of the weights that the next token is drawn with."""
        return self._engine.version

    async def sample(self, request: Request) -> Completion:
        """See `Sampler.sample`."""
        wanted = _Wanted(len(request.token_ids))
        (found,) = await self._complete([wanted], lambda: [self._engine.submit(request)])
        return found

    async def sample_group(self, request: Request, seeds: Sequence[int | None]) -> list[Completion]:
        """As many answers to one prompt as there are seeds; the prompt is read once. Raises as `sample`."""
        wanted = [_Wanted(len(request.token_ids)) for _ in seeds]
        return await self._complete(wanted, lambda: self._engine.submit_group(request, seeds))

    async def resume(self, unfinished: Unfinished) -> Completion:
        """The whole answer of one that was taken out. Raises as `sample`."""
        rows = zip(unfinished.token_ids, unfinished.logprobs, unfinished.top, unfinished.versions, strict=True)
        past = [TokenEvent(-1, token, logprob, top, None, version=version) for token, logprob, top, version in rows]
        wanted = _Wanted(len(unfinished.request.token_ids), past)
        (found,) = await self._complete([wanted], lambda: [self._engine.resume(unfinished)])
        return found

    def set_params(self, params: Any, version: int, running: Running = "drain") -> None:
        """See `infer.engine.Engine.set_params`. Returns when the engine knows of them: at once but for a step; with
        "drain" the version changes when the last answer of the old weights is complete."""
        self._ask(lambda: self._engine.set_params(params, version, running))

    def unfinished(self) -> list[Unfinished]:
        """The answers that somebody waits for, as they are now, for a checkpoint. They go on."""
        return self._ask(lambda: list(self._engine.unfinished().values()))

    def stats(self) -> dict[str, int]:
        """The engine's."""
        return self._ask(self._engine.stats)

    def close(self) -> None:
        """Ends the thread. Those who wait get SamplerFailed."""
        self._inbox.put(self._stop)
        self._thread.join()

    async def _complete(self, wanted: list[_Wanted], submit: Callable[[], list[int]]) -> list[Completion]:
        self._inbox.put(lambda: self._begin(wanted, submit))
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(each.future) for each in wanted)))
        finally:
            if not all(each.future.done() and not each.future.cancelled() for each in wanted):
                self._inbox.put(lambda: self._cancel(wanted))

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer of the thread, between two steps. Raises what it raises, SamplerFailed if it has ended."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def ask() -> None:
            try:
                if self._failure is not None:
                    raise self._failure
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self._inbox.put(ask)
        while not answer.done() and self._thread.is_alive():
            concurrent.futures.wait([answer], timeout=1.0)
        if not answer.done():
            raise self._failure or SamplerFailed("the sampler is closed")
        return answer.result()

    # ------------------------------------------------------------------------------------------------- the thread's

    def _work(self) -> None:
        while not self._closed:
            with contextlib.suppress(queue.Empty):
                self._inbox.get(block=self._failure is not None or self._engine.idle)()
                continue  # all of them first
            try:
                self._deliver(self._engine.step())
            except Exception as error:  # whatever it is: those who wait must hear of it
                self._fail(SamplerFailed(f"the engine failed: {type(error).__name__}: {error}"))
        while not self._inbox.empty():
            self._inbox.get()()

    def _begin(self, wanted: list[_Wanted], submit: Callable[[], list[int]]) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            if all(each.future.cancelled() for each in wanted):
                return
            numbers = submit()
        except Exception as error:
            for each in wanted:
                each.end(error)
            return
        for number, each in zip(numbers, wanted, strict=True):
            each.number, self._wanted[number] = number, each

    def _cancel(self, wanted: list[_Wanted]) -> None:
        for each in wanted:
            if self._wanted.pop(each.number, None) is not None:
                self._engine.cancel(each.number)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            wanted = self._wanted.get(event.request_id)
            if wanted is None:
                continue
            wanted.events.append(event)
            if event.finish_reason is not None:
                del self._wanted[event.request_id]
                failed = event.finish_reason == "error"
                wanted.end(SamplerFailed(event.error) if failed else None)

    def _stop(self) -> None:
        self._closed = True
        self._fail(SamplerFailed("the sampler is closed"))

    def _fail(self, failure: SamplerFailed) -> None:
        self._failure = failure
        for wanted in self._wanted.values():
            wanted.end(failure)
        self._wanted.clear()
