"""`Swarm`: a question in, an answer with its sources out.

    swarm = Swarm(EndpointModel("http://127.0.0.1:8000/v1", "kimi"), tools=[...], journal="run.sqlite")
    result = anyio.run(swarm.run, "Which ...?")

The same with mode="resume" goes on where a run was interrupted, without paying again for what it knows; mode="replay"
repeats a run without a model.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.agents.agent import make_root
from kimi_jax.agents.config import ASSIGN_TASK, CREATE_SUBAGENT, READ_OUTPUT, SwarmConfig, from_json, to_json
from kimi_jax.agents.events import Event, Status, Usage
from kimi_jax.agents.journal import Journal, JournalError, Mode, read_run
from kimi_jax.agents.model import AgentModel, ModelRequest, Response, ScriptedModel
from kimi_jax.agents.runtime import Runtime
from kimi_jax.agents.tools import Tool, ToolResult

RESERVED = (CREATE_SUBAGENT["name"], ASSIGN_TASK["name"], READ_OUTPUT["name"])


@dataclass(frozen=True)
class SwarmResult:
    """status: `ok`, or why the answer is what there was when the run ended. sources: documents that were consulted and
    that the answer names. usage, steps: of all agents; critical_steps: of the report. outcomes: status of every agent.
    """

    answer: str
    status: Status
    sources: tuple[str, ...]
    usage: Usage
    steps: int
    critical_steps: int
    outcomes: dict[str, Status]


class Swarm:
    """One run: a swarm answers one question. observers get every event as it happens.

    journal: a file, which must not exist for a new run and must for the other modes; None keeps it in memory.
    Raises JournalError for a file that does not do; `run` raises ReplayMiss.
    """

    def __init__(
        self,
        model: AgentModel,
        tools: Sequence[Tool] = (),
        config: SwarmConfig = SwarmConfig(),  # noqa: B008 (frozen)
        journal: str | os.PathLike[str] | None = None,
        mode: Mode = "new",
        observers: Sequence[Callable[[Event], None]] = (),
    ):
        taken = [tool.name for tool in tools if tool.name in RESERVED]
        if taken:
            raise ValueError(f"{taken[0]} is a tool of the swarm itself; give yours another name")
        self.model, self.tools, self.config = model, tuple(tools), config
        self.journal = Journal(":memory:" if journal is None else journal, mode)
        self.runtime: Runtime | None = None
        self.outcomes: dict[str, Status] = {}
        self._observers = (self._note, *observers)

    def _note(self, event: Event) -> None:
        if event.kind == "end":
            self.outcomes[event.agent] = event.status

    async def run(self, question: str) -> SwarmResult:
        """Answers the question. Cancellation (Ctrl-C) ends every agent, and `outcomes` says how each one did end."""
        tools = [{**tool.declaration, "max_chars": tool.max_chars} for tool in self.tools]
        notes: dict[str, Any] = {
            "max_parallel": self.config.max_parallel,
            "settings": to_json(self.config),
            "tools": tools,
        }
        if self.journal.mode == "new":
            notes["began"] = time.time()
        self.journal.describe({"format": 1, "question": question, "model": self.model.name}, notes)
        runtime = self.runtime = Runtime(self.model, self.tools, self.config, self.journal, self._observers)
        root = make_root(runtime, question)
        with runtime.scope:
            await root.run()
        if runtime.fatal is not None:
            raise runtime.fatal
        envelope, ledger = root.envelope, root.ledger
        cited = tuple(source for source in root.sources if source in envelope.summary)
        return SwarmResult(
            answer=envelope.summary,
            status=envelope.status,
            sources=cited,
            usage=root.usage,
            steps=ledger.steps,
            critical_steps=ledger.critical_steps,
            outcomes=dict(self.outcomes),
        )

    def close(self) -> None:
        """Closes the journal."""
        self.journal.close()


def replay(path: str | os.PathLike[str], observers: Sequence[Callable[[Event], None]] = ()) -> tuple[Swarm, str]:
    """(a swarm that repeats the run of a journal, its question), with the run's settings, no model and no tools.

    Raises JournalError for a file that is no journal, `run` ReplayMiss if the code does not do what it did.
    """
    meta = read_run(path)[0]
    try:
        tools = [
            Tool(str(t["name"]), str(t["description"]), t["parameters"], _no_tool, max_chars=int(t["max_chars"]))
            for t in meta["tools"]
        ]
        question, config = str(meta["question"]), from_json(meta["settings"])
        model = ScriptedModel(_no_model, str(meta["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"{os.fspath(path)} does not say how its run was set up: {error!r}") from error
    return Swarm(model, tools, config, path, "replay", observers), question


async def _no_model(request: ModelRequest) -> Response:
    raise AssertionError("a replay asks no model")


async def _no_tool(arguments: dict[str, Any]) -> ToolResult:
    raise AssertionError("a replay calls no tool")
