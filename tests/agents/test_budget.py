"""Budgets: enforced before a step, inherited by children, never exceeded by any tree of agents."""

import json
import random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.agents.budget import Budget, BudgetExceeded, Ledger, parse_budget
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.events import Usage
from kimi_jax.agents.model import Prices, RateLimited, ScriptedModel
from kimi_jax.agents.swarm import Swarm
from tests.agents.scripts import assign, create, orchestrator, results, run, run_events, say, turn


def random_tree(seed):
    """A model whose agents spawn, look, fail and answer at random, and use up to all tokens that they may."""
    rng = random.Random(seed)
    bytes_a_token = rng.choice([3, 4])  # of one tokenizer: a count that changes between requests has no bound

    async def answer(request):
        await anyio.sleep(rng.random())
        if rng.random() < 0.1:
            raise rng.choice([RateLimited("slow"), RuntimeError("boom")])
        prompt = len(json.dumps(list(request.messages))) // bytes_a_token
        usage = Usage(min(prompt, 10**6), rng.randint(0, request.max_tokens))
        names = {tool["name"] for tool in request.tools}
        if "assign_task" in names and turn(request) == 0:
            return say("", *create("worker"), usage=usage)
        if "assign_task" in names and rng.random() < 0.7:
            return say("so far", *assign(*(f"task {rng.random()}" for _ in range(rng.randint(1, 4)))), usage=usage)
        return say("end", usage=usage) if rng.random() < 0.5 else say("on", ("read_output", {}), usage=usage)

    return ScriptedModel(answer)


LIMITS = st.builds(
    Budget,
    critical_steps=st.one_of(st.just(float("inf")), st.integers(0, 20)),
    steps=st.one_of(st.just(float("inf")), st.integers(0, 60)),
    tokens=st.one_of(st.just(float("inf")), st.integers(0, 200_000)),
    cost=st.one_of(st.just(float("inf")), st.floats(0, 2.0)),
    seconds=st.one_of(st.just(float("inf")), st.floats(0.1, 20.0)),
)


@settings(max_examples=60, deadline=None)
@given(LIMITS, st.integers(0, 10**6))
def test_budget_is_never_exceeded_by_a_random_tree(budget, seed):
    config = SwarmConfig(
        max_parallel=4, max_depth=2, orchestrator_steps=6, subagent_steps=5, max_tokens=1000, budget=budget,
        prices=Prices(5.0, 20.0), child_timeout=30.0, max_attempts=3,
    )  # fmt: skip
    result, events = run_events(random_tree(seed), config)
    steps = [event for event in events if event.kind == "step"]
    assert len(steps) == result.steps <= budget.steps
    assert result.critical_steps <= budget.critical_steps
    assert sum(event.usage.tokens for event in steps) == result.usage.tokens <= budget.tokens
    assert sum(event.usage.cost for event in steps) == pytest.approx(result.usage.cost)
    assert result.usage.cost <= budget.cost * (1 + 1e-9)  # sums of floats in two orders
    assert max(event.time for event in events) <= budget.seconds
    assert {event.agent for event in events if event.kind == "end"} == set(result.outcomes)


def test_budget_of_critical_steps_is_not_shared_by_children_that_run_together():
    def child_steps(n):
        async def child(request):
            return say("on", ("read_output", {})) if turn(request) < n - 1 else say("done")

        return child

    config = SwarmConfig(budget=Budget(critical_steps=10))
    result = run(Swarm(orchestrator(["a", "b", "c"], child_steps(7)), config=config))
    # 2 steps up to the assignment, 7 of the longest child (21 in all), 1 to answer: exactly what there is
    assert set(result.outcomes.values()) == {"ok"} and (result.critical_steps, result.steps) == (10, 24)
    result = run(Swarm(orchestrator(["a", "b", "c"], child_steps(8)), config=config))
    # one step too many: each child is told to answer at its last step instead, and does
    assert result.status == "ok" and result.critical_steps == 10
    assert {status for name, status in result.outcomes.items() if name != "root"} == {"budget"}


