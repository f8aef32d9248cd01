"""The robustness sweep: the simulator against arithmetic, and against the real runtime."""

import json
import math
import random

import anyio
import pytest

from experiments.swarm_robustness import run
from experiments.swarm_robustness.simulate import FAULTS, POLICIES, TIME_BUDGET, WORK_BUDGET, Run, simulate
from kimi_jax.agents import critical
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.events import ROOT
from kimi_jax.agents.families import Knobs, make
from kimi_jax.agents.model import Response, ScriptedModel
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import from_function
from tests.agents.scripts import assign, brief, create, results, say, turn, virtual

WIDE = make("wide", 0, Knobs(items=6))


def test_sequential_time_is_the_work_of_the_task():
    for family in ("wide", "trap", "mixed", "longdoc"):
        task = make(family, 1, Knobs(items=6))
        found = simulate(task, "sequential")
        assert found.time == found.work == found.critical_steps == task.work and found.score.success == 1


def test_parallel_time_without_faults_is_the_makespan_of_its_own_record():
    for slots in (1, 2, 4, 8):
        for family in ("wide", "mixed"):
            task = make(family, 2, Knobs(items=6))
            found = simulate(task, "parallel", slots=slots)
            assert found.time == critical.makespan(critical.from_events(found.events), slots)
            assert found.work == critical.work(critical.from_events(found.events)) and found.peak <= slots
            assert found.score.success == 1
    # one turn that assigns, the longest item, and the answer
    assert simulate(WIDE, "parallel").time == 1 + max(item.steps for item in WIDE.items) + 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_fault_ends_within_its_budgets_and_alike_twice(fault, policy):
    for family in ("wide", "trap"):
        task = make(family, 3, Knobs(items=6))
        clean = simulate(task, policy, slots=3)
        for level in FAULTS[fault][1]:
            found = simulate(task, policy, fault=fault, level=level, slots=3)
            assert found == simulate(task, policy, fault=fault, level=level, slots=3)
            assert found.time <= TIME_BUDGET * task.work and found.work <= WORK_BUDGET * task.work
            assert found.peak <= 3
            ends = [event.agent for event in found.events if event.kind == "end"]
            spawned = [event.detail["child"] for event in found.events if event.kind == "spawn"]
            assert sorted(ends) == sorted([ROOT, *spawned]), "every subagent ends once"
        first = simulate(task, policy, fault=fault, level=FAULTS[fault][1][0], slots=3)
        assert (first.time, first.score) == (clean.time, clean.score), "the first level is no fault"


def test_visible_failures_cost_time_and_never_the_answer():
    for fault in ("garbage", "crash"):
        found = simulate(WIDE, "parallel", fault=fault, level=1)
        assert found.score.success == 1 and found.time > WIDE.work


def test_wrong_results_cost_the_answer_unless_they_are_checked():
    scores = [simulate(WIDE, "parallel", fault="wrong", level=x).score.item_f1 for x in FAULTS["wrong"][1]]
    assert scores == sorted(scores, reverse=True) and scores[0] == 1 > scores[-1]
    assert simulate(WIDE, "checked", fault="wrong", level=1).score.success == 1


def test_wrong_link_of_a_chain_costs_every_later_row():
    task = make("trap", 0, Knobs(items=6))
    state = Run(task, "parallel", "wrong", 0, 8, random.Random(0))
    state.found = {i: i != 2 for i in range(6)}
    assert task.verify(state.answer()).row_f1 == pytest.approx(2 / 6)


def test_injected_order_costs_work_and_is_obeyed_within_the_budget():
    found, clean = (simulate(WIDE, "parallel", fault="injected", level=x) for x in (1, 0))
    extra = len({e.agent for e in found.events}) - len({e.agent for e in clean.events})
    assert extra == 60 and clean.work < found.work <= WORK_BUDGET * WIDE.work


# ---------------------------------------------------------------------------------------------------- the real runtime


