"""Rewards of an orchestrator (docs/rl.md section 11): what earns r_parallel and r_finish, and what does not."""

import json

import pytest

from kimi_jax.agents import detectors, finder
from kimi_jax.agents.finder import Finder, Orchestrator, question
from kimi_jax.agents.model import Call, Response, ScriptedModel
from kimi_jax.agents.orchestration import PlannedRun, play, settings, write_corpus
from kimi_jax.rl import parl

ISLANDS = ["Cuba", "Malta", "Fiji", "Iceland"]  # rows of no chain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rewards(played, width=3):
    return parl.rewards(played.events, played.item_f1, finder.used(played.events), width)


def spam(briefs, answer="none"):
    """An orchestrator that spawns whatever pays, whatever it is asked."""

    async def complete(request):
        if any(message["role"] == "tool" for message in request.messages):
            return Response(answer)
        arguments = [json.dumps({"agent": finder.FINDER, "prompt": brief}) for brief in briefs]
        calls = tuple(Call(f"functions.assign_task:{i}", "assign_task", a) for i, a in enumerate(arguments))
        return Response("" if calls else answer, calls)

    return ScriptedModel(complete)


def played(family, orchestrator, corpus, count=6, items=4):
    asked = [question(family, i, items) for i in range(count)]
    return play([PlannedRun(q, orchestrator(q), Finder()) for q in asked], corpus, settings(40, 20, 256))


def episodes(runs):
    """As the detectors see them, in the order of a training."""
    found = []
    for run in runs:
        terms = rewards(run)
        found.append(detectors.episode(run.events, run.asked.oracle, (terms.parallel, terms.finish, terms.perf)))
    return found


def test_serial_delegation_earns_no_r_parallel(corpus):
    for family in finder.FAMILIES:
        for run in played(family, lambda q: Orchestrator(q, parallel=False), corpus):
            assert rewards(run).parallel == 0.0
            assert rewards(run).finish == 1.0


def test_r_parallel_of_independent_lines_is_whole_and_of_chains_nothing(corpus):
    assert all(rewards(run).parallel == 1.0 for run in played("wide", lambda q: Orchestrator(q, True), corpus))
    assert all(rewards(run).parallel == 0.0 for run in played("chain", lambda q: Orchestrator(q, True), corpus, 6, 2))


def test_subagents_whose_results_are_ignored_earn_no_r_parallel(corpus):
    for run in played("wide", lambda q: spam(ISLANDS), corpus):
        terms = rewards(run)
        assert terms.parallel == 0.0 and terms.perf == 0.0
        assert terms.finish == 1.0  # which alone can be hacked, so it is annealed too


def test_naive_reading_pays_subagents_whose_results_are_ignored(corpus):
    (run,) = played("chain", lambda q: spam(ISLANDS), corpus, 1, 2)
    terms = parl.rewards(run.events, run.item_f1, finder.used(run.events), 3, every=True)
    assert terms.parallel == 1.0 and terms.perf == 0.0


def test_r_finish_counts_subagents_that_found_something(corpus):
    (run,) = played("wide", lambda q: spam(["Ghana", "no such country"]), corpus, count=1)
    assert rewards(run).finish == 0.5
    (run,) = played("wide", lambda q: spam([]), corpus, count=1)
    assert rewards(run) == parl.Rewards(0.0, 0.0, 0.0)


def test_total_is_the_outcome_alone_once_the_weights_are_annealed():
    terms = parl.Rewards(0.5, 1.0, 1.0)
    assert terms.total(0.3, 0.2) == pytest.approx(1.0)
    assert terms.total(0.0, 0.0) == 0.5


def test_width_below_two_is_refused(corpus):
    (run,) = played("wide", lambda q: Orchestrator(q, True), corpus, count=1)
    with pytest.raises(ValueError, match="at least 2"):
        rewards(run, width=1)


def test_detectors_fire_on_collapse_and_spam_and_not_on_healthy_runs(corpus):
    healthy = episodes(played("wide", lambda q: Orchestrator(q, True), corpus))
    healthy += episodes(played("chain", lambda q: Orchestrator(q, False), corpus, 6, 2))
    collapsed = episodes(played("wide", lambda q: Orchestrator(q, False), corpus))
    idle = episodes(played("chain", lambda q: spam([]), corpus, 6, 2))
    hacked = idle + episodes(played("chain", lambda q: spam(ISLANDS, "0 1 2 3"), corpus, 6, 2))
    assert detectors.serial_collapse(collapsed).alarm
    assert detectors.spurious_parallelism(hacked).alarm
    assert not detectors.serial_collapse(healthy).alarm
    assert not detectors.spurious_parallelism(healthy).alarm
