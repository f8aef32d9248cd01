"""The record of a swarm: an append-only list of events that the runtime writes and every other tool reads.

The journal stores it, the trace page draws it, replay reproduces it, `critical.py` measures it (critical steps of the
Kimi K2.5 report, arXiv 2602.02276, section 6; work, span and makespan), and RL turns it into trajectories.

Agents are named by where they come from, so that a name does not depend on the schedule: the orchestrator is `root`,
and the child that is number 2 of the tasks in step 3 of agent A is `A/3.2`. Events, in the order in which they happen:

    kind    agent       meaning
    spawn   the parent  an `assign_task` was accepted; detail["child"] names the child, which may wait in the queue
    start   the child   it got a slot and runs (also of `root`); detail: agent (configuration), system, brief
    step    any         one model turn ended; it precedes the tool, spawn and join events of the calls that it issued
    tool    any         one call of an ordinary tool ended; detail: name, arguments, result
    join    the parent  it has waited for detail["child"] and holds its result; one event for each child
    end     any         the agent is over; status says how; detail: summary, artefacts. A child that never got a slot
                        has spawn, end (status `not_started`) and join, but no start

A step is one model turn with the calls that it issues, the final answer included. Nodes of the dependency graph are
steps; edges are the order within one agent, spawn -> first step of the child, last step of the child -> what its parent
does after the join. The runtime joins all children of a step before the parent's next step (a barrier); the record does
not require it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["spawn", "start", "step", "tool", "join", "end"]
Status = Literal["ok", "error", "timeout", "budget", "rate_limited", "refused", "aborted", "not_started"]
ROOT = "root"
_ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)


@dataclass(frozen=True)
class Usage:
    """What calls of a model cost: tokens, and US dollars by the prices that the caller gave (0 without prices)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


NOTHING = Usage()


@dataclass(frozen=True)
class Event:
    """One line of the record.

    id: position in the journal, from 0, in order of real time.
    time: seconds since the run began, when the event was written (a step's or a tool's end). duration: seconds it took
        (for `start` the time spent in the queue; for `end` the time spent running; otherwise of a model or tool call).
    clock: logical (Lamport) time: more than that of the agent's event before it, and of the spawn or end it depends on.
    agent, parent: names; the parent of `root` is None.
    stage: index of the *parent's* step that spawned this agent, the same in all its events (0 for `root`).
    step: index of the agent's *own* step that this event belongs to, from 0 (for start 0, for end the number of steps).
    usage: of this event alone: nonzero for `step` only, so that sums never count twice.
    detail: JSON-able values, bounded by the writer.
    """

    id: int
    time: float
    agent: str
    parent: str | None
    kind: Kind
    stage: int = 0
    usage: Usage = NOTHING
    status: Status = "ok"
    detail: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    clock: int = 0
    duration: float = 0.0


def to_json(event: Event) -> str:
    """One line of JSON."""
    return _ENCODER.encode({**vars(event), "usage": vars(event.usage)})


def from_json(line: str) -> Event:
    """The inverse of `to_json`. Raises ValueError for what is not an event."""
    try:
        fields = json.loads(line)
        return Event(**{**fields, "usage": Usage(**fields["usage"])})
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"this line is not an event of a swarm: {error}") from error


def canonical(events: Iterable[Event]) -> list[Event]:
    """The events in logical order, without wall time: equal for two runs that did the same in another schedule."""
    ordered = sorted(events, key=lambda e: (e.clock, e.agent, e.id))
    return [replace(e, id=i, time=0.0, duration=0.0) for i, e in enumerate(ordered)]
