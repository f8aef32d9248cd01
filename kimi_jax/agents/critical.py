"""Work, span, makespan and critical steps of a swarm's run, and what they say about its parallelism.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.3 (critical steps) and the work-span model of parallel computing
(Brent 1974; Graham 1969 for list scheduling). Unit of every length: one step, which is one tool call or interaction
with the environment, so that nothing here depends on a clock.

A run is a graph. A node is a maximal run of steps of one agent between two waits; its predecessors are the node before
it in the same agent, the node that spawned the agent, and the last nodes of the agents that it awaited. From the graph:

  work T1      all steps: failed, repeated, cancelled and nested ones too
  span T∞      the longest path; with unlimited slots no run is shorter
  makespan Tp  list scheduling with p slots for subagents (the orchestrator needs none, and an agent that waits none):
               max(T∞, T1_sub / p) <= Tp <= T1_sub / p + T∞

The report's number, the sum over stages of (main + longest subagent), equals T∞ when every join is a barrier, and
counts too much when a subagent may run on while the orchestrator goes on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kimi_jax.agents.events import ROOT, Event


class GraphError(ValueError):
    """Nodes that make no graph: two of one name, a predecessor that is missing, a cycle, a negative cost."""


@dataclass(frozen=True)
class Node:
    """`cost` steps (0 or more) of `agent` without a wait; it begins when all nodes named in `after` have ended."""

    name: str
    cost: int
    after: tuple[str, ...] = ()
    agent: str = ROOT


@dataclass(frozen=True)
class Graph:
    """The nodes of a run, in any order. Raises GraphError unless they make a directed graph without cycles."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        names = {node.name for node in self.nodes}
        if len(names) != len(self.nodes):
            raise GraphError("two nodes of a run have one name")
        for node in self.nodes:
            missing = [name for name in node.after if name not in names]
            if missing:
                raise GraphError(f"node {node.name!r} comes after {missing[0]!r}, which the run does not have")
            if node.cost < 0:
                raise GraphError(f"node {node.name!r} has cost {node.cost}; a cost is a number of steps, 0 or more")
        if len(self.ordered) != len(self.nodes):
            stuck = sorted(names - {node.name for node in self.ordered})
            raise GraphError(f"the nodes wait for one another in a circle: {', '.join(stuck[:5])}")

    @cached_property
    def successors(self) -> dict[str, list[str]]:
        """Node name to the names of the nodes that come directly after it."""
        found: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in set(node.after):
                found[name].append(node.name)
        return found

    @cached_property
    def ordered(self) -> tuple[Node, ...]:
        """The nodes with every predecessor before its successors; shorter than `nodes` if there is a cycle."""
        by_name = {node.name: node for node in self.nodes}
        waiting = {node.name: len(set(node.after)) for node in self.nodes}
        ready = [node.name for node in self.nodes if not waiting[node.name]]
        order = []
        for name in ready:  # grows while it is read
            order.append(by_name[name])
            for later in self.successors[name]:
                waiting[later] -= 1
                if not waiting[later]:
                    ready.append(later)
        return tuple(order)

    @property
    def subagents(self) -> tuple[str, ...]:
        """The agents other than the orchestrator, in the order in which they first appear."""
        return tuple(dict.fromkeys(node.agent for node in self.nodes if node.agent != ROOT))


# ------------------------------------------------------------------------------------------------- work, span, makespan


def work(graph: Graph) -> int:
    """T1 in steps: what one agent that does everything needs."""
    return sum(node.cost for node in graph.nodes)


def subagent_work(graph: Graph) -> int:
    """The part of the work, in steps, that subagents do: what has to share the slots."""
    return sum(node.cost for node in graph.nodes if node.agent != ROOT)


def earliest_ends(graph: Graph) -> dict[str, int]:
    """Node name to the step at which it ends when every node begins as soon as it may."""
    ends: dict[str, int] = {}
    for node in graph.ordered:
        ends[node.name] = node.cost + max((ends[name] for name in node.after), default=0)
    return ends


def span(graph: Graph) -> int:
    """T∞ in steps: the longest path through the graph."""
    return max(earliest_ends(graph).values(), default=0)


def critical_path(graph: Graph) -> tuple[str, ...]:
    """Names of the nodes of one longest path, first to last; among equal ones, the path of the earliest nodes."""
    ends = earliest_ends(graph)
    by_name = {node.name: node for node in graph.nodes}
    path = []
    name = max(ends, key=ends.__getitem__, default=None)
    while name is not None:
        path.append(name)
        name = max(by_name[name].after, key=ends.__getitem__, default=None)
    return tuple(reversed(path))


@dataclass(frozen=True)
class Schedule:
    """When every node begins and ends, in steps. makespan: the last end."""

    begins: Mapping[str, int]
    ends: Mapping[str, int]

    @property
    def makespan(self) -> int:
        """Steps from the beginning of the run to its end."""
        return max(self.ends.values(), default=0)


