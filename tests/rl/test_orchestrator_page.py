"""The page about two orchestrators: the same held-out questions, a script beside them, hostile text escaped."""

import pytest

from kimi_jax.agents.finder import Finder, Orchestrator, question
from kimi_jax.agents.model import Response, ScriptedModel
from kimi_jax.agents.orchestration import PlannedRun, play, settings, write_corpus
from kimi_jax.rl import orchestrator_page
from kimi_jax.rl.orchestrator_page import ALONE, NAMES


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two wide questions, by scripts: one task in a turn; an answer at once, in HTML; all tasks at once."""

    async def hostile(request):
        return Response("<script>alert(1)</script>")

    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    asked = [question("wide", i, 3) for i in range(2)]
    models = {
        ALONE: lambda q: Orchestrator(q, False), "before": lambda q: ScriptedModel(hostile),
        "after": lambda q: Orchestrator(q, True),
    }  # fmt: skip
    return {
        "wide": {
            who: play([PlannedRun(q, models[who](q), Finder()) for q in asked], corpus, settings(40, 20, 256))
            for who in NAMES
        }
    }


def test_scores_name_what_an_answer_costs(runs):
    alone, before, after = orchestrator_page.scores(runs)
    assert [row["model"] for row in (alone, before, after)] == list(NAMES)
    assert alone["item_f1"] == after["item_f1"] == 1.0 and before["item_f1"] == 0.0
    assert alone["critical_steps"] > after["critical_steps"] > before["critical_steps"]
    assert alone["width"] == 1.0 and after["width"] > 2 and before["subagents"] == 0
    assert alone["tokens"] > 0 and alone["n"] == 2


def test_page_shows_every_answer_and_escapes_it(runs):
    text = orchestrator_page.page(orchestrator_page.scores(runs), runs)
    assert text.count("item F1 1.00") == 4 and text.count("item F1 0.00") == 2
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_workdir_of_another_kind_is_refused(tmp_path):
    with pytest.raises((ValueError, OSError)):
        orchestrator_page.compare(str(tmp_path), str(tmp_path), 2)
