"""`make swarm-demo` in small: the scripted researcher alone and as a swarm, on the real runtime, corpus and scorer."""

import re
import shutil
import subprocess
import sys

import anyio
import pytest

from kimi_jax.agents import critical, demo
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.corpus import Corpus
from kimi_jax.agents.events import Event, Usage
from kimi_jax.agents.families import write_corpus
from kimi_jax.agents.researcher import Researcher
from kimi_jax.agents.swarm import Swarm, replay
from tests.environment import REPO


@pytest.fixture(scope="module")
def task():
    return demo.question(items=4, distractors=30, countries=6)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    write_corpus(task, path / "corpus")
    return path


@pytest.fixture(scope="module")
def runs(task, folder):
    return demo.compare(task, Corpus(folder / "corpus"), folder, slots=2, latency=0.0)


def test_demo_swarm_needs_fewer_critical_steps_for_the_same_score(runs):
    alone, short, swarm = runs
    assert alone.score.item_f1 == swarm.score.item_f1 == 1 > short.score.item_f1 > 0
    assert short.result.critical_steps == swarm.result.critical_steps < alone.result.critical_steps
    assert set(swarm.result.outcomes.values()) == {"ok"} and len(swarm.result.outcomes) == 5
    assert set(alone.result.outcomes) == {"root"} == set(short.result.outcomes)
    assert len(swarm.result.sources) >= 4 * 3, "each row cites the sections that it was read in"


def test_demo_report_has_the_measures_of_the_records(runs, folder):
    lines = demo.report(runs).splitlines()
    for line, played in zip(lines[1:4], runs, strict=True):
        graph = critical.from_events(played.events)
        t1, span, steps, makespan = re.findall(r"(?<= )(\d+)(?= )", line.removeprefix(played.name))[:4]
        assert (int(t1), int(span)) == (critical.work(graph), critical.span(graph))
        assert (int(steps), int(makespan)) == (played.result.critical_steps, critical.makespan(graph, played.slots))
        page = (folder / f"{played.name.replace(' ', '_')}.html").read_text()
        assert f'"critical steps", "{steps}"' in page
    assert "at equal or better item F1" in lines[5]


def test_demo_runs_replay_without_model_and_tools(runs, folder):
    for played in runs:
        swarm, question = replay(folder / f"{played.name.replace(' ', '_')}.sqlite")
        assert anyio.run(swarm.run, question) == played.result
        swarm.close()


def test_researcher_says_what_the_documents_say(task, folder, tmp_path):
    """An altered document alters the answer: cells are read and not known."""
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    country, area = task.gold.rows[1][0], task.gold.columns.index("Area (sq km)")
    page = tmp_path / "corpus" / next(name for name in task.items[1].documents if "Geography" in name)
    text = page.read_text()
    page.write_text(re.sub(r"(?m)^Area, total: .*$", "Area, total: 1.5 million sq km", text))
    for config in (SwarmConfig(max_depth=0), SwarmConfig()):
        result = anyio.run(Swarm(Researcher(), Corpus(tmp_path / "corpus").tools(), config).run, task.question)
        row = next(line for line in result.answer.splitlines() if line.startswith(f"| {country} |"))
        assert row.split("|")[1 + area].strip() == "1500000"
        assert task.verify(result.answer).item_f1 == pytest.approx(19 / 20)


def test_researcher_looks_up_itself_what_a_subagent_did_not_bring(task, folder):
    class Faulty(Researcher):
        async def complete(self, request):
            if request.agent == "root/1.2":
                raise RuntimeError("boom")
            return await super().complete(request)

    swarm = Swarm(Faulty(), Corpus(folder / "corpus").tools())
    result = anyio.run(swarm.run, task.question)
    assert result.outcomes["root/1.2"] == "error" and result.outcomes["root"] == "ok"
    assert task.verify(result.answer).success == 1


def test_researcher_without_the_documents_leaves_cells_empty(task, tmp_path):
    (tmp_path / "other.txt").write_text("Nothing of use.")
    result = anyio.run(Swarm(Researcher(), Corpus(tmp_path).tools()).run, task.question)
    assert result.status == "ok" and task.verify(result.answer).item_f1 == 0


def test_new_tokens_are_those_that_no_earlier_turn_of_the_agent_had():
    def step(agent, prompt, answer):
        return Event(0, 0.0, agent, None, "step", usage=Usage(prompt, answer))

    # root: 10 + 5, then 25 of which 15 are known, and 5; its subagent: 7 + 1
    assert demo.new_tokens([step("root", 10, 5), step("a", 7, 1), step("root", 25, 5)]) == 15 + 8 + 15


def test_demo_command(tmp_path):
    line = [sys.executable, "-m", "kimi_jax.agents.demo", "--items=3", "--distractors=10", "--countries=3"]
    done = subprocess.run(
        [*line, "--latency=0", f"--out={tmp_path}"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    assert [len(re.findall(rf"^{name} +\d", done.stdout, re.MULTILINE)) for name in ("alone", "swarm")] == [1, 1]
    assert "python -m kimi_jax.agents.demo" in (REPO / "Makefile").read_text()
    names = ["alone.html", "alone_in_as_many_steps.html", "swarm.html"]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == names


@pytest.mark.slow
def test_demo_table_on_the_page_is_what_the_command_prints(tmp_path):
    """At its full size: every column of docs/swarm.md but the seconds, and the number of documents."""
    line = [sys.executable, "-m", "kimi_jax.agents.demo", "--latency=0", f"--out={tmp_path}"]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, check=True).stdout
    page = (REPO / "docs" / "swarm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(?:alone|swarm).*\$.*(?= +[\d.]+$)", done, re.MULTILINE)
    assert len(rows) == 3 and all(row.rstrip() in page for row in rows)
    assert re.search(r"^([\d,]+ )documents in", done, re.MULTILINE)[1] + "real documents" in page
    assert re.search(r"prefix cache: ([\d.]+)", done)[1] + " times the tokens of one agent" in page
