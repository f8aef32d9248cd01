"""Scripted models and a virtual clock for the tests of the swarm."""

import json
from collections.abc import Awaitable, Callable, Sequence

import anyio

from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.events import Event, Usage
from kimi_jax.agents.model import Call, ModelRequest, Response, ScriptedModel
from kimi_jax.agents.swarm import Swarm, SwarmResult
from kimi_jax.agents.virtual_time import VirtualTimeLoop

CALL_USAGE = Usage(100, 20)


def say(text: str, *calls: tuple[str, dict], usage: Usage = CALL_USAGE) -> Response:
    """An answer with calls given as (name, arguments)."""
    made = tuple(Call(f"call_{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls))
    return Response(text, made, usage)


def create(*names: str) -> list[tuple[str, dict]]:
    return [("create_subagent", {"name": name, "system_prompt": f"You are {name}."}) for name in names]


def assign(*briefs: str, agent: str = "worker") -> list[tuple[str, dict]]:
    return [("assign_task", {"agent": agent, "prompt": brief}) for brief in briefs]


def turn(request: ModelRequest) -> int:
    """How many answers the agent has given already."""
    return sum(message["role"] == "assistant" for message in request.messages)


def brief(request: ModelRequest) -> str:
    return request.messages[1]["content"]


def results(request: ModelRequest) -> list[str]:
    """Contents of all tool messages."""
    return [message["content"] for message in request.messages if message["role"] == "tool"]


def orchestrator(briefs: Sequence[str], child: Callable[[ModelRequest], Awaitable[Response]], **usage) -> ScriptedModel:
    """Creates `worker`, assigns all briefs in one turn, answers with all results; children answer by `child`."""

    async def answer(request: ModelRequest) -> Response:
        if "/" in request.agent:
            return await child(request)
        if turn(request) == 0:
            return say("", *create("worker"))
        if turn(request) == 1:
            return say("", *assign(*briefs))
        return say("All done: " + " ".join(results(request)[1:]))

    return ScriptedModel(answer)


def virtual(main: Callable[[], Awaitable]):
    """Runs under a clock that jumps."""
    return anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})


def run(swarm: Swarm, question: str = "Q?") -> SwarmResult:
    """One run under the virtual clock."""
    return virtual(lambda: swarm.run(question))


def run_events(model, config: SwarmConfig = SwarmConfig(), **options) -> tuple[SwarmResult, list[Event]]:  # noqa: B008
    """(result, events) of one run under the virtual clock."""
    events: list[Event] = []
    return run(Swarm(model, config=config, observers=[events.append], **options)), events
