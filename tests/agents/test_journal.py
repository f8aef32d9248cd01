"""The journal: resume does not pay twice, replay is byte-identical or loud, and files of strangers are refused."""

import gc
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter

import anyio
import pytest

from kimi_jax.agents.budget import Budget
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.events import canonical, to_json
from kimi_jax.agents.journal import Journal, JournalError, ReplayMiss, read_run
from kimi_jax.agents.model import RateLimited, ScriptedModel
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import from_function
from tests.agents.scripts import brief, orchestrator, run, say, turn, virtual
from tests.environment import REPO

BRIEFS = [f"task {i}" for i in range(12)]


def lookup(word: str) -> str:
    """Looks a word up."""
    return f"{word}: " + "x" * 300


def model_with_faults(forbidden=False):
    """Children look something up and answer; one hangs, one crashes, one is refused first, one never."""
    refused = set()

    async def child(request):
        assert not forbidden, "a replay asked the model"
        number = int(brief(request).split()[-1])
        await anyio.sleep(0.01 * ((number * 7) % 5))
        if number == 3:
            await anyio.sleep_forever()
        if number == 4:
            raise RuntimeError("boom")
        if number == 5 and request.agent not in refused:
            refused.add(request.agent)
            raise RateLimited("slow down")
        if turn(request) == 0:
            return say("", ("lookup", {"word": brief(request)}), ("lookup", {"word": "same"}))
        return say(f"answer to {brief(request)}")

    return orchestrator(BRIEFS, child)


def swarm(path, mode, model, **options):
    config = SwarmConfig(max_parallel=4, child_timeout=5.0, backoff=0.01, **options)
    return Swarm(model, [from_function(lookup, max_chars=50)], config, path, mode)


def log(path):
    return [to_json(event) for event in canonical(read_run(path)[1])]


def test_replay_gives_the_same_event_log_byte_for_byte(tmp_path):
    path = tmp_path / "run.sqlite"
    recorded = run_real(swarm(path, "new", model_with_faults()))
    assert sorted(set(recorded.outcomes.values())) == ["error", "ok", "timeout"]
    events = []
    replaying = swarm(path, "replay", model_with_faults(forbidden=True))
    replaying._observers = (*replaying._observers, events.append)
    assert run_real(replaying) == recorded
    assert [to_json(event) for event in canonical(events)] == log(path)
    ends = [{e.agent: e.time for e in run if e.kind == "step"} for run in (events, read_run(path)[1])]
    assert ends[0] == pytest.approx(ends[1], abs=0.05), "a replay shows when things happened, not when it was made"


def run_real(swarm):
    """With real concurrency: threads of tools and timers of hundredths of seconds; only the hung child takes longer."""
    swarm.config = SwarmConfig(**{**vars(swarm.config), "child_timeout": 0.5})
    try:
        return anyio.run(swarm.run, "Q?")
    finally:
        swarm.close()


@pytest.mark.parametrize("change", ["prompt", "tool", "model"])
def test_replay_of_something_else_is_loud(tmp_path, change):
    path = tmp_path / "run.sqlite"
    run_real(swarm(path, "new", model_with_faults()))
    model = model_with_faults(forbidden=True)
    options = {"system_prompt": "Be brief."} if change == "prompt" else {}
    if change == "model":
        model.name = "another"
    other = swarm(path, "replay", model, **options)
    if change == "tool":
        other.tools = ()
    with pytest.raises((ReplayMiss, JournalError), match=r"did not|another run"):
        run_real(other)


def test_replay_key_distinguishes_equal_calls_by_occurrence_and_agent():
    journal = Journal()
    keys = [journal.next_key(agent, ["same"]) for agent in ("a", "a", "b")]
    assert len(set(keys)) == 3


def test_resume_runs_only_what_was_not_finished(tmp_path):
    path = tmp_path / "run.sqlite"
    asked = []

    def model(hanging):
        async def child(request):
            asked.append((request.agent, turn(request)))
            if hanging and brief(request) in ("task 2", "task 9"):
                await anyio.sleep(1000.0)
            return say("", ("lookup", {"word": "w"})) if turn(request) == 0 else say(f"answer to {brief(request)}")

        return orchestrator(BRIEFS, child)

    def make(mode, hanging):
        return Swarm(model(hanging), [virtual_lookup()], SwarmConfig(max_parallel=12), path, mode)

    first = make("new", True)

    async def interrupted():
        with anyio.move_on_after(100.0):
            await first.run("Q?")

    virtual(interrupted)
    first.close()
    assert sorted(first.outcomes.values()) == ["aborted"] * 3 + ["ok"] * 10
    asked.clear()
    second = make("resume", False)
    result = run(second)
    second.close()
    assert set(result.outcomes.values()) == {"ok"} and len(result.outcomes) == 13
    assert sorted(asked) == [("root/1.2", 0), ("root/1.2", 1), ("root/1.9", 0), ("root/1.9", 1)]
    assert second.model.asked == 4 + 1, "what was not finished, and the orchestrator's last turn"
    # the whole record is there again, times go on where the first attempt was, and everything is counted once
    _, events = read_run(path)
    assert result.usage.tokens == sum(e.usage.tokens for e in events) == 120 * (3 + 2 * 12)
    assert max(e.time for e in events) == 0.0, "nothing was answered after second 0 of the first attempt"
    third = make("resume", False)
    asked.clear()
    assert run(third) == result and third.model.asked == 0


