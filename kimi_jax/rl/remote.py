"""Rollouts that servers of this project draw, on this host or others, in the place of the engine of this process.

docs/rl.md section 13. `RemoteSampler` stands where `rl.worker` expects an engine: answers are distributed over the
endpoints that are healthy, each answer a call of its own. Since an answer follows from its seed, its prompt and the
weights, it is the same wherever it is drawn, so one whose endpoint dies, hangs or says nonsense is drawn again by
another.

New weights are written below the workdir, `WORKDIR/weights/checkpoints/N`, where the servers see them too, and each is
told N. N is never used twice, so a server that says anything else, one that was started again for instance, is found
out. An endpoint that fails rests, gets the weights again, and has to prove itself with one answer before it gets more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.config import ConfigError, RolloutConfig, TrainConfig
from kimi_jax.data.example import Encoded
from kimi_jax.infer.request import Request, TokenEvent
from kimi_jax.rl.endpoint import Busy, Drawn, Endpoint, EndpointError, FailedRequest, WrongVersion
from kimi_jax.rl.tasks import Problem
from kimi_jax.rl.worker import RolloutEngine, RolloutWorker
from kimi_jax.train import checkpoint
from kimi_jax.train.batches import SourceUnavailable

STEP_SECONDS = 0.1  # that a step waits for an answer, so that whoever steps can see to other things
LONGEST_REST = 30.0  # seconds
REQUEST_TRIES = 3  # of an answer that servers say they cannot draw, before its group is given up


class EndpointsLost(SourceUnavailable):
    """Every endpoint failed as often in a row as is allowed, while answers were waited for."""


def rest_seconds(failures: int) -> float:
    """How long an endpoint rests after so many failures in a row: 1, 2, 4, ..., at most LONGEST_REST seconds."""
    return min(2.0 ** min(failures - 1, 10), LONGEST_REST)


@dataclass(eq=False)
class _Job:
    """An answer that is wanted. refused: how often a server said that it cannot draw it."""

    number: int
    request: Request
    refused: int = 0


@dataclass(eq=False)
class _Member:
    """An endpoint as the sampler sees it.

    number: of the weights that it holds as far as is known, 0 for others. most: answers that it may draw at once.
    failures: in a row, since its last good answer.
    """

    endpoint: Endpoint
    most: int
    number: int = 0
    failures: int = 0
    resting: bool = False
    changing: bool = False
    tasks: dict[asyncio.Task[None], _Job] = field(default_factory=dict)


class RemoteSampler:
    """An `rl.worker.RolloutEngine` over several endpoints. One thread calls its methods; a loop in another works.

    rollout: how many answers an endpoint draws at once (`slots`), how old their tokens may be (`max_staleness`), how
    often an endpoint may fail. publish: writes weights where the servers read them, and returns their number. rest:
    seconds that an endpoint rests after so many failures in a row.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        rollout: RolloutConfig,
        publish: Callable[[Any], int],
        rest: Callable[[int], float] = rest_seconds,
    ):
        self._publish, self._rest = publish, rest
        self._slots, self._tries, self._oldest = rollout.slots, rollout.endpoint_tries, rollout.max_staleness
        self._numbers = itertools.count()
        self._outstanding: set[int] = set()
        self._arrived: queue.SimpleQueue[list[TokenEvent] | Exception] = queue.SimpleQueue()
        # the loop's from here on
        self._members = [_Member(endpoint, rollout.slots) for endpoint in endpoints]
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}  # that wait or are being drawn
        self._number = self._version = 0
        self._versions: dict[int, int] = {}  # number of weights -> their version
        self._counts: Counter[str] = Counter()
        self._last_errors: dict[str, str] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoints", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- as a RolloutEngine

    @property
    def idle(self) -> bool:
        """Whether nothing is waited for."""
        return not self._outstanding

    def submit(self, request: Request) -> int:
        """An answer that is wanted; its number."""
        return self._submit([request])[0]

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[int]:
        """As many answers to one prompt as there are seeds."""
        each = [dataclasses.replace(request.sampling, seed=seed) for seed in seeds]
        return self._submit([dataclasses.replace(request, sampling=sampling) for sampling in each])

    def cancel(self, request_id: int) -> None:
        """Nothing more of an answer is wanted."""
        self._outstanding.discard(request_id)
        self._loop.call_soon_threadsafe(self._drop, request_id)

    def step(self) -> list[TokenEvent]:
        """The next answer that arrives, whole; or nothing for now. Raises EndpointsLost."""
        try:
            arrived = self._arrived.get(timeout=STEP_SECONDS)
        except queue.Empty:
            return []
        if isinstance(arrived, Exception):
            raise arrived
        self._outstanding.discard(arrived[-1].request_id)
        return arrived

    def set_params(self, params: Any, version: int) -> None:
        """Writes the weights and lets the endpoints know; each draws again once it has them. Raises SourceUnavailable
        if they cannot be written."""
        number = self._publish(params)
        self._loop.call_soon_threadsafe(self._adopt, number, version)

    def take_metrics(self) -> dict[str, float]:
        """Endpoints that are healthy; since the last time: failures by reason, answers that were drawn again."""
        return asyncio.run_coroutine_threadsafe(self._take_metrics(), self._loop).result()

    def close(self) -> None:
        """Lets go of connections and of the thread."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, requests: Sequence[Request]) -> list[int]:
        jobs = [_Job(next(self._numbers), request) for request in requests]
        self._outstanding.update(job.number for job in jobs)
        self._loop.call_soon_threadsafe(self._enter, jobs)
        return [job.number for job in jobs]

    # ---------------------------------------------------------------------------------------------------- the loop's

    def _adopt(self, number: int, version: int) -> None:
        self._number, self._version = number, version
        self._versions[number] = version
        self._dispatch()

    def _enter(self, jobs: Sequence[_Job]) -> None:
        self._jobs |= {job.number: job for job in jobs}
        self._waiting += jobs
        self._dispatch()

    def _drop(self, number: int) -> None:
        job = self._jobs.pop(number, None)
        if job is not None and job in self._waiting:
            self._waiting.remove(job)

    async def _take_metrics(self) -> dict[str, float]:
        counts, self._counts = self._counts, Counter()
        return {"endpoints": sum(not each.failures for each in self._members), "redrawn": 0, **counts}

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _dispatch(self) -> None:
        """Gives work to whoever can take some: weights first, then answers."""
        for member in self._members:
            if member.resting or member.changing or not self._number:
                continue
            if member.number != self._number:
                member.changing = True
                task = self._start(self._change_weights, member, self._number)
                self._others.add(task)
                task.add_done_callback(self._others.discard)
                continue
            while self._waiting and len(member.tasks) < self._share(member):
                job = self._waiting.popleft()
                member.tasks[self._start(self._draw, member, job)] = job

    def _share(self, member: _Member) -> int:
        """Answers that an endpoint may draw now: its share of all, so that none draws what another is free to; one, as
        long as it has to prove itself."""
        if member.failures:
            return 1
        healthy = sum(not each.failures for each in self._members)
        return min(member.most, -(-len(self._jobs) // healthy))

    def _start(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> asyncio.Task[None]:
        async def told() -> None:
            try:
                await work(*arguments)
            except Exception as error:  # of this program: whoever waits must hear of it
                self._arrived.put(error)

        return self._loop.create_task(told())

    async def _change_weights(self, member: _Member, number: int) -> None:
        try:
            await member.endpoint.change_weights(number)
            member.number = number
        except EndpointError as error:
            self._fail(member, error)
        finally:
            member.changing = False
        self._dispatch()

    async def _draw(self, member: _Member, job: _Job) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            drawn = await member.endpoint.draw(job.request)
            versions = self._known_versions(drawn)
        except EndpointError as error:
            del member.tasks[task]
            if job.number in self._jobs:
                self._again(job, error)
            if isinstance(error, Busy) and member.tasks:
                member.most = max(len(member.tasks) // 2, 1)
                self._counts["endpoint_busy"] += 1
            else:
                self._fail(member, error)
        else:
            del member.tasks[task]
            member.failures, member.most = 0, min(member.most + 1, self._slots)
            if self._jobs.pop(job.number, None) is not None:
                self._arrived.put(_events(job.number, drawn, versions))
        self._dispatch()

    def _known_versions(self, drawn: Drawn) -> list[int]:
        """Of the weights that drew each token. Raises WrongVersion for one that the run did not hand over, or that is
        older than the bound of staleness allows."""
        versions = []
        for number in drawn.versions:
            version = self._versions.get(number)
            if version is None or not self._version - self._oldest <= version <= self._version:
                raise WrongVersion(
                    f"a token was drawn by the weights {number}, not by {self._number}; the answer is dropped"
                )
            versions.append(version)
        return versions

    def _again(self, job: _Job, error: EndpointError | None = None) -> None:
        """An answer that was not drawn is drawn by whoever is next, or given up if servers cannot."""
        job.refused += isinstance(error, FailedRequest)
        if job.refused < REQUEST_TRIES:
            self._counts["redrawn"] += 1
            # what may itself be the cause goes behind the others
            (self._waiting.append if error else self._waiting.appendleft)(job)
        elif self._jobs.pop(job.number, None) is not None:
            self._arrived.put([TokenEvent(job.number, None, None, (), "error", str(error))])

    def _fail(self, member: _Member, error: EndpointError) -> None:
        """An endpoint is left alone for a while; what it was drawing is drawn again."""
        member.failures += 1
        member.number, member.resting = 0, True
        self._counts[f"endpoint_{error.reason}"] += 1
        self._last_errors[member.endpoint.url] = f"{error.reason}: {error}"
        seconds = self._rest(member.failures)
        logging.warning(
            "endpoint %s failed %d times in a row (%s: %s); %d answers are drawn again, it rests %g s",
            member.endpoint.url, member.failures, error.reason, error, len(member.tasks), seconds,
        )  # fmt: skip
        for task, job in reversed(member.tasks.items()):
            task.cancel()
            if job.number in self._jobs:
                self._again(job)
        member.tasks.clear()
        self._loop.call_later(seconds, self._rested, member)
        if self._jobs and all(each.failures >= self._tries for each in self._members):
            shown = "\n  ".join(f"{url}: {last:.300}" for url, last in self._last_errors.items())
            self._arrived.put(EndpointsLost(
                f"all endpoints of config.rl.rollout.endpoints failed {self._tries} times in a row; bring one back and "
                f"start the run again:\n  {shown}"
            ))  # fmt: skip

    def _rested(self, member: _Member) -> None:
        member.resting = False
        self._dispatch()


def _events(number: int, drawn: Drawn, versions: Sequence[int]) -> list[TokenEvent]:
    """An answer as an engine would report it."""
    rows = list(zip(drawn.token_ids, drawn.logprobs, versions, strict=True))
    ends: list[str | None] = [None] * (len(rows) - 1) + ["stop" if drawn.stopped else "length"]
    return [
        TokenEvent(number, token, logprob, (), end, version=version)
        for (token, logprob, version), end in zip(rows, ends, strict=True)
    ]


class RemoteWorker(RolloutWorker):
    """A `RolloutWorker` whose answers servers draw.

    Raises ConfigError as it does, and without the key of the servers or a workdir that they can see.
    """

    def __init__(self, config: TrainConfig, rollout: RolloutConfig, temperature: float):
        super().__init__(config, rollout, temperature)
        self._key = os.environ.get("KIMI_API_KEY", "")
        if not self._key:
            raise ConfigError(
                "config.rl.rollout.endpoints: servers take weights from who has their key only; put it into "
                "KIMI_API_KEY of the environment of the run, and of the servers"
            )
        self._remote: RemoteSampler | None = None

    def prompt(self, task: str, problem: Problem) -> Encoded:
        """See RolloutWorker; ConfigError for one with images, which no request of token ids can carry."""
        found = super().prompt(task, problem)
        if found.media:
            raise ConfigError(
                f"config.rl.rollout.endpoints: the task {task!r} has images, which a request of token ids cannot "
                "carry; leave the endpoints out to draw its answers in this process"
            )
        return found

    def take_metrics(self) -> dict[str, float]:
        """Those of tools, and of the endpoints."""
        return {**super().take_metrics(), **(self._remote.take_metrics() if self._remote else {})}

    def close(self) -> None:
        """Ends interpreters and connections."""
        super().close()
        if self._remote is not None:
            self._remote.close()
            self._remote = self._sampler = None  # an evaluation behind the last batch opens others

    def _open(self, params: Any) -> RolloutEngine:
        rollout = self._rollout
        endpoints = [
            Endpoint(url, self._key, rollout.endpoint_seconds, self._config.model.vocab_size)
            for url in rollout.endpoints
        ]
        self._remote = RemoteSampler(endpoints, rollout, self._publish)
        return self._remote

    def _publish(self, params: Any) -> int:
        folder = f"{self._config.workdir}/weights"
        try:
            return checkpoint.save_weights(folder, params, self._config)
        except (OSError, ValueError) as error:  # a full disk comes as either
            raise SourceUnavailable(
                f"the weights for the endpoints cannot be written to {folder} ({error}); make room and start again"
            ) from error
