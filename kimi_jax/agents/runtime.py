"""What all agents of one run share: the model, the slots, the journal and the clock; and the one way to make a call."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from kimi_jax.agents.budget import BudgetExceeded
from kimi_jax.agents.config import ASSIGN_TASK, CREATE_SUBAGENT, READ_OUTPUT, SwarmConfig
from kimi_jax.agents.events import Event, Status, Usage
from kimi_jax.agents.journal import Journal, Outcome, ReplayMiss
from kimi_jax.agents.model import (
    AgentModel,
    Call,
    Declaration,
    Message,
    ModelRequest,
    RateLimited,
    Response,
    Unavailable,
)
from kimi_jax.agents.scheduler import Scheduler
from kimi_jax.agents.tools import Tool, Toolset

if TYPE_CHECKING:
    from kimi_jax.agents.agent import Agent

Messages = Sequence[Message]
MIN_ANSWER = 256  # tokens; a step that the budget leaves less for is refused
FATAL = (ReplayMiss, sqlite3.Error)  # end the run; everything else is one agent's trouble


class Stopped(Exception):
    """The recorded run stopped this agent here: status `timeout` or `budget`."""

    def __init__(self, status: Status):
        super().__init__(status)
        self.status = status


class Failed(Exception):
    """The model gave no answer, and will not."""

    def __init__(self, status: Status, message: str):
        super().__init__(message)
        self.status = status


class Declared:
    """The tools that a request declares. digest: stands for them in the request's identity; size: of them in bytes."""

    def __init__(self, tools: Sequence[Declaration]):
        text = json.dumps(tools, sort_keys=True)
        self.tools, self.size = list(tools), len(text)
        self.digest = hashlib.sha256(text.encode()).hexdigest()


NO_TOOLS = Declared(())


