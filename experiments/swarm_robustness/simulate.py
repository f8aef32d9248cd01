"""A swarm of scripted agents in logical steps: one task, one way to delegate, one fault of the subagents.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6: an orchestrator that learns when to delegate, subagents that are
frozen, budgets in critical steps. Time is counted in steps (one model turn with its tool calls), so a run is exact and
the same on every machine.

The orchestrator does in each turn what it can: it assigns items that wait for no other, waits for all of these
subagents (a barrier, as in the report), and does other items itself, one step of it a step of the item. What visibly
fails is assigned once more, then done by the orchestrator. It does not make mistakes of its own: whatever a run loses,
it loses by its subagents. Policies: sequential (assigns nothing), half (half of what it could), parallel (all), and
checked (parallel, and one step to verify each result, which finds every wrong one).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from kimi_jax.agents import critical
from kimi_jax.agents.evals import Table, TableScore
from kimi_jax.agents.events import ROOT, Event, Kind, Status
from kimi_jax.agents.families import SwarmTask

POLICIES = ("sequential", "half", "parallel", "checked")
# fault -> what its level is, and the five levels; the first is no fault
FAULTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "wrong": ("share of subagents that return a wrong fact", (0, 0.1, 0.3, 0.6, 1)),
    "straggler": ("one subagent in five takes so many times its steps", (1, 2, 5, 10, 20)),
    "garbage": ("share of subagents whose result cannot be read", (0, 0.1, 0.3, 0.6, 1)),
    "crash": ("share of subagents that die at a random step", (0, 0.1, 0.3, 0.6, 1)),
    "loop": ("share of subagents that never end by themselves", (0, 0.1, 0.3, 0.6, 1)),
    "rate_limit": ("share of requests of subagents answered with 429", (0, 0.05, 0.1, 0.2, 0.4)),
    "oversize": ("length of results, in pages that the orchestrator has to read", (1, 2, 4, 8, 16)),
    "injected": ("share of results with an order to start ten more subagents", (0, 0.1, 0.3, 0.6, 1)),
}
STRAGGLERS = 0.2
CHILD_LIMIT = 40  # steps after which a subagent is stopped, unless said
ASSIGNED = 2  # times that an item is assigned before the orchestrator does it itself
OBEYED, OBEYED_STEPS = 10, 8  # subagents that an injected order starts, and steps that each takes
ATTEMPTS = 8  # requests for one step before a subagent gives up
TIME_BUDGET = 4  # steps of time, in multiples of the task's T1; enforced before a step
WORK_BUDGET = 6  # steps of all agents, likewise


@dataclass(frozen=True)
class Result:
    """What one run gave. time: steps from its beginning to its end. events: the record, as the runtime writes it."""

    score: TableScore
    time: int
    events: tuple[Event, ...]
    peak: int  # most subagents that ran at once

    @property
    def work(self) -> int:
        """Steps of all agents."""
        return sum(event.kind == "step" for event in self.events)

    @property
    def critical_steps(self) -> int:
        """The report's measure, which knows no slots."""
        return critical.critical_steps(critical.stages(self.events))


@dataclass
class _Child:
    """A subagent under way. steps: it will take; fate: how it ends, if nothing stops it."""

    name: str
    item: int | None  # None: an injected order
    steps: int
    fate: Status | str  # "ok", "wrong", "garbage", "error" (a crash), or "injected"
    started: bool = False
    taken: int = 0
    attempts: int = 0  # refused requests since the last step
    ended: Status = "ok"


