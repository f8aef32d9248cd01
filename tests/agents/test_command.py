"""python -m kimi_jax.swarm, in processes of its own, against an endpoint: answer, Ctrl-C, resume, replay, page."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest

from kimi_jax.agents.journal import read_run
from tests.agents.endpoint import endpoint, message
from tests.environment import REPO

CAPITALS = {"Ghana": "Accra", "Peru": "Lima", "Nepal": "Kathmandu"}
TASKS = [("assign_task", {"agent": "geographer", "prompt": f"Find the capital of {name}."}) for name in CAPITALS]


class WideModel:
    """Orchestrator and subagents of a wide question. Requests of tasks in `hanging` wait until they are let go."""

    def __init__(self, hanging=()):
        self.requests, self.hanging = [], set(hanging)
        self.arrived, self.let_go = threading.Event(), threading.Event()

    def __call__(self, body):
        messages = body["messages"]
        turn = sum(m["role"] == "assistant" for m in messages)
        results = [m["content"] for m in messages if m["role"] == "tool"]
        brief = messages[1]["content"]
        self.requests.append(brief)
        if "capital of" in brief:
            name = brief.split()[-1].strip(".")
            if turn == 0:
                return message("", ("search", {"queries": [f"capital {name}"], "count": 1}))
            if name in self.hanging:
                self.arrived.set()
                self.let_go.wait(60)
            found = re.search(r"\[(\S+)\] (\w+): (\w+) is the capital", results[0])
            return message(f"{name}: {found[3]} [{found[1]}]")
        if turn == 0:
            create = {"name": "geographer", "system_prompt": "You find capitals."}
            return message("", ("create_subagent", create))
        if turn == 1:
            return message("", *TASKS)
        return message(" ".join(json.loads(result)["summary"] for result in results[1:]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [{"title": name, "text": f"{capital} is the capital of {name}."} for name, capital in CAPITALS.items()]
    (folder / "countries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(*arguments, **options):
    line = [sys.executable, "-m", "kimi_jax.swarm", *map(str, arguments)]
    return subprocess.Popen(line, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_command_answers_with_sources_then_replays_without_a_model(corpus, tmp_path):
    run, page = tmp_path / "run.sqlite", tmp_path / "page.html"
    with endpoint(WideModel()) as url:
        status, out, err = finish(
            command("Which capitals?", f"--model={url}", f"--corpus={corpus}", f"--journal={run}", "--prices=1,2")
        )
    assert status == 0, err
    assert out.splitlines() == [
        "Ghana: Accra [countries.jsonl#1] Peru: Lima [countries.jsonl#2] Nepal: Kathmandu [countries.jsonl#3]",
        "", "Sources:", "  [countries.jsonl#1]", "  [countries.jsonl#2]", "  [countries.jsonl#3]",
    ]  # fmt: skip
    assert "3 subagents, 9 steps (5 critical), 540 tokens, $0.0006" in err
    assert "root/1.2: Find the capital of Nepal." in err and "root/1.2: ok after 2 steps" in err
    again = finish(command(f"--replay={run}", "--quiet"))
    assert again[:2] == (0, out)
    assert finish(command("view", run, f"--out={page}"))[0] == 0
    assert "Which capitals?" in page.read_text() and '"critical steps", "5"' in page.read_text()


def test_command_interrupted_says_what_ended_how_and_resumes_without_paying_twice(corpus, tmp_path):
    run = tmp_path / "run.sqlite"
    model = WideModel(hanging=["Peru"])
    with endpoint(model) as url:
        arguments = (f"--model={url}", f"--corpus={corpus}", "--max_parallel=2")
        process = command("Which capitals?", f"--journal={run}", *arguments)
        assert model.arrived.wait(60)
        while "root/1.2: ok" not in (line := process.stderr.readline()):  # the two others are over
            assert line, "it ended before it was interrupted"
        process.send_signal(signal.SIGINT)
        status, out, err = finish(process)
        assert (status, out) == (130, "")
        assert "finished: root/1.0, root/1.2" in err and "aborted: root/1.1, root" in err and "not started: none" in err
        assert f"--resume={run}" in err
        model.let_go.set()
        model.hanging.clear()
        before = len(model.requests)
        status, out, err = finish(command(f"--resume={run}", *arguments))
    assert status == 0, err
    assert out.startswith("Ghana: Accra [countries.jsonl#1] Peru: Lima [countries.jsonl#2] Nepal")
    assert model.requests[before:] == ["Find the capital of Peru.", "Which capitals?"]
    meta, events = read_run(run)
    assert meta["question"] == "Which capitals?" and sum(e.kind == "step" for e in events) == 9


def test_command_serves_the_page_on_this_machine_only(corpus, tmp_path):
    run = tmp_path / "run.sqlite"
    with endpoint(WideModel()) as url:
        assert finish(command("Q?", f"--model={url}", f"--corpus={corpus}", f"--journal={run}"))[0] == 0
    process = command("view", run)
    try:
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert "Swarm trace" in answer.read().decode()
        foreign = urllib.request.Request(address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(foreign)
    finally:
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 0


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["Q?"], "which model?"),
        (["--model=http://127.0.0.1:9/v1"], "give the question"),
        (["Q?", "--model=http://127.0.0.1:9/v1", "--budget=fun=3"], "'fun=3' is no limit"),
        (["--replay=/nonexistent"], "no journal"),
        (["view"], "view needs one journal"),
    ],
)
def test_command_says_what_is_wrong_with_its_settings(arguments, reason, monkeypatch, capsys, tmp_path):
    from absl import flags
    from absl.testing import flagsaver

    from kimi_jax import swarm

    monkeypatch.chdir(tmp_path)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["swarm"])
    values = dict(a.lstrip("-").split("=", 1) for a in arguments if a.startswith("--"))
    words = [a for a in arguments if not a.startswith("--")]
    with flagsaver.flagsaver(**values), pytest.raises(SystemExit) as ended:
        swarm.main(["swarm", *words])
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert not os.listdir(tmp_path), "nothing was written"