def schedule(graph: Graph, slots: int | None = None) -> Schedule:
    """List scheduling: whenever a slot is free, the node that became ready first takes it; equals in graph order.

    slots: how many nodes of subagents may run at once, None for any number. Nodes of the orchestrator need no slot and
    a node of no steps takes none. Raises ValueError for fewer than one slot.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"a run needs at least one slot for subagents, not {slots}")
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    waiting = {node.name: len(set(node.after)) for node in graph.nodes}
    queue: list[tuple[int, int]] = []  # (step at which it became ready, place) of nodes that want a slot
    running: list[tuple[int, int, bool]] = []  # (step at which it ends, place, whether it holds a slot)
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    free = len(graph.nodes) if slots is None else slots

    def begin(i: int, now: int, holds: bool) -> None:
        begins[graph.nodes[i].name] = now
        heapq.heappush(running, (now + graph.nodes[i].cost, i, holds))

    def admit(i: int, now: int) -> None:
        if graph.nodes[i].agent == ROOT or not graph.nodes[i].cost:
            begin(i, now, False)
        else:
            heapq.heappush(queue, (now, i))

    for node in graph.nodes:
        if not waiting[node.name]:
            admit(place[node.name], 0)
    now = 0
    while queue or running:
        # everything that ends now ends before a slot is given away, so that ties do not depend on the heap
        while running and running[0][0] == now:
            _, i, held = heapq.heappop(running)
            free += held
            ends[graph.nodes[i].name] = now
            for name in graph.successors[graph.nodes[i].name]:
                waiting[name] -= 1
                if not waiting[name]:
                    admit(place[name], now)
        while queue and free:
            begin(heapq.heappop(queue)[1], now, True)
            free -= 1
        if running:
            now = running[0][0]
    return Schedule(begins, ends)


def makespan(graph: Graph, slots: int | None = None) -> int:
    """Tp in steps of `schedule`; without a limit of slots it is the span."""
    return schedule(graph, slots).makespan


# ------------------------------------------------------------------------------------------ the report's critical steps


@dataclass(frozen=True)
class Stage:
    """One action of the main agent: its own steps, and the steps of each subagent of the group that it started."""

    main: int
    subagents: tuple[int, ...] = ()


def critical_steps(stages: Iterable[Stage]) -> int:
    """Section 6.3 of the report: the sum over stages of main steps plus the steps of the longest subagent."""
    return sum(stage.main + max(stage.subagents, default=0) for stage in stages)


def fork_joins(stages: Sequence[Stage]) -> Graph:
    """The graph of stages whose joins are barriers; its span is `critical_steps`."""
    nodes: list[Node] = []
    joined: tuple[str, ...] = ()
    for t, stage in enumerate(stages):
        main = Node(f"{ROOT}/{t}", stage.main, joined)
        group = [Node(f"sub{t}.{i}", cost, (main.name,), f"sub{t}.{i}") for i, cost in enumerate(stage.subagents)]
        nodes += [main, *group]
        joined = (main.name, *(node.name for node in group))
    return Graph(tuple(nodes))


# ------------------------------------------------------------------------------------------------------------ speed-ups


def steps_to_reach(curve: Iterable[tuple[float, float]], target: float) -> float | None:
    """The fewest critical steps of the (critical steps, score) points whose score is at least `target`, or None."""
    return min((steps for steps, score in curve if score >= target), default=None)


def speedup_at_quality(
    single: Iterable[tuple[float, float]], swarm: Iterable[tuple[float, float]], target: float
) -> float | None:
    """Figure 8 of the report: critical steps that one agent needs to reach a score, over those that the swarm needs.

    single, swarm: points (critical steps, score), one a budget, each averaged over the same tasks. None if either never
    reaches `target`: a ratio of runs of unequal quality is no speed-up.
    """
    alone, together = steps_to_reach(single, target), steps_to_reach(swarm, target)
    return alone / together if alone is not None and together else None


def parallelism(graph: Graph) -> float:
    """T1 / T∞: how many agents the run could keep busy on average; 1 for a run without steps."""
    return work(graph) / span(graph) if span(graph) else 1.0


def efficiency(graph: Graph, slots: int) -> float:
    """T1 / (p Tp): the share of the slots' time that is work. Above 1 only by the orchestrator, which needs no slot."""
    length = makespan(graph, slots)
    return work(graph) / (slots * length) if length else 1.0


def token_cost_ratio(swarm_tokens: int, single_tokens: int) -> float:
    """Tokens of the swarm over tokens of one agent on the same tasks; stands beside every speed-up."""
    if single_tokens <= 0 or swarm_tokens < 0:
        raise ValueError(f"a ratio of {swarm_tokens} to {single_tokens} tokens means nothing")
    return swarm_tokens / single_tokens


# --------------------------------------------------------------------------------------------- width and what is gained