def test_budget_leaves_the_orchestrator_a_step_to_answer():
    async def child(request):
        return say("done")

    result = run(Swarm(orchestrator([f"t {i}" for i in range(9)], child), config=SwarmConfig(budget=Budget(steps=6))))
    assert result.steps == 6 and result.status == "ok"
    assert sorted(result.outcomes.values()) == ["budget"] * 6 + ["ok"] * 4
    assert "All done" in result.answer


def test_budget_of_seconds_ends_children_and_the_queue_and_still_answers():
    async def child(request):
        await anyio.sleep(30.0)
        return say("done")

    config = SwarmConfig(max_parallel=2, budget=Budget(seconds=110.0))
    result, events = run_events(orchestrator([f"t {i}" for i in range(9)], child), config)
    counts = sorted(status for name, status in result.outcomes.items() if name != "root")
    assert counts == ["budget"] * 2 + ["not_started"] + ["ok"] * 6
    assert result.status == "ok" and max(e.time for e in events) == pytest.approx(99.0)


def test_budget_refuses_before_the_step_not_after():
    async def answer(request):
        raise AssertionError("asked")

    model = ScriptedModel(answer)
    for budget in (Budget(steps=0), Budget(critical_steps=0), Budget(tokens=100), Budget(seconds=0)):
        assert run(Swarm(model, config=SwarmConfig(budget=budget))).status == "budget"
    assert model.asked == 0


def test_budget_of_tokens_shortens_the_answer_that_is_asked_for():
    asked = []

    async def answer(request):
        asked.append(request.max_tokens)
        return say("end")

    run(Swarm(ScriptedModel(answer), config=SwarmConfig(budget=Budget(tokens=3000), system_prompt="x" * 500)))
    assert 256 <= asked[0] < 2500


def test_budget_of_a_failed_request_is_given_back():
    ledger = Ledger(Budget(steps=1, tokens=10), lambda: 0.0)
    ledger.reserve(10, 0.0)
    with pytest.raises(BudgetExceeded, match="steps"):
        ledger.reserve(1, 0.0)
    ledger.release(10, 0.0)
    ledger.reserve(10, 0.0)
    ledger.settle(10, 0.0, Usage(2, 3))
    assert (ledger.steps, ledger.tokens) == (1, 5)


def test_budget_of_children_is_that_of_their_parent():
    root = Ledger(Budget(steps=5, cost=1.0), lambda: 0.0)
    child, other = (root.group().child() for _ in range(2))
    for _ in range(4):
        child.reserve(1, 0.1)
    with pytest.raises(BudgetExceeded, match="steps"):
        child.reserve(1, 0.1)  # the fifth is the parent's
    with pytest.raises(BudgetExceeded, match="steps"):
        other.group().child().reserve(1, 0.1)
    root.reserve(1, 0.1)
    assert root.critical_steps == 1 and child.critical_steps == 4


def test_budget_on_the_command_line():
    assert parse_budget("steps=40, tokens=1e6,cost=2.5") == Budget(steps=40, tokens=1e6, cost=2.5)
    for text in ("steps", "steps=x", "steps=-1", "steps=nan", "fun=3", "steps=1,steps=2"):
        with pytest.raises(ValueError):
            parse_budget(text)


def test_budget_shows_in_the_result_that_the_parent_gets():
    async def child(request):
        return say("on", ("read_output", {}))

    seen = []
    model = orchestrator(["t"], child)

    async def spy(request):
        if request.agent == "root":
            seen.extend(results(request)[1:])
        return await model.complete(request)

    run(Swarm(ScriptedModel(spy), config=SwarmConfig(subagent_steps=3)))
    assert json.loads(seen[0])["status"] == "budget" and json.loads(seen[0])["steps"] == 3
