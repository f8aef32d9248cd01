"""PARL: the rewards of an orchestrator that learns when to work in parallel, of what a run of the swarm has recorded.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.2: lambda1 r_parallel + lambda2 r_finish + r_perf, without closed
forms; docs/rl.md section 11 has the readings.

W width   B briefs

r_perf      item F1 of the answer
r_parallel  (mean number of useful, distinct subagents at work at once - 1) / (W - 1), between 0 and 1
r_finish    share of the subagents that finished after at least one tool call

A subagent counts for r_parallel if its brief is no near-duplicate of an earlier one and its result is used: by the
answer, or by a later brief. Subagents that work one after the other have a mean of 1, so they earn nothing. Both
weights fall to zero during training, on the global step, which is in the checkpoint: a reward of parallelism that stays
is collected by spawning. `every` counts every subagent, the naive reading, for experiments/agent_swarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_jax.agents import critical, detectors
from kimi_jax.agents.events import ROOT, Event


@dataclass(frozen=True)
class Rewards:
    """The three terms of one run, without their weights, each between 0 and 1."""

    perf: float
    parallel: float
    finish: float

    def total(self, lambda1: float, lambda2: float) -> float:
        """What the policy is trained on."""
        return self.perf + lambda1 * self.parallel + lambda2 * self.finish


def rewards(events: Sequence[Event], perf: float, used: Sequence[str], width: int, every: bool = False) -> Rewards:
    """The terms of a recorded run. perf: its score; used: the subagents whose results the answer or a brief is made of;
    width: number of useful subagents at work at once that earns the whole of r_parallel, at least 2; every: subagents
    count for r_parallel whether they are useful or not."""
    if width < 2:
        raise ValueError(f"a width of {width} is no parallelism; it must be at least 2")
    briefs = {e.agent: str(e.detail["brief"]) for e in events if e.kind == "start" and e.agent != ROOT}
    names = list(briefs)
    repeated = {names[j] for _, j in detectors.duplicates(list(briefs.values()))}
    graph = critical.from_events(events)
    idle = [] if every else [name for name in names if name not in used or name in repeated]
    mean = critical.mean_width(critical.without(graph, idle))
    tools = {e.agent for e in events if e.kind == "tool"}
    ends = [e for e in events if e.kind == "end" and e.agent != ROOT]
    finished = [e for e in ends if e.status == "ok" and e.agent in tools]
    return Rewards(perf, min(max(mean - 1, 0) / (width - 1), 1.0), len(finished) / len(ends) if ends else 0.0)