def mean_width(graph: Graph, times: Schedule | None = None) -> float:
    """Subagents at work at once, averaged over the steps in which at least one is; 0 without subagents.

    Counted from overlap in time, so that subagents assigned one after the other have width 1, however many they are.
    """
    times = times or schedule(graph)
    edges: list[tuple[int, int]] = []
    for node in graph.nodes:
        if node.agent != ROOT and node.cost:
            edges += [(times.begins[node.name], 1), (times.ends[node.name], -1)]
    total = busy = running = previous = 0
    for now, change in sorted(edges):
        total += running * (now - previous)
        busy += (running > 0) * (now - previous)
        running, previous = running + change, now
    return total / busy if busy else 0.0


def without(graph: Graph, agents: Iterable[str]) -> Graph:
    """The run in which these agents take no steps; order and waits stay."""
    gone = set(agents)
    return Graph(tuple(replace(node, cost=0) if node.agent in gone else node for node in graph.nodes))


def inlined(graph: Graph, agent: str) -> Graph:
    """The run in which the parent does this subagent's steps itself: after the group that it joins, before the join.

    What waits for the subagent waits for other things too; the subagent's first node now waits for all of those that
    do not themselves need the subagent.
    """
    own = {node.name for node in graph.nodes if node.agent == agent}
    needs = set(own)  # everything that comes after the subagent has begun
    for node in graph.ordered:
        if needs.intersection(node.after):
            needs.add(node.name)
    joins = [node for node in graph.nodes if node.agent != agent and own.intersection(node.after)]
    earlier = tuple(dict.fromkeys(name for node in joins for name in node.after if name not in needs))
    return Graph(
        tuple(
            replace(node, after=tuple(dict.fromkeys((*node.after, *earlier))))
            if node.agent == agent and not own.intersection(node.after)
            else node
            for node in graph.nodes
        )
    )


def span_gain(graph: Graph, agent: str) -> int:
    """Steps by which the span would grow if the parent did the subagent's work itself; 0 if it won nothing.

    The difference that dropping the subagent makes (`without`) is 0 for all but the longest of a healthy group, so it
    cannot tell a useful subagent from a useless one; this difference can.
    """
    return span(inlined(graph, agent)) - span(graph)


# --------------------------------------------------------------------------------------------------- graphs from events


class _Agent:
    """One agent of the record while it is read: what its next node comes after, and the steps of that node so far."""

    def __init__(self, name: str, after: tuple[str, ...]):
        self.name, self.after = name, after
        self.cost = self.closed = 0

    def close(self) -> list[Node]:
        """The node that ends here, if any steps were taken since the last one."""
        if not self.cost:
            return []
        node = Node(f"{self.name}#{self.closed}", self.cost, self.after, self.name)
        self.closed, self.cost, self.after = self.closed + 1, 0, (node.name,)
        return [node]


def from_events(events: Iterable[Event]) -> Graph:
    """The graph of a recorded run, by its real spawn and join edges: joins need not be barriers.

    A step that was taken counts, whatever became of the agent. Raises GraphError for a record that speaks of an agent
    before its spawn, or spawns one twice.
    """
    nodes: list[Node] = []
    agents = {ROOT: _Agent(ROOT, ())}
    for event in sorted(events, key=lambda e: e.id):
        agent = agents.get(event.agent)
        if agent is None:
            raise GraphError(f"event {event.id}: agent {event.agent!r} was never spawned")
        if event.kind == "step":
            agent.cost += 1
        elif event.kind in ("spawn", "join"):
            nodes += agent.close()
            child = str(event.detail.get("child"))
            if event.kind == "spawn":
                if child in agents:
                    raise GraphError(f"event {event.id}: agent {child!r} is spawned twice")
                agents[child] = _Agent(child, agent.after)
            elif child not in agents:
                raise GraphError(f"event {event.id}: {event.agent!r} joins {child!r}, which was never spawned")
            else:
                nodes += agents[child].close()
                agent.after = tuple(dict.fromkeys((*agent.after, *agents[child].after)))
    for agent in agents.values():
        nodes += agent.close()
    return Graph(tuple(nodes))


def stages(events: Iterable[Event], agent: str = ROOT) -> list[Stage]:
    """The report's stages of one agent's run: a step of its own, and the subagents that it started in that step.

    A subagent that has subagents counts with its own critical steps, which the report, without nesting, leaves open.
    """
    steps: dict[str, int] = {ROOT: 0}
    groups: dict[str, dict[int, list[str]]] = {ROOT: {}}
    for event in sorted(events, key=lambda e: e.id):
        if event.kind == "spawn":
            child = str(event.detail.get("child"))
            steps.setdefault(child, 0)
            groups.setdefault(child, {})
            groups.setdefault(event.agent, {}).setdefault(event.step, []).append(child)
        elif event.kind == "step":
            steps[event.agent] = steps.get(event.agent, 0) + 1
    found: dict[str, list[Stage]] = {}
    for name in reversed(steps):  # a child is spawned after its parent, so it is done before it
        own = groups.get(name, {})
        length = max(steps[name], max(own, default=-1) + 1)
        lengths = [tuple(critical_steps(found[child]) for child in own.get(t, ())) for t in range(length)]
        found[name] = [Stage(int(t < steps[name]), group) for t, group in enumerate(lengths)]
    return found.get(agent, [])
