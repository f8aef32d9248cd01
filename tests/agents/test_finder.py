"""Short questions for small orchestrators: gold tables from real text, scripted subagents, answers that cite calls."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kimi_jax.agents import finder
from kimi_jax.agents.finder import FAMILIES, Finder, Orchestrator, question
from kimi_jax.agents.model import Call, Response, ScriptedModel
from kimi_jax.agents.orchestration import PlannedRun, play, settings, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def runs(family, parallel, count=4, items=3, reliability=1.0):
    asked = [question(family, i, items) for i in range(count)]
    return [PlannedRun(each, Orchestrator(each, parallel), Finder(reliability)) for each in asked]


@pytest.mark.parametrize("family", FAMILIES)
def test_question_has_its_dependencies_by_family(family):
    asked = question(family, 5, 4)
    named = [line.after is None for line in asked.lines]
    assert all(named) == (family == "wide")
    assert named[0] and (family != "chain" or not any(named[1:]))
    assert {"wide": asked.oracle == 4, "chain": asked.oracle == 1, "mixed": 1 <= asked.oracle <= 4}[family]
    assert len({row[0] for row in asked.gold.rows}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_finder_gives_every_row_from_the_text(family, corpus):
    for parallel in (True, False):
        assert [p.item_f1 for p in play(runs(family, parallel), corpus, settings(100, 20, 256))] == [1.0] * 4


def test_critical_steps_fall_where_lines_are_independent(corpus):
    def steps(family, parallel):
        return [p.result.critical_steps for p in play(runs(family, parallel), corpus, settings(100, 20, 256))]

    assert all(a < b for a, b in zip(steps("wide", True), steps("wide", False), strict=True))
    assert steps("chain", True) == steps("chain", False)


def test_critical_steps_never_pass_their_limit(corpus):
    for limit in (2, 5, 9):
        played = play(runs("mixed", False), corpus, settings(limit, 20, 256))
        assert all(p.result.critical_steps <= limit for p in played)


def test_finder_gives_up_on_some_briefs_and_the_others_are_unchanged(corpus):
    good = play(runs("wide", True, 8), corpus, settings(100, 20, 256))
    weak = play(runs("wide", True, 8, reliability=0.5), corpus, settings(100, 20, 256))
    pairs = [
        pair for a, b in zip(good, weak, strict=True)
        for pair in zip(finder.results(a.events), finder.results(b.events), strict=True)
    ]  # fmt: skip
    assert all(second in (first, "") for first, second in pairs)
    assert 0 < sum(second == "" for _, second in pairs) < len(pairs)


@given(st.one_of(st.text(max_size=400), st.text("0123 \nx", max_size=700)), st.integers(0, 5))
@example("1" + " " * 400 + "x", 5)
@example("0 " * 400, 5)
def test_cited_numbers_are_calls_whatever_the_answer(answer, count):
    numbers = finder.cited(answer, count)
    assert len(set(numbers)) == len(numbers) and all(0 <= n < count for n in numbers)


def test_answer_that_cites_what_was_not_asked_for_loses_precision(corpus):
    asked = question("wide", 0, 2)
    other = question("wide", 1, 2).lines[0].country
    script = Orchestrator(asked, True)

    async def complete(request):
        if any(message["role"] == "tool" for message in request.messages):
            return Response("0 1 2")
        response = await script.complete(request)
        more = Call("functions.assign_task:2", "assign_task", json.dumps({"agent": "finder", "prompt": other}))
        return Response("", (*response.calls, more))

    (played,) = play([PlannedRun(asked, ScriptedModel(complete), Finder())], corpus, settings(100, 20, 256))
    score = finder.verify(asked, played.events)
    assert score.item_recall == 1.0 and score.item_precision == pytest.approx(2 / 3)
    assert finder.used(played.events) == ["root/0.0", "root/0.1", "root/0.2"]


@pytest.mark.parametrize("answer", ["none", "0 1", "zero one", "[0] [1]", "", "9999 9999", "1 " * 1000])
def test_verify_scores_any_answer(answer, corpus):
    async def complete(request):
        return Response(answer)

    asked = question("wide", 0, 2)
    (played,) = play([PlannedRun(asked, ScriptedModel(complete), Finder())], corpus, settings(100, 20, 256))
    assert played.item_f1 == 0.0 and finder.used(played.events) == []
