"""The live view: who runs, at what, and how much of the budget is left; hostile texts stay text."""

import io

from rich.console import Console

from kimi_jax.agents.budget import Budget
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.live import LiveView, PlainView
from kimi_jax.agents.swarm import Swarm
from tests.agents.scripts import brief, orchestrator, run, say, turn


def screens(briefs, config=SwarmConfig(max_parallel=2)):  # noqa: B008
    """What the terminal shows at each answer of a child, and at the end."""
    view, shown = LiveView(Budget(steps=50, cost=2.0)), []

    def screen():
        console = Console(file=io.StringIO(), width=120)
        console.print(view)
        return console.file.getvalue()

    async def child(request):
        shown.append(screen())
        if turn(request) == 0:
            return say("", ("read_output", {"number": 1, "offset": 0}))
        if "fail" in brief(request):
            raise RuntimeError("boom")
        return say("done")

    run(Swarm(orchestrator(briefs, child), config=config, observers=[view.observe]))
    return [*shown, screen()]


def test_live_view_shows_who_runs_at_what_and_what_is_left():
    *during, end = screens([f"count the sheep {i}" for i in range(4)])
    assert "2 running, 3 waiting" in during[0] or "1 running, 4 waiting" in during[0]
    assert "count the sheep 3" in during[0] and "waits for a slot" in during[0]
    assert any("asks the model" in screen for screen in during)
    assert "left: " in end and "39 steps" in end and "$2.00" in end
    assert "0 running, 0 waiting, 5 ok" in end and "11 steps, 1,320 tokens" in end


def test_live_view_counts_failures_and_survives_hostile_briefs():
    end = screens(["[bold red]fail\x1b[2J\n[/nothing]", "b"])[-1]
    assert "1 error, 2 ok" in end
    assert all("\x1b[2J" not in screen for screen in screens(["x\x1b[2J[/y]"]))


def test_live_view_is_bounded():
    assert all(len(screen.splitlines()) < 30 for screen in screens([f"t {i}" for i in range(25)]))


def test_plain_view_writes_a_line_for_a_beginning_and_an_end():
    lines = []

    async def child(request):
        return say("done")

    run(Swarm(orchestrator(["first\nsecond\x07"], child), observers=[PlainView(lines.append).observe]))
    assert lines == ["root/1.0: first second ", "root/1.0: ok after 1 steps", "root: ok after 3 steps"]
