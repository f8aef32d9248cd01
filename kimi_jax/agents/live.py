"""What a swarm is doing, in the terminal: who runs, at what, for how long, and how much of the budget is left."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kimi_jax.agents.budget import Budget
from kimi_jax.agents.events import ROOT, Event, Usage

MAX_ROWS = 20  # agents that are shown


@dataclass
class _Row:
    configuration: str
    brief: str
    since: float
    doing: str = "waits for a slot"
    steps: int = 0
    tokens: int = 0
    running: bool = False


class LiveView:
    """Watches events (`observe`) and renders itself. The counts are of the whole run."""

    def __init__(self, budget: Budget):
        self._budget, self._began = budget, time.monotonic()
        self._rows: dict[str, _Row] = {}
        self._ended: dict[str, int] = {}
        self._usage, self._steps = Usage(), 0

    def observe(self, event: Event) -> None:
        """Takes the next event."""
        if event.kind == "spawn":
            detail = event.detail
            self._rows[detail["child"]] = _Row(detail["agent"], detail["brief"], time.monotonic())
        elif event.kind == "start":
            row = self._rows.setdefault(event.agent, _Row("", event.detail["brief"], 0.0))
            row.running, row.since, row.doing = True, time.monotonic(), "asks the model"
        elif event.kind == "step":
            self._usage, self._steps = self._usage + event.usage, self._steps + 1
            row = self._rows[event.agent]
            row.steps, row.tokens = row.steps + 1, row.tokens + event.usage.tokens
            calls = [f"{call['name']} {call['arguments']}" for call in event.detail.get("calls", ())]
            row.doing = "; ".join(calls) or "answers"
        elif event.kind in ("tool", "join"):
            self._rows[event.agent].doing = "asks the model"
        elif event.kind == "end":
            self._rows.pop(event.agent, None)
            self._ended[event.status] = self._ended.get(event.status, 0) + 1

    def __rich__(self) -> Group:
        rows = sorted(self._rows.copy().items(), key=lambda item: (not item[1].running, item[0] != ROOT))
        table = Table(box=None, pad_edge=False, expand=True)
        for name, width in (("agent", 18), ("s", 6), ("steps", 5), ("tokens", 8)):
            table.add_column(name, width=width, no_wrap=True, justify="left" if name == "agent" else "right")
        table.add_column("task", ratio=1, no_wrap=True)
        table.add_column("doing", ratio=1, no_wrap=True)
        for name, row in rows[:MAX_ROWS]:
            label = name if name == ROOT else f"{name.rsplit('/', 1)[-1]} {row.configuration}"
            cells = (label, f"{time.monotonic() - row.since:.0f}", str(row.steps), f"{row.tokens:,}")
            style = "" if row.running else "dim"
            table.add_row(*map(escape, cells), escape(_line(row.brief)), escape(_line(row.doing)), style=style)
        parts: list[Text | Table] = [Text(self.summary(), style="bold"), table]
        if len(rows) > MAX_ROWS:
            parts.append(Text(f"... and {len(rows) - MAX_ROWS} more", style="dim"))
        return Group(*parts)

    def summary(self) -> str:
        """One line: counts of agents, time, what was spent, and what is left."""
        running = sum(row.running for row in list(self._rows.values()))
        ended = ", ".join(f"{count} {status}" for status, count in sorted(self._ended.items()))
        spent = [f"{time.monotonic() - self._began:.0f} s", f"{self._steps} steps", f"{self._usage.tokens:,} tokens"]
        if self._usage.cost:
            spent.append(f"${self._usage.cost:.2f}")
        left = self._left()
        counts = f"{running} running, {len(self._rows) - running} waiting{f', {ended}' if ended else ''}"
        return f"{counts} | {', '.join(spent)}{f' | left: {left}' if left else ''}"

    def _left(self) -> str:
        budget = self._budget
        known = (
            (budget.seconds - (time.monotonic() - self._began), "{:.0f} s"),
            (budget.steps - self._steps, "{:.0f} steps"),
            (budget.tokens - self._usage.tokens, "{:,.0f} tokens"),
            (budget.cost - self._usage.cost, "${:.2f}"),
        )
        return ", ".join(form.format(max(value, 0)) for value, form in known if value != float("inf"))


class PlainView:
    """The same for a file or a pipe: `write` gets a line when an agent begins or ends."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write

    def observe(self, event: Event) -> None:
        """Takes the next event."""
        if event.kind == "spawn":
            self._write(f"{event.detail['child']}: {_line(event.detail['brief'])}")
        elif event.kind == "end":
            self._write(f"{event.agent}: {event.status} after {event.step} steps")


def _line(text: str) -> str:
    """A text of a stranger in one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:200])


def console() -> Console:
    """Where the view goes: standard error, so that the answer alone is on standard output."""
    return Console(stderr=True)
