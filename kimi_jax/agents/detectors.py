"""Detectors of what goes wrong when parallelism is rewarded: serial collapse, spurious parallelism, finish hacking.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.2, which names the first two as what its rewards have to prevent.
A detector reads a window of episodes, in the order of training, and says whether it warns and by which signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kimi_jax.agents.critical import from_events, mean_width, parallelism, span_gain
from kimi_jax.agents.events import ROOT, Event

WIDE, CHAIN = 2.0, 1.2  # T1 / T∞ of a task: above the first it can be done in parallel, up to the second it cannot
COLLAPSED = 1.2  # a width or a parallelism up to this is one agent after the other
TOO_WIDE = 1.5  # a width above this on a chain is more than the task can use
DUPLICATE = 0.8  # Jaccard index of the word sets of two briefs, above which they are one brief
RISE = 0.05  # a change of a reward over a window that is more than noise


@dataclass(frozen=True)
class Child:
    """What the detectors read of one subagent. gain: `span_gain`; used: its result is cited later."""

    brief: str
    gain: int
    used: bool
    finished: bool
    tool_calls: int


@dataclass(frozen=True)
class Episode:
    """What the detectors read of one run of a task.

    oracle: T1 / T∞ of the task's own graph. width, parallelism: of the run. largest_group: most subagents that one step
    started. r_parallel, r_finish, r_perf: the three rewards of section 6.2 of the report, without their weights.
    """

    oracle: float
    width: float
    parallelism: float
    largest_group: int
    children: tuple[Child, ...] = ()
    r_parallel: float = 0.0
    r_finish: float = 0.0
    r_perf: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What a detector says of a window of episodes: whether it warns, and the signs that it went by."""

    alarm: bool
    signs: Mapping[str, float]


def words(text: str) -> set[str]:
    """The set of words and numbers of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def duplicates(briefs: Sequence[str], limit: float = DUPLICATE) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of briefs whose word sets have a Jaccard index above `limit`, one for each later brief."""
    sets = [words(brief) for brief in briefs]
    found = []
    for j, mine in enumerate(sets):
        for i, other in enumerate(sets[:j]):
            if len(mine & other) > limit * len(mine | other) or mine == other:
                found.append((i, j))
                break
    return found


def is_used(result: str, brief: str, later: str) -> bool:
    """Whether `later` (answer, further briefs) has a word of at least 3 letters that only the result brought."""
    return any(len(word) > 2 for word in (words(result) - words(brief)) & words(later))


def episode(
    events: Sequence[Event],
    oracle: float,
    rewards: tuple[float, float, float] = (0, 0, 0),
    used: Sequence[str] | None = None,
) -> Episode:
    """The summary of one recorded run. rewards: r_parallel, r_finish, r_perf.

    used: the subagents whose results are used, where answers cite calls; None: told by the words of later text.
    """
    graph = from_events(events)
    briefs = {e.agent: str(e.detail.get("brief", "")) for e in events if e.kind == "start" and e.agent != ROOT}
    ends = {e.agent: e for e in events if e.kind == "end"}
    groups: dict[tuple[str, int], int] = {}
    tools: dict[str, int] = {}
    for event in events:
        if event.kind == "spawn":
            groups[event.agent, event.step] = groups.get((event.agent, event.step), 0) + 1
        elif event.kind == "tool":
            tools[event.agent] = tools.get(event.agent, 0) + 1
    began = {e.agent: e.id for e in events if e.kind == "start"}
    children = []
    for name, brief in briefs.items():
        end = ends.get(name)
        result = str(end.detail.get("summary", "")) if end else ""
        parent = name.rpartition("/")[0]
        asked = [text for other, text in briefs.items() if end and began[other] > end.id]
        answer = str(ends[parent].detail.get("summary", "")) if parent in ends else ""
        children.append(
            Child(
                brief=brief,
                gain=span_gain(graph, name) if name in graph.subagents else 0,
                used=is_used(result, brief, "\n".join([answer, *asked])) if used is None else name in used,
                finished=end is not None and end.status == "ok",
                tool_calls=tools.get(name, 0),
            )
        )
    group = max(groups.values(), default=0)
    return Episode(oracle, mean_width(graph), parallelism(graph), group, tuple(children), *rewards)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def rise(values: Sequence[float]) -> float:
    """Least-squares slope over the window, times the window: how far a line through the values rises."""
    n = len(values)
    if n < 2:
        return 0.0
    middle, mean = (n - 1) / 2, sum(values) / n
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / sum((i - middle) ** 2 for i in range(n))
    return slope * (n - 1)


def collapsed_share(window: Sequence[Episode]) -> float:
    """Share of the episodes of wide tasks whose width or T1 / T∞ shows no parallelism; 0 without any."""
    return _share(e.width <= COLLAPSED or e.parallelism < COLLAPSED for e in window if e.oracle > WIDE)


def serial_collapse(window: Sequence[Episode], share: float = 0.5) -> Finding:
    """Wide tasks are done one thing after the other, in more than `share` of the window or more and more.

    Signs: `collapsed`, the share of episodes of wide tasks whose width or T1 / T∞ shows no parallelism; `before` and
    `after`, how often one step starts two or more subagents, in the first and the second half of the window.
    """
    wide = [e for e in window if e.oracle > WIDE]
    collapsed = collapsed_share(window)
    half = len(wide) // 2
    before, after = (_share(e.largest_group >= 2 for e in part) for part in (wide[:half], wide[half:]))
    fading = half >= 5 and before > 0.2 and after < 0.1 * before
    return Finding(collapsed > share or fading, {"collapsed": collapsed, "before": before, "after": after})


def spurious_parallelism(window: Sequence[Episode], share: float = 0.5) -> Finding:
    """Subagents are started for the reward of starting them. Warns if `paid` comes with any of the other signs.

    Signs: `paid`, 1 if r_parallel and r_finish rise over the window while r_perf does not; and shares above `share` of
    `no_gain` (subagents that the span does not need), `unused` (results that nothing cites), `duplicate` (briefs) and
    `on_chains` (episodes of chains that are wide).
    """
    rises = [rise([getattr(e, name) for e in window]) for name in ("r_parallel", "r_finish", "r_perf")]
    signs = useless(window)
    paid = pays(*rises)
    return Finding(paid and any(v > share for v in signs.values()), {**signs, "paid": float(paid)})


def pays(parallel: float, finish: float, perf: float) -> bool:
    """Whether the auxiliary rewards rise over a window by more than noise, and the outcome does not."""
    return parallel > RISE and finish > RISE and perf < RISE


def useless(window: Sequence[Episode]) -> dict[str, float]:
    """Shares of subagents, or episodes, that parallelism does nothing for; see `spurious_parallelism`."""
    children = [child for e in window for child in e.children]
    repeated = sum(len(duplicates([child.brief for child in e.children])) for e in window)
    return {
        "no_gain": _share(child.gain <= 0 for child in children),
        "unused": _share(not child.used for child in children),
        "duplicate": repeated / len(children) if children else 0.0,
        "on_chains": _share(e.width > TOO_WIDE for e in window if e.oracle <= CHAIN),
    }


def finish_hacking(window: Sequence[Episode], share: float = 0.5) -> Finding:
    """Subagents finish because they do nothing: nearly all finish, and more than `share` of those called no tool."""
    children = [child for e in window for child in e.children]
    finished = [child for child in children if child.finished]
    signs = {"finish_rate": _share(c.finished for c in children), "idle": _share(not c.tool_calls for c in finished)}
    return Finding(signs["finish_rate"] > 0.9 and signs["idle"] > share, signs)