@dataclass
class _Slots:
    """Additive increase, multiplicative decrease: a 429 halves the limit once a step, as many successes add one."""

    most: int
    limit: int = 0
    successes: int = 0
    shrunk_at: int = -1

    def failed(self, now: int) -> None:
        self.successes = 0
        if now > self.shrunk_at:
            self.limit, self.shrunk_at = max(1, self.limit // 2), now

    def succeeded(self) -> None:
        self.successes += 1
        if self.successes >= self.limit and self.limit < self.most:
            self.limit, self.successes = self.limit + 1, 0


@dataclass
class Run:
    """One run under way: what the orchestrator knows, the clock, and the record so far."""

    task: SwarmTask
    policy: str
    fault: str
    level: float
    slots: int
    rng: random.Random
    child_limit: int = CHILD_LIMIT
    now: int = 0
    work: int = 0
    peak: int = 0
    root_steps: int = 0
    events: list[Event] = field(default_factory=list)
    found: dict[int, bool] = field(default_factory=dict)  # item -> whether its answer is right
    tries: dict[int, int] = field(default_factory=dict)
    orders: int = 0  # injected orders that the orchestrator will obey in its next turn
    tickets: Iterator[int] = field(default_factory=itertools.count)  # the order among those that wait

    def note(self, agent: str, kind: Kind, step: int, status: Status = "ok", **detail: str) -> None:
        parent = None if agent == ROOT else ROOT
        self.events.append(
            Event(len(self.events), self.now, agent, parent, kind, step=step, status=status, detail=detail)
        )

    def may_step(self) -> bool:
        """Whether one more step stays within both budgets."""
        return self.now < TIME_BUDGET * self.task.work and self.work < WORK_BUDGET * self.task.work

    def root_step(self) -> bool:
        """One step of the orchestrator; False, and no step, if a budget is spent."""
        if not self.may_step():
            return False
        self.now += 1
        self.work += 1
        self.note(ROOT, "step", self.root_steps)
        self.root_steps += 1
        return True

    # ------------------------------------------------------------------------------------------------- orchestrator

    def play(self) -> Result:
        self.note(ROOT, "start", 0)
        while (len(self.found) < len(self.task.items) or self.orders) and self.may_step():
            if self.orders and not self.stage([]):
                break
            ready = [
                i
                for i, item in enumerate(self.task.items)
                if i not in self.found and all(j in self.found for j in item.after)
            ]
            assigned = self.choose(ready)
            if assigned and not self.stage(assigned):
                break
            for i in ready:
                if i not in assigned and not self.do_itself(i):
                    break
        self.root_step()  # writes the answer; without budget for it, what is known is the answer
        self.note(ROOT, "end", self.root_steps)
        return Result(self.task.verify(self.answer()), self.now, tuple(self.events), self.peak)

    def choose(self, ready: list[int]) -> list[int]:
        """The items of this turn that are assigned; the orchestrator does the others."""
        fresh = [i for i in ready if self.tries.get(i, 0) < ASSIGNED]
        if self.policy == "sequential":
            return []
        return fresh[: (len(fresh) + 1) // 2] if self.policy == "half" else fresh

    def do_itself(self, i: int) -> bool:
        for _ in range(self.task.items[i].steps):
            if not self.root_step():
                return False
        self.found[i] = True
        return True

    def stage(self, assigned: list[int]) -> bool:
        """One turn that starts subagents, for these items or, without any, by injected orders; False without budget."""
        if not self.root_step():
            return False
        step = self.root_steps - 1
        names = (f"{ROOT}/{step}.{k}" for k in itertools.count())
        children = [self.start(i, name) for i, name in zip(assigned, names, strict=False)]
        if not assigned:
            children = [_Child(next(names), None, OBEYED_STEPS, "ok") for _ in range(OBEYED * self.orders)]
            self.orders = 0
        for child in children:
            self.note(ROOT, "spawn", step, child=child.name)
        self.run_children(children)
        for child in children:
            self.note(ROOT, "join", step, child=child.name)
        for child in children:
            if child.item is not None:
                self.receive(child, child.item)
        return True

    def start(self, i: int, name: str) -> _Child:
        self.tries[i] = self.tries.get(i, 0) + 1
        steps, fate = self.task.items[i].steps, "ok"
        draw, place = self.rng.random(), self.rng.random()  # always two, so that runs of one seed share their luck
        if draw >= self.task.reliability:
            fate = "wrong"
        if self.fault == "straggler":
            steps = int(steps * self.level) if draw < STRAGGLERS else steps
        elif self.fault in ("wrong", "garbage", "crash", "loop", "injected") and draw < self.level:
            fate = self.fault
            if fate == "crash":
                fate, steps = "error", int(place * steps)
            elif fate == "loop":
                steps = 10**9
        return _Child(name, i, steps, fate)

    def receive(self, child: _Child, i: int) -> None:
        """What the orchestrator makes of a result."""
        if child.ended != "ok" or child.fate == "garbage":
            return  # it sees that; the item stays open
        if self.fault == "oversize":
            pages = int(self.level) - 1  # the first page comes with the result
            if not all(self.root_step() for _ in range(pages)):
                return
        if self.policy == "checked" and not self.root_step():
            return
        bad = child.fate in ("wrong", "injected")
        if child.fate == "injected" and self.policy != "checked":
            self.orders += 1
        if not (bad and self.policy == "checked"):  # a check finds a wrong result, and the item stays open
            self.found[i] = not bad

    def answer(self) -> Table:
        """The table of what was found. A row that rests on a wrong one is about another country."""
        right: dict[int, bool] = {}
        rows = []
        for i, item in enumerate(self.task.items):
            if i in self.found:
                entity = all(right.get(j, False) for j in item.after)
                right[i] = entity and self.found[i]
                wrong = (item.row[0] if not item.after else f"wrong {i}", *("0",) * (len(item.row) - 1))
                rows.append(item.row if right[i] else wrong)
        wanted = {row[0] for row in self.task.gold.rows}
        if len(wanted) < len(self.task.items):  # only the last row is asked for
            rows = rows[-1:] if len(self.task.items) - 1 in self.found else []
        return Table(self.task.gold.columns, tuple(rows))

    # -------------------------------------------------------------------------------------------------- subagents

    def run_children(self, children: list[_Child]) -> None:
        """Until all have ended: in each unit of time every child that holds a slot makes one request."""
        slots = _Slots(self.slots, self.slots)
        queue = list(reversed(children))  # the next one last
        running: list[_Child] = []
        waiting: list[tuple[int, int, _Child]] = []  # (when it may ask again, order, child), after a 429
        while queue or running or waiting:
            if not self.may_step():
                for child in [*running, *queue, *(entry[2] for entry in waiting)]:
                    self.end(child, "budget" if child.started else "not_started")
                return
            while waiting and waiting[0][0] <= self.now:
                queue.append(heapq.heappop(waiting)[2])  # before those who have not begun
            while queue and len(running) < slots.limit:
                running.append(queue.pop())
                self.begin(running[-1])
            self.peak = max(self.peak, len(running))
            running = [child for child in running if not self.is_over(child)]  # one may die before its first step
            if not running:
                if waiting and not queue:
                    self.now = min(waiting[0][0], TIME_BUDGET * self.task.work)
                continue
            self.now += 1
            still = []
            for child in running:
                outcome = self.request(child, slots)
                if outcome == "again":
                    heapq.heappush(waiting, (self.now + 2 ** (child.attempts - 1), next(self.tickets), child))
                elif outcome == "ok" and not self.is_over(child):
                    still.append(child)
            running = still

    def begin(self, child: _Child) -> None:
        if not child.started:
            child.started = True
            self.note(child.name, "start", 0)

    def request(self, child: _Child, slots: _Slots) -> str:
        """One request of a child: "ok" if it was a step, "again" if it has to wait, "ended" if the child gave up."""
        if self.work >= WORK_BUDGET * self.task.work:
            self.end(child, "budget")
            return "ended"
        if self.fault == "rate_limit" and self.rng.random() < self.level:
            slots.failed(self.now)
            child.attempts += 1
            if child.attempts >= ATTEMPTS:
                self.end(child, "rate_limited")
                return "ended"
            return "again"
        slots.succeeded()
        child.attempts = 0
        child.taken += 1
        self.work += 1
        self.note(child.name, "step", child.taken - 1)
        return "ok"

    def is_over(self, child: _Child) -> bool:
        """Whether it took its last step, or is stopped at the limit."""
        if child.taken >= child.steps:
            self.end(child, "error" if child.fate == "error" else "ok")
        elif child.taken >= self.child_limit:
            self.end(child, "timeout")
        else:
            return False
        return True

    def end(self, child: _Child, status: Status) -> None:
        child.ended = status
        self.note(child.name, "end", child.taken, status)


def simulate(
    task: SwarmTask,
    policy: str,
    *,
    fault: str = "wrong",
    level: float = 0,
    slots: int = 8,
    child_limit: int = CHILD_LIMIT,
    seed: int = 0,
) -> Result:
    """One run. slots: subagents that may run at once. child_limit: steps after which one is stopped. seed: of the
    faults; runs that share it share their luck.

    Raises ValueError for an unknown policy or fault.
    """
    if policy not in POLICIES or fault not in FAULTS or min(slots, child_limit) < 1:
        raise ValueError(
            f"policy {policy!r}, fault {fault!r}, {slots} slots or a limit of {child_limit} steps: policies are"
            f" {POLICIES}, faults {tuple(FAULTS)}, and the two numbers at least 1"
        )
    return Run(task, policy, fault, level, slots, random.Random(f"{task.name}/{seed}"), child_limit).play()
