"""The trace page: its numbers, its critical path, hostile texts, and the page itself in a real browser."""

import json
import re

import anyio
import pytest

from kimi_jax.agents import critical, trace
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.journal import read_run
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import from_function
from tests.agents import browser
from tests.agents.scripts import brief, orchestrator, run, say, turn

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def big_run(path, agents=99, steps=24):
    """A journal of `agents` subagents with about two events a step; their lengths differ."""

    async def lookup(word: str) -> str:
        """Looks a word up."""
        await anyio.sleep(0.3)
        return f"{word}: {HOSTILE}"

    async def child(request):
        number = int(brief(request).split()[1])
        await anyio.sleep(0.5 + number % 7 / 10)
        if number == 13 and turn(request) == 5:
            raise RuntimeError("boom")
        if turn(request) < steps - number % 5:
            return say(f"step {turn(request)} {HOSTILE}", ("lookup", {"word": f"w{turn(request)}"}))
        return say(f"answer of {number} {HOSTILE}")

    briefs = [f"item {i} {HOSTILE}" for i in range(agents)]
    swarm = Swarm(orchestrator(briefs, child), [from_function(lookup)], SwarmConfig(max_parallel=16), path)
    run(swarm, f"Which of 99 items? {HOSTILE}")
    swarm.close()
    return read_run(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return big_run(tmp_path_factory.mktemp("trace") / "run.sqlite")


def test_trace_measures_are_those_of_the_run(recorded):
    meta, events = recorded
    shown = {name: value for name, value, _ in trace.measures(events, meta["max_parallel"])}
    graph = critical.from_events(events)
    assert shown["work T1"] == str(sum(e.kind == "step" for e in events)) == str(critical.work(graph))
    assert shown["critical steps"] == shown["span T∞"] == str(3 + 25), "joins are barriers"
    assert int(shown["makespan, 16 slots"]) > 28
    assert shown["tokens"] == f"{100 * critical.work(graph):,} + {20 * critical.work(graph):,}"


def test_trace_critical_path_is_a_chain_of_steps_as_long_as_the_span(recorded):
    _, events = recorded
    on_path = trace.critical_events(events)
    steps = [e for e in events if e.id in on_path]
    assert len(steps) == critical.span(critical.from_events(events))
    assert [e.clock for e in steps] == sorted(e.clock for e in steps)
    assert len({e.agent for e in steps}) == 2, "the orchestrator, and one of the longest subagents"


def test_trace_spans_hang_together(recorded):
    """A child's events lie between its parent's spawn and join, on both clocks, whatever ran beside it."""
    _, events = recorded
    spawns = {e.detail["child"]: e for e in events if e.kind == "spawn"}
    joins = {e.detail["child"]: e for e in events if e.kind == "join"}
    for event in events:
        if event.parent:
            spawn, join = spawns[event.agent], joins[event.agent]
            assert spawn.agent == join.agent == event.parent and event.stage == spawn.step == join.step
            assert spawn.clock < event.clock < join.clock and spawn.time <= event.time <= join.time


def test_trace_page_needs_nothing_from_elsewhere_and_escapes_everything(recorded):
    text = trace.page(*recorded)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text.replace("src=x onerror", ""))
    assert "</script><script>document" not in text and "default-src 'none'" in text
    data = json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert HOSTILE in data["question"], "it is still there, as text"


def test_trace_page_of_a_run_that_goes_on(tmp_path):
    path = tmp_path / "run.sqlite"
    pages = []

    async def child(request):
        await anyio.sleep(1.0)
        pages.append(trace.page_data(*read_run(path)))
        return say("done")

    run(Swarm(orchestrator(["a", "b"], child), journal=path))
    assert [agent["status"] for agent in pages[0]["agents"]] == ["running"] * 3


@pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium-headless-shell")
def test_trace_page_in_a_browser(recorded, tmp_path, record_property):
    meta, events = recorded
    page = tmp_path / "trace.html"
    page.write_text(trace.page(meta, events), encoding="utf-8")
    assert len(events) >= 100 * 45
    with browser.Browser(page.as_uri()) as tab:
        record_property("milliseconds until the page was drawn", tab.wait_ready())
        assert tab.evaluate("document.title") == "Swarm trace", "no text of a stranger ran"
        assert HOSTILE in tab.evaluate("document.getElementById('question').textContent")
        assert tab.evaluate("document.querySelectorAll('img').length") == 0
        # the first row is the orchestrator; a click on the fourth opens the third subagent's transcript
        box = tab.evaluate("(({left, top}) => [left, top])(document.getElementById('canvas').getBoundingClientRect())")
        tab.click(box[0] + 400, box[1] + 22 + 3.5 * 18)
        assert tab.evaluate("document.querySelector('#transcript h2').textContent") == "root/1.2 (worker)"
        assert "answer of 2" in tab.evaluate("document.getElementById('transcript').textContent")
        assert tab.evaluate("document.querySelectorAll('.turn').length") == 2 * 22 + 1
        # something is drawn, in the colour of the critical path too
        colours = tab.evaluate(
            "(() => { const d = pen.getImageData(0, 0, canvas.width, canvas.height).data, seen = {};"
            "for (let i = 0; i < d.length; i += 4) {"
            "const c = `${d[i]},${d[i + 1]},${d[i + 2]}`; seen[c] = (seen[c] || 0) + 1; } return seen; })()"
        )
        assert colours.get("200,68,47", 0) > 100 and colours.get("74,127,181", 0) > 1000
        tab.evaluate("document.getElementById('in').click()")
        assert tab.evaluate("to - from") == pytest.approx(tab.evaluate("end") / 2)
        # down to the last of a hundred rows
        tab.evaluate("scroll.scrollTop = 1e6; choose(99)")
        assert tab.evaluate("document.querySelector('#transcript h2').textContent") == "root/1.98 (worker)"