class Runtime:
    """One run. observers: called with each event, as it happens. fatal: what ended the whole run."""

    def __init__(
        self,
        model: AgentModel,
        tools: Sequence[Tool],
        config: SwarmConfig,
        journal: Journal,
        observers: Sequence[Callable[[Event], None]] = (),
    ):
        self.model, self.tools, self.config, self.journal = model, Toolset.of(*tools), config, journal
        self.clock = asyncio.get_running_loop().time  # many times cheaper than anyio.current_time, and the same
        self.scheduler = Scheduler(config.max_parallel, self.clock)
        self.scope = anyio.CancelScope()
        self.fatal: BaseException | None = None
        self.num_events = 0
        self._observers = tuple(observers)
        self._start = self.clock()
        self._declared: dict[bool, Declared] = {}
        self._dirty = False

    def now(self) -> float:
        """Seconds since the run began, earlier attempts included."""
        return self.journal.elapsed + self.clock() - self._start

    def declared(self, may_spawn: bool) -> Declared:
        """The tools of an agent, by whether it may have subagents."""
        if may_spawn not in self._declared:
            own = [CREATE_SUBAGENT, ASSIGN_TASK] if may_spawn else []
            self._declared[may_spawn] = Declared([*own, *self.tools.declarations, READ_OUTPUT])
        return self._declared[may_spawn]

    def remember(self, key: bytes, outcome: Outcome) -> None:
        """Writes an outcome. Those of one turn of the event loop become durable together, at its end."""
        self.journal.remember(key, outcome)
        if not self._dirty:
            self._dirty = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._dirty = False
        try:
            if self.fatal is None:
                self.journal.flush()
        except sqlite3.Error as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the run."""
        self.fatal = self.fatal or error
        self.scope.cancel()

    def emit(self, event: Event) -> None:
        """Writes an event and shows it to the observers."""
        if self.fatal is None:
            self.journal.write(event)
            self.num_events += 1
            for observer in self._observers:
                observer(event)


async def recorded(agent: Agent, what: str, request: Any, live: Callable[[], Awaitable[Outcome]]) -> Outcome:
    """The outcome of a call: what the journal knows, or what `live` gives, which is then written.

    Raises Stopped, BudgetExceeded and ReplayMiss; cancellation passes.
    """
    runtime = agent.runtime
    key = runtime.journal.next_key(agent.name, request)
    outcome = runtime.journal.known(key, agent.name, what)
    agent.replayed = outcome is not None
    if outcome is None:
        began = runtime.now()
        try:
            outcome = await live()
        except BudgetExceeded as error:
            outcome = {"refused": error.kind}
        except anyio.get_cancelled_exc_class():
            if agent.lease.expired:  # a timeout is an outcome; what the user aborts has none
                stopped = {"stopped": agent.lease.expired, "time": runtime.now(), "duration": runtime.now() - began}
                runtime.remember(key, stopped)
            raise
        outcome["time"], outcome["duration"] = runtime.now(), runtime.now() - began
        runtime.remember(key, outcome)
    agent.local_time = max(agent.local_time, outcome["time"])
    if "stopped" in outcome:
        raise Stopped(outcome["stopped"])
    if "refused" in outcome:
        raise BudgetExceeded(outcome["refused"])
    return outcome


async def ask(agent: Agent, messages: Messages, tools: Declared, more: str) -> tuple[Response, float]:
    """(the model's answer, seconds it took). Repeats a request while the model is unavailable, without a slot then.

    more: what is asked beyond the agent's history, which together with it identifies the request. Raises Failed, and
    what `recorded` raises.
    """
    config = agent.runtime.config
    identity = ["model", agent.runtime.model.name, agent.history, tools.digest, config.context.policy, more]
    delay = 0.0
    for attempt in range(config.max_attempts):
        live = functools.partial(_complete, agent, messages, tools, delay)
        outcome = await recorded(agent, "the model", identity, live)
        if "response" in outcome:
            response = _from_json(outcome["response"])
            if agent.replayed:
                agent.ledger.charge(response.usage)
            return response, outcome["duration"]
        if outcome["error"] == "failed":
            raise Failed("error", outcome["message"])
        # a quarter more at most, by name: agents that were refused together do not come back together
        spread = 1 + sum(agent.name.encode()) % 64 / 256
        delay = max(outcome["retry_after"], config.backoff * 2**attempt) * spread
    status: Status = "rate_limited" if outcome["error"] == "rate_limited" else "error"
    raise Failed(status, f"{config.max_attempts} requests: {outcome['message']}")


async def _complete(agent: Agent, messages: Messages, tools: Declared, delay: float) -> Outcome:
    """One request to the model, within the budget."""
    runtime, ledger = agent.runtime, agent.ledger
    if delay:
        async with agent.lease.paused():
            await anyio.sleep(delay)
    prices, bound = runtime.config.prices, agent.prompt_bound(messages, tools)
    max_tokens = _room(agent, bound)
    cost = prices.cost(bound, max_tokens)
    ledger.reserve(bound + max_tokens, cost)
    began = runtime.clock()
    try:
        response = await runtime.model.complete(ModelRequest(agent.name, messages, tools.tools, max_tokens))
    except BaseException as error:
        ledger.release(bound + max_tokens, cost)
        if isinstance(error, RateLimited):
            runtime.scheduler.shrink(began)
            return {"error": "rate_limited", "message": str(error), "retry_after": error.retry_after}
        if isinstance(error, Unavailable):
            return {"error": "unavailable", "message": str(error), "retry_after": error.retry_after}
        if isinstance(error, Exception):
            return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:1000]}
        raise
    runtime.scheduler.succeeded()
    counted = response.usage
    paid = counted.cost or prices.cost(counted.prompt_tokens, counted.completion_tokens)
    usage = Usage(counted.prompt_tokens, counted.completion_tokens, paid)
    ledger.settle(bound + max_tokens, cost, usage)
    return {"response": _to_json(response, usage)}


def _room(agent: Agent, bound: int) -> int:
    """Tokens that the answer may have. Raises BudgetExceeded if they are too few."""
    config, ledger = agent.runtime.config, agent.ledger
    least = min(MIN_ANSWER, config.max_tokens)
    tokens = ledger.left("tokens") - bound
    if tokens < least:
        raise BudgetExceeded("tokens")
    room = min(config.max_tokens, tokens)
    if config.prices.completion:
        room = min(room, (ledger.left("cost") - config.prices.cost(bound, 0)) * 1e6 / config.prices.completion)
        if room < least:
            raise BudgetExceeded("cost")
    return int(room)


def _to_json(response: Response, usage: Usage) -> dict[str, Any]:
    return {
        "text": response.text,
        "reasoning": response.reasoning,
        "finish": response.finish,
        "calls": [[call.id, call.name, call.arguments] for call in response.calls],
        "usage": [usage.prompt_tokens, usage.completion_tokens, usage.cost],
        "tokens": dict(response.tokens),
    }


def _from_json(fields: dict[str, Any]) -> Response:
    calls = tuple(Call(*call) for call in fields["calls"])
    return Response(
        fields["text"], calls, Usage(*fields["usage"]), fields["reasoning"], fields["finish"], fields["tokens"]
    )