def play_on_the_runtime(task, policy: str, fault: str, level: float, slots: int):
    """The same scripts on the real runtime under a clock that jumps; a model call takes one second, a tool none.

    Gives (seconds, events).
    """
    plan = Run(task, policy, fault, level, slots, random.Random(f"{task.name}/0"))
    fates: dict[str, tuple[int, str]] = {}

    def decisions():
        """Yields the orchestrator's turns; is sent the contents of the results of the last one."""
        while len(plan.found) < len(task.items):
            ready = [
                i
                for i, item in enumerate(task.items)
                if i not in plan.found and all(j in plan.found for j in item.after)
            ]
            assigned = plan.choose(ready)
            if assigned:
                names = [f"item{i} try{plan.tries.get(i, 0)}" for i in assigned]
                for i, name in zip(assigned, names, strict=True):
                    child = plan.start(i, name)
                    fates[name] = child.steps, child.fate
                contents = yield [*create(f"w{len(fates)}"), *assign(*names, agent=f"w{len(fates)}")]
                for i, content in zip(assigned, contents[1:], strict=True):
                    envelope = json.loads(content)
                    if envelope["status"] == "ok" and "row" in envelope["summary"]:
                        plan.found[i] = "right" in envelope["summary"]
            for i in ready:
                if i not in assigned:
                    for _ in range(task.items[i].steps):
                        yield [("look", {})]
                    plan.found[i] = True

    script = decisions()

    async def root(request) -> Response:
        calls = next(script, None) if turn(request) == 0 else send(request)
        await anyio.sleep(1)
        return say("the table") if calls is None else say("", *calls)

    def send(request):
        last = max(i for i, message in enumerate(request.messages) if message["role"] == "assistant")
        contents = [m["content"] for m in request.messages[last + 1 :] if m["role"] == "tool"]
        assert contents == results(request)[-len(contents) :]
        try:
            return script.send(contents)
        except StopIteration:
            return None

    async def answer(request) -> Response:
        if request.agent == "root":
            return await root(request)
        steps, fate = fates[brief(request)]
        if fate == "error" and turn(request) == steps:
            raise RuntimeError("crash")
        await anyio.sleep(1)
        if turn(request) + 1 < steps or fate == "error":
            return say("", ("look", {}))
        return say({"ok": "the right row", "wrong": "another row"}.get(fate, "%%%"))

    async def look() -> str:
        """Looks."""
        return "seen"

    events: list = []
    config = SwarmConfig(max_parallel=slots, subagent_steps=40, orchestrator_steps=1000, child_timeout=1e6)
    swarm = Swarm(ScriptedModel(answer), [from_function(look)], config, observers=[events.append])

    async def main():
        await swarm.run("Q?")
        return anyio.current_time()

    return virtual(main), events


@pytest.mark.parametrize(
    ("family", "policy", "fault", "level", "slots"),
    [
        ("wide", "sequential", "wrong", 0, 4),
        ("wide", "parallel", "wrong", 0, 2),
        ("wide", "parallel", "wrong", 0.6, 8),
        ("mixed", "parallel", "crash", 0.6, 4),
        ("trap", "parallel", "garbage", 0.6, 4),
        ("mixed", "half", "garbage", 0.3, 2),
        ("wide", "half", "loop", 0.3, 8),
        ("longdoc", "parallel", "straggler", 5, 3),
    ],
)
def test_simulator_agrees_with_the_real_runtime(family, policy, fault, level, slots):
    task = make(family, 4, Knobs(items=6))
    simulated = simulate(task, policy, fault=fault, level=level, slots=slots)
    seconds, events = play_on_the_runtime(task, policy, fault, level, slots)
    graph = critical.from_events(events)
    assert critical.work(graph) == simulated.work
    assert critical.critical_steps(critical.stages(events)) == simulated.critical_steps
    assert critical.makespan(graph, slots) == critical.makespan(critical.from_events(simulated.events), slots)
    assert seconds == pytest.approx(simulated.time)


def test_gain_is_a_geometric_mean():
    tasks, alone = run.tasks_of("wide", 4, range(3))
    setting = next(s for s in run.settings() if s["policy"] == "parallel" and s["slots"] == 8)
    row = run.measure(setting, tasks, alone)
    ratios = [other.time / simulate(task, "parallel").time for task, other in zip(tasks, alone, strict=True)]
    assert row["gain"] == pytest.approx(math.prod(ratios) ** (1 / 3), abs=1e-5)
    assert run.measure({**setting, "policy": "sequential"}, tasks, alone)["gain"] == 1


def test_limit_of_steps_stops_a_loop_and_what_is_longer_than_it():
    longest = max(item.steps for item in WIDE.items)
    for level, limit in ((1, longest), (0, longest - 1)):
        found = simulate(WIDE, "parallel", fault="loop", level=level, child_limit=limit)
        assert "timeout" in {event.status for event in found.events if event.kind == "end"}
        assert max(sum(e.kind == "step" for e in found.events if e.agent == name) for name in
                   {e.agent for e in found.events if e.parent}) == limit  # fmt: skip
    clean = simulate(WIDE, "parallel", child_limit=longest)
    assert {event.status for event in clean.events if event.kind == "end"} == {"ok"}
