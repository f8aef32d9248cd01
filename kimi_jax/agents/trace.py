"""The trace page: one self-contained HTML file with who ran when, the critical path, transcripts, tokens and cost.

Nothing of it is fetched from elsewhere. Texts of models and tools are hostile: they reach the page as JSON in which `<`
is escaped, are put into it as text, and a Content-Security-Policy allows no script but the page's own.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from kimi_jax.agents import critical
from kimi_jax.agents.events import ROOT, Event, Usage

MAX_TEXT = 4000  # characters of one text on the page; the journal has all of it


def page(meta: dict[str, Any], events: Sequence[Event]) -> str:
    """The page of one run. Raises critical.GraphError for a record that makes no sense."""
    folder = resources.files("kimi_jax.agents")
    text, style, script = (folder.joinpath(f"trace.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    data = json.dumps(page_data(meta, events), ensure_ascii=False).replace("<", "\\u003c")
    # what is hostile comes last: nothing is replaced in it
    for name, value in (("POLICY", policy), ("STYLE", style), ("SCRIPT", script), ("DATA", data)):
        text = text.replace(f"@{name}@", value)
    return text


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page_data(meta: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """What the page's script gets: see `trace.js`."""
    spawns = {str(event.detail.get("child")): event for event in events if event.kind == "spawn"}
    agents = [_agent(name, own, spawns.get(name)) for name, own in _by_agent(events).items()]
    on_path = critical_events(events)
    for agent in agents:
        for turn in agent["turns"]:
            turn["critical"] = turn.pop("id") in on_path
    root = next((agent for agent in agents if agent["name"] == ROOT), None)
    slots = meta.get("max_parallel")
    failed = sum(agent["status"] != "ok" for agent in agents)
    return {
        "question": _shortened(str(meta.get("question", ""))),
        "summary": f"{root['status'] if root else 'running'} · {_count(len(agents), 'agent')}, {failed} not ok · "
        f"model {str(meta.get('model', '?'))[:100]}",
        "measures": measures(events, slots if isinstance(slots, int) and slots > 0 else None),
        "end": max((event.time for event in events), default=0.0),
        "agents": agents,
    }


def measures(events: Sequence[Event], slots: int | None) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of what the head of the page shows."""
    graph = critical.from_events(events)
    usage = sum((event.usage for event in events), Usage())
    work, span = critical.work(graph), critical.span(graph)
    found = [
        ("work T1", str(work), "steps of all agents together"),
        ("span T∞", str(span), "steps on the longest path: no number of slots makes the run shorter"),
        ("T1 / T∞", f"{critical.parallelism(graph):.2f}", "agents that the run could keep busy on average"),
    ]
    if slots:
        makespan = str(critical.makespan(graph, slots))
        found.append((f"makespan, {_count(slots, 'slot')}", makespan, "steps when so many subagents run at a time"))
    steps = critical.critical_steps(critical.stages(events))
    return [
        *found,
        ("critical steps", str(steps), "of the report: for each stage, main steps and the longest subagent's"),
        ("time", f"{max((event.time for event in events), default=0.0):.1f} s", "from the first event to the last"),
        ("tokens", f"{usage.prompt_tokens:,} + {usage.completion_tokens:,}", "of prompts, and of answers"),
        ("cost", f"${usage.cost:.4f}", "by the prices that the run was given"),
    ]


def critical_events(events: Sequence[Event]) -> set[int]:
    """Ids of the step events that lie on the critical path."""
    path = set(critical.critical_path(critical.from_events(events)))
    nodes: dict[str, list[int]] = {}  # agent -> [nodes that are closed, steps of the open one], as `from_events` counts
    found = set()
    for event in sorted(events, key=lambda e: e.id):
        state = nodes.setdefault(event.agent, [0, 0])
        if event.kind == "step":
            state[1] += 1
            if f"{event.agent}#{state[0]}" in path:
                found.add(event.id)
        elif event.kind in ("spawn", "join") and state[1]:
            nodes[event.agent] = [state[0] + 1, 0]
    return found


def _by_agent(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Events of each agent; children follow their parent, in the order of their spawns."""
    own: dict[str, list[Event]] = {}
    for event in events:
        own.setdefault(event.agent, []).append(event)
        if event.kind == "spawn":
            own.setdefault(str(event.detail.get("child")), [])
    places = {name: [[int(n) for n in part.split(".") if n.isdigit()] for part in name.split("/")] for name in own}
    return {name: own[name] for name in sorted(own, key=places.__getitem__)}


def _agent(name: str, own: Sequence[Event], spawn: Event | None) -> dict[str, Any]:
    start = next((e for e in own if e.kind == "start"), None)
    end = next((e for e in own if e.kind == "end"), None)
    begin = spawn or start
    usage = sum((e.usage for e in own), Usage())
    status = end.status if end else "running"
    facts = [
        status,
        _count(sum(e.kind == "step" for e in own), "step"),
        f"{usage.tokens:,} tokens",
        f"${usage.cost:.4f}",
    ]
    if start and end:
        facts.append(f"{start.duration:.2f} s queued, {end.duration:.2f} s running")
    return {
        "name": name,
        "depth": name.count("/"),
        "agent": str(begin.detail.get("agent", "")) if begin else "",
        "brief": _shortened(str(begin.detail.get("brief", ""))) if begin else "",
        "spawn": begin.time if begin else 0.0,
        "start": start.time if start else None,
        "end": end.time if end else max((e.time for e in own), default=0.0),
        "status": status,
        "facts": " · ".join(facts),
        "summary": _shortened(str(end.detail.get("summary", ""))) if end else "",
        "turns": [_turn(e) for e in own if e.kind in ("step", "tool")],
    }


def _turn(event: Event) -> dict[str, Any]:
    detail = event.detail
    if event.kind == "step":
        calls = [f"{call['name']}({call['arguments']})" for call in detail.get("calls", ())]
        texts = [detail.get("reasoning", ""), detail.get("text", ""), *calls]
    else:
        texts = [str(detail.get("arguments", "")), str(detail.get("result", ""))]
    tokens = f"{event.usage.prompt_tokens:,} + {event.usage.completion_tokens:,} tokens" if event.usage.tokens else ""
    return {
        "id": event.id,
        "kind": event.kind,
        "name": str(detail.get("name", "")),
        "step": event.step,
        "time": event.time,
        "duration": event.duration,
        "status": event.status,
        "tokens": tokens,
        "texts": [_shortened(str(text)) for text in texts if text],
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text)} characters)"