def virtual_lookup():
    async def lookup(word: str) -> str:
        """Looks a word up, without a thread, which a virtual clock does not know."""
        return f"{word} found"

    return from_function(lookup)


def test_resume_counts_what_was_spent_against_the_budget(tmp_path):
    path = tmp_path / "run.sqlite"

    async def child(request):
        return say("done")

    config = SwarmConfig(budget=Budget(steps=8))
    first = Swarm(orchestrator(BRIEFS, child), (), config, path)
    result = run(first)
    first.close()
    assert result.steps == 8
    second = Swarm(orchestrator(BRIEFS, child), (), config, path, "resume")
    assert run(second).steps == 8 and second.model.asked == 0


def test_resume_after_kill_9_pays_nothing_twice(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import anyio
from kimi_jax.agents.swarm import Swarm
from tests.agents.scripts import brief, orchestrator, say
async def child(request):
    if brief(request) == "task 7":
        await anyio.sleep(0.1)
        print("hanging", flush=True)
        await anyio.sleep(1000)
    return say("done")
swarm = Swarm(orchestrator([f"task {{i}}" for i in range(12)], child), journal=sys.argv[1])
anyio.run(swarm.run, "Q?")
"""
    path = tmp_path / "run.sqlite"
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "hanging\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    asked = []

    async def child(request):
        asked.append(brief(request))
        return say("done")

    second = Swarm(orchestrator(BRIEFS, child), journal=path, mode="resume")
    assert set(run(second).outcomes.values()) == {"ok"}
    assert "task 7" in asked and "task 0" not in asked
    second.close()


def test_journal_is_refused_where_it_does_not_fit(tmp_path):
    path = tmp_path / "run.sqlite"
    with pytest.raises(JournalError, match="there is no journal"):
        Journal(path, "resume")
    first = Journal(path)
    with pytest.raises(JournalError, match="exists"):
        Journal(path)
    with pytest.raises(JournalError, match="in use"):
        Journal(path, "resume")
    first.describe({"question": "Q?"}, {})
    first.close()
    again = Journal(path, "resume")
    with pytest.raises(JournalError, match="another run: its question"):
        again.describe({"question": "R?"}, {})


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\0" * 200])
def test_journal_of_a_stranger_is_an_error_not_a_crash(tmp_path, content):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(JournalError, match="no journal"):
        read_run(path)


@pytest.mark.parametrize("line", ["{}", "[" * 100_000, '"x"'])
def test_journal_with_hostile_events_is_an_error(tmp_path, line):
    path = tmp_path / "run.sqlite"
    journal = Journal(path)
    journal.close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO events VALUES (0, 0, ?)", (line,))
    db.commit()
    db.close()
    with pytest.raises(JournalError, match="no journal"):
        read_run(path)


def test_journal_that_cannot_be_written_ends_the_run(tmp_path):
    async def child(request):
        swarm.journal._db.execute("DROP TABLE calls")  # as a full disk would: the next write raises
        return say("done")

    swarm = Swarm(orchestrator(["t"], child), journal=tmp_path / "run.sqlite")
    with pytest.raises(sqlite3.Error):
        run(swarm)


def test_journal_in_use_can_be_read(tmp_path):
    path = tmp_path / "run.sqlite"
    counts = []

    async def child(request):
        await anyio.sleep(1.0)
        counts.append(len(read_run(path)[1]))
        return say("done")

    run(Swarm(orchestrator(BRIEFS, child), journal=path, config=SwarmConfig(max_parallel=1)))
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1]
    assert json.loads(log(path)[0])["kind"] == "start"


def test_journal_scripted_model_is_counted():
    async def answer(request):
        return say("end")

    model = ScriptedModel(answer)
    run(Swarm(model))
    assert model.asked == 1


def test_journal_and_children_leave_no_file_open(tmp_path):
    """After a run with a child that hangs, one that crashes and two that are refused."""

    def open_files():
        gc.collect()  # other tests of this process may have left files to the collector
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        found = [os.readlink(link) for link in links if os.path.islink(link)]  # the listing itself is closed by now
        return Counter(re.sub(r":\[\d+\]", "", name) for name in found)  # a socket or pipe has another number each time

    run_real(swarm(tmp_path / "warm.sqlite", "new", model_with_faults()))  # what libraries open once
    before = open_files()
    run_real(swarm(tmp_path / "run.sqlite", "new", model_with_faults()))
    assert not open_files() - before
    assert not [name for name in before if str(tmp_path) in name]
