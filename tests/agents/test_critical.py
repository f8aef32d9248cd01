"""Work, span, makespan and critical steps: against the formula, networkx, a simulator step by step, and by hand."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents import critical
from kimi_jax.agents.critical import Graph, GraphError, Node, Stage
from kimi_jax.agents.events import ROOT, Event

networkx = pytest.importorskip("networkx")


@st.composite
def graphs(draw, max_nodes: int = 12, agents: tuple[str, ...] = (ROOT, "a", "b", "c")) -> Graph:
    """Any directed graph without cycles, its nodes in any order."""
    n = draw(st.integers(0, max_nodes))
    nodes = []
    for i in range(n):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        cost, agent = draw(st.integers(0, 7)), draw(st.sampled_from(agents))
        nodes.append(Node(f"n{i}", cost, tuple(f"n{j}" for j in sorted(after)), agent))
    return Graph(tuple(draw(st.permutations(nodes))))


def random_stages(rng: random.Random) -> list[Stage]:
    return [
        Stage(rng.randint(0, 3), tuple(rng.randint(0, 20) for _ in range(rng.randint(0, 9))))
        for _ in range(rng.randint(1, 8))
    ]


def longest_path_of_networkx(graph: Graph) -> int:
    g = networkx.DiGraph()
    g.add_nodes_from(["end", *(node.name for node in graph.nodes)])
    for node in graph.nodes:  # an edge carries the cost of the node that it leaves
        g.add_edge(node.name, "end", weight=node.cost)
    cost = {node.name: node.cost for node in graph.nodes}
    g.add_weighted_edges_from((name, node.name, cost[name]) for node in graph.nodes for name in node.after)
    return networkx.dag_longest_path_length(g)


def test_critical_steps_of_2000_fork_joins_are_their_span():
    rng = random.Random(0)
    for _ in range(2000):
        run = random_stages(rng)
        assert critical.critical_steps(run) == critical.span(critical.fork_joins(run))


def test_span_is_the_longest_path_of_networkx_for_2000_random_graphs():
    rng = random.Random(1)
    for _ in range(2000):
        n = rng.randint(1, 25)
        nodes = [
            Node(f"n{i}", rng.randint(0, 9), tuple(f"n{j}" for j in range(i) if rng.random() < 0.2)) for i in range(n)
        ]
        rng.shuffle(nodes)
        graph = Graph(tuple(nodes))
        assert critical.span(graph) == longest_path_of_networkx(graph)


@given(graphs())
def test_span_equals_networkx_and_the_path_is_as_long(graph):
    path = critical.critical_path(graph)
    by_name = {node.name: node for node in graph.nodes}
    assert critical.span(graph) == longest_path_of_networkx(graph) == sum(by_name[name].cost for name in path)
    assert all(earlier in by_name[later].after for earlier, later in itertools.pairwise(path))


@given(graphs(), st.integers(1, 5))
def test_makespan_is_within_the_bounds_of_greedy_scheduling(graph, slots):
    work, span = critical.subagent_work(graph), critical.span(graph)
    length = critical.makespan(graph, slots)
    assert max(span, work / slots) <= length <= work / slots + span


@given(graphs(agents=("a", "b")), st.integers(1, 5))
def test_makespan_is_within_grahams_bound_when_every_node_needs_a_slot(graph, slots):
    work, span = critical.work(graph), critical.span(graph)
    length = critical.makespan(graph, slots)
    best = max(work / slots, span)  # no schedule is shorter
    assert length <= work / slots + (1 - 1 / slots) * span + 1e-9
    assert length <= (2 - 1 / slots) * best + 1e-9


@given(graphs(max_nodes=8), st.integers(1, 3))
def test_makespan_never_runs_more_than_its_slots_or_before_a_predecessor(graph, slots):
    times = critical.schedule(graph, slots)
    by_name = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        assert times.ends[node.name] - times.begins[node.name] == node.cost
        assert all(times.ends[name] <= times.begins[node.name] for name in node.after)
    for step in range(times.makespan):
        busy = [name for name in times.begins if times.begins[name] <= step < times.ends[name]]
        assert sum(by_name[name].agent != ROOT for name in busy) <= slots


@given(graphs())
def test_makespan_without_a_limit_is_the_span(graph):
    assert critical.makespan(graph) == critical.span(graph)
    assert critical.makespan(graph, len(graph.nodes) + 1) == critical.span(graph)


@given(graphs(agents=("a", "b", "c")))
def test_makespan_with_one_slot_is_the_work(graph):
    assert critical.makespan(graph, 1) == critical.work(graph)


def test_makespan_comes_in_waves_when_children_queue():
    run = [Stage(1, (4,) * 9), Stage(1)]
    graph = critical.fork_joins(run)
    assert critical.span(graph) == 6
    assert {p: critical.makespan(graph, p) for p in (1, 2, 4, 9)} == {1: 38, 2: 22, 4: 14, 9: 6}  # 2 + ceil(9/p) x 4


def test_async_joins_are_shorter_than_the_stage_formula():
    """The orchestrator starts a child of 12 steps, does two more rounds, and awaits the first child last."""
    nodes = (
        Node("m0", 1),
        Node("a", 12, ("m0",), "a"),
        Node("m1", 1, ("m0",)),
        Node("b", 9, ("m1",), "b"),
        Node("m2", 1, ("m1", "b")),
        Node("c", 8, ("m2",), "c"),
        Node("m3", 1, ("m2", "c", "a")),
    )
    stages = [Stage(1, (12,)), Stage(1, (9,)), Stage(1, (8,)), Stage(1)]
    assert critical.critical_steps(stages) == 33
    assert critical.span(Graph(nodes)) == 21
    assert critical.critical_path(Graph(nodes)) == ("m0", "m1", "b", "m2", "c", "m3")


def test_graph_refuses_what_is_none():
    for nodes, message in (
        ((Node("a", 1), Node("a", 2)), "one name"),
        ((Node("a", 1, ("b",)),), "does not have"),
        ((Node("a", 1, ("b",)), Node("b", 1, ("a",))), "circle"),
        ((Node("a", 1, ("a",)),), "circle"),
        ((Node("a", -1),), "0 or more"),
    ):
        with pytest.raises(GraphError, match=message):
            Graph(nodes)
    with pytest.raises(ValueError, match="at least one slot"):
        critical.makespan(Graph(()), 0)


# ------------------------------------------------------------------------------------------------------------ speed-ups


def test_speedups_and_token_ratio_by_hand():
    graph = critical.fork_joins([Stage(1, (4, 4, 4, 4)), Stage(1)])
    assert critical.work(graph) == 18 and critical.span(graph) == 6
    assert critical.parallelism(graph) == 3
    assert critical.efficiency(graph, 2) == 18 / (2 * 10)
    assert critical.token_cost_ratio(6000, 1000) == 6
    single, swarm = [(10, 0.2), (40, 0.5), (80, 0.7)], [(6, 0.3), (10, 0.5), (16, 0.69)]
    assert critical.speedup_at_quality(single, swarm, 0.5) == 4
    assert critical.speedup_at_quality(single, swarm, 0.7) is None, "the swarm never gets there"
    with pytest.raises(ValueError):
        critical.token_cost_ratio(1, 0)
    assert critical.parallelism(Graph(())) == critical.efficiency(Graph(()), 3) == 1


def test_width_counts_overlap_not_subagents():
    together = critical.fork_joins([Stage(1, (5, 5, 5))])
    one_a_turn = critical.fork_joins([Stage(1, (5,)), Stage(1, (5,)), Stage(1, (5,))])
    assert critical.mean_width(together) == 3
    assert critical.mean_width(one_a_turn) == 1
    assert critical.mean_width(together, critical.schedule(together, 1)) == 1
    assert critical.mean_width(critical.fork_joins([Stage(4)])) == 0


def test_span_gain_is_zero_for_serial_delegation_and_not_for_a_group():
    group = critical.fork_joins([Stage(1, (5, 5, 5)), Stage(1)])
    serial = critical.fork_joins([Stage(1, (5,)), Stage(1, (5,)), Stage(1)])
    assert [critical.span_gain(group, a) for a in group.subagents] == [5, 5, 5]
    assert [critical.span_gain(serial, a) for a in serial.subagents] == [0, 0]
    # dropping one of three equal children shortens nothing, though each is useful
    assert critical.span(critical.without(group, ["sub0.0"])) == critical.span(group)


@given(graphs())
def test_span_gain_is_never_negative_and_never_more_than_the_subagents_work(graph):
    for agent in graph.subagents:
        own = sum(node.cost for node in graph.nodes if node.agent == agent)
        assert critical.span_gain(graph, agent) >= 0
        assert critical.span(critical.without(graph, [agent])) <= critical.span(graph)
        assert critical.span(graph) - critical.span(critical.without(graph, [agent])) <= own


# --------------------------------------------------------------------------------------------------------------- events


class Recorder:
    """Writes the record that the runtime would write, kind by kind."""

    def __init__(self):
        self.events: list[Event] = []
        self.steps: dict[str, int] = {}

    def add(self, agent: str, kind: str, **detail):
        index = self.steps.get(agent, 0)
        if kind == "step":
            self.steps[agent] = index + 1
        step = index if kind in ("step", "start", "end") else index - 1
        self.events.append(Event(len(self.events), 0.0, agent, None, kind, step=step, detail=detail))

    def spend(self, agent: str, steps: int):
        for _ in range(steps):
            self.add(agent, "step")


def record_of(stages: list[Stage]) -> list[Event]:
    """Barrier joins: all children of a step are awaited before the next one."""
    r = Recorder()
    for t, stage in enumerate(stages):
        r.spend(ROOT, stage.main)
        children = [f"{ROOT}/{t}.{i}" for i in range(len(stage.subagents))]
        for child in children:
            r.add(ROOT, "spawn", child=child)
        for child, steps in zip(children, stage.subagents, strict=True):
            r.spend(child, steps)
            r.add(child, "end")
        for child in children:
            r.add(ROOT, "join", child=child)
    return r.events


def test_from_events_gives_the_graph_of_barrier_joins():
    rng = random.Random(2)
    for _ in range(300):
        run = [Stage(1, stage.subagents) for stage in random_stages(rng)]
        events = record_of(run)
        graph, plain = critical.from_events(events), critical.fork_joins(run)
        assert critical.stages(events) == run
        for measure in (critical.work, critical.subagent_work, critical.span, critical.mean_width):
            assert measure(graph) == measure(plain)
        assert critical.span(graph) == critical.critical_steps(critical.stages(events))
        assert critical.makespan(graph, 3) == critical.makespan(plain, 3)


def test_from_events_follows_joins_that_are_no_barriers():
    r = Recorder()
    r.spend(ROOT, 1)
    r.add(ROOT, "spawn", child="root/0.0")
    r.spend(ROOT, 2)  # goes on without waiting
    r.spend("root/0.0", 7)
    r.add(ROOT, "join", child="root/0.0")
    r.spend(ROOT, 1)
    graph = critical.from_events(r.events)
    assert critical.span(graph) == 1 + 7 + 1 and critical.work(graph) == 11
    assert critical.critical_steps(critical.stages(r.events)) == 11, "the formula adds what ran beside the child"


def test_from_events_measures_nested_swarms_and_what_failed():
    r = Recorder()
    r.spend(ROOT, 1)
    for child in ("root/0.0", "root/0.1", "root/0.2"):
        r.add(ROOT, "spawn", child=child)
    r.spend("root/0.0", 2)
    for grandchild in ("root/0.0/1.0", "root/0.0/1.1"):
        r.add("root/0.0", "spawn", child=grandchild)
    r.spend("root/0.0/1.0", 5)
    r.spend("root/0.0/1.1", 3)
    r.spend("root/0.1", 4)  # crashes after four steps, which were spent; root/0.2 never gets a slot
    for grandchild in ("root/0.0/1.0", "root/0.0/1.1"):
        r.add("root/0.0", "join", child=grandchild)
    for child in ("root/0.0", "root/0.1", "root/0.2"):  # root/0.0 ends right after its joins, without another step
        r.add(ROOT, "join", child=child)
    r.spend(ROOT, 1)
    graph = critical.from_events(r.events)
    assert critical.work(graph) == 1 + 2 + 5 + 3 + 4 + 1
    assert critical.span(graph) == 1 + (2 + 5) + 1
    assert critical.stages(r.events) == [Stage(1, (7, 4, 0)), Stage(1)]
    assert critical.stages(r.events, "root/0.0") == [Stage(1), Stage(1, (5, 3))]


def test_from_events_refuses_a_record_that_contradicts_itself():
    for events in (
        [Event(0, 0.0, "stranger", None, "step")],
        [Event(0, 0.0, ROOT, None, "join", detail={"child": "x"})],
        [Event(i, 0.0, ROOT, None, "spawn", detail={"child": "x"}) for i in range(2)],
    ):
        with pytest.raises(GraphError, match="event"):
            critical.from_events(events)


def test_thousand_nodes_in_a_row_are_no_recursion():
    graph = Graph(tuple(Node(f"n{i}", 1, (f"n{i - 1}",) if i else ()) for i in range(5000)))
    assert critical.span(graph) == critical.makespan(graph, 1) == len(critical.critical_path(graph)) == 5000
