"""Subagents that a small model can play: what their tool gives, and the script whose conversations are learned from."""

import json

import anyio
import pytest

from kimi_jax.agents import finder, searcher
from kimi_jax.agents.events import ROOT
from kimi_jax.agents.finder import FAMILIES, Orchestrator, question
from kimi_jax.agents.orchestration import (
    SUBAGENT_PROMPT,
    SYSTEM_PROMPT,
    PlannedRun,
    conversations,
    play,
    settings,
    write_corpus,
)
from kimi_jax.agents.searcher import Searcher
from kimi_jax.agents.tools import Toolset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def search(corpus, **arguments):
    tools = Toolset.of(*searcher.tools(corpus))
    return anyio.run(tools.call, "search", json.dumps(arguments))


def played(corpus, family, reliability=1.0):
    asked = [question(family, i, 3) for i in range(6)]
    runs = [PlannedRun(each, Orchestrator(each, True), Searcher(reliability)) for each in asked]
    return play(runs, corpus, settings(100, 20, 256), searcher.tools)


def test_result_is_the_row_and_the_borders_of_one_country(corpus):
    lines = search(corpus, query="Ghana").text.splitlines()
    assert lines == ["Ghana | 238533", "Burkina Faso 602, Cote d'Ivoire 720, Togo 1098"]
    assert search(corpus, query="Cuba").text.splitlines()[0] == finder.row_of("Cuba")


def test_every_country_of_a_question_is_found_by_its_name_and_the_result_is_short(corpus):
    for country in sorted(finder.facts()):
        text = search(corpus, query=country).text
        assert text.splitlines()[0] == finder.row_of(country) and len(text) < searcher.MAX_RESULT, country


def test_query_that_is_no_country_gives_another_or_an_error_and_never_raises(corpus):
    assert " | " in search(corpus, query="border of Ghana").text
    assert search(corpus, query="").status in ("ok", "error")
    assert search(corpus, question="Ghana").status == "refused"


@pytest.mark.parametrize("family", FAMILIES)
def test_script_finds_the_row_of_every_brief(corpus, family):
    for run in played(corpus, family):
        assert run.item_f1 == 1.0
        assert all(row == finder.row_of(brief) for brief, row in finder.delivered(run.events))


def test_answer_without_a_row_is_none_and_nothing_depends_on_it(corpus):
    run = next(run for run in played(corpus, "wide", 0.5) if run.item_f1 < 1)
    rows = [row for _, row in finder.delivered(run.events)]
    assert "" in rows and any(rows)
    assert all(rows[number] for number in finder.cited(run.result.answer, len(rows)))


@pytest.mark.parametrize("brief", ["Atlantis", "longest border of Cuba", "longest border of Atlantis", ""])
def test_brief_without_a_row_has_none(brief):
    assert finder.row_of(brief) == ""


def test_conversations_are_those_of_both_parts(corpus):
    told = conversations(8, corpus, settings(14, 6, 256), 0.5, seed=0, subagents=True)
    assert [messages[0]["content"] for messages in told] == [SYSTEM_PROMPT, SUBAGENT_PROMPT] * 8
    alone = conversations(8, corpus, settings(14, 6, 256), 0.5, seed=0)
    assert [messages[0]["content"] for messages in alone] == [SYSTEM_PROMPT] * 8
    assert all(run.conversations[ROOT][-1]["role"] == "assistant" for run in played(corpus, "wide"))
