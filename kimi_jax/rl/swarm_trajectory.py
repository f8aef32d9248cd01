"""The record of a run as what RL trains on: a tree of token segments (`kimi_jax.rl.types`).

The orchestrator is trained, subagents are frozen unless it is said otherwise: their tokens are observations (Kimi K2.5
report, arXiv 2602.02276, section 6.1). Ids are those that were sampled and sampled from; no text is encoded again. A
step whose prompt begins with everything before it continues that context, any other step (after a context policy
replaced the history, or because text of a reply encodes otherwise than it was sampled) begins one of its own.
"""

from collections.abc import Callable, Iterable

import numpy as np

from kimi_jax.agents.events import ROOT, Event
from kimi_jax.rl.types import Segment, Trajectory, TrajectoryError


def trajectory(events: Iterable[Event], trained: Callable[[str], bool] = lambda agent: agent == ROOT) -> Trajectory:
    """The run as one Trajectory without a reward. trained: which agents' tokens are not frozen.

    Steps of frozen agents that have no ids (an endpoint's) are left out. Raises TrajectoryError if a step of a trained
    agent has none.
    """
    segments: list[Segment] = []
    contexts: dict[str, tuple[list[int], int]] = {}  # agent -> (its ids so far, index of its last segment)
    finish = ""
    for event in events:
        if event.kind == "end" and event.agent == ROOT:
            finish = event.status
        if event.kind != "step":
            continue
        tokens = event.detail.get("tokens") or {}
        if not tokens.get("sampled"):
            if trained(event.agent):
                raise TrajectoryError(f"step {event.step} of {event.agent} has no token ids; RL needs a local model")
            continue
        prompt, sampled = list(tokens["prompt"]), list(tokens["sampled"])
        before, parent = contexts.get(event.agent, ([], None))
        if prompt[: len(before)] != before:
            before, parent = [], None
        if len(prompt) > len(before):
            segments.append(Segment.given(prompt[len(before) :], parent))
            parent = len(segments) - 1
        assert parent is not None  # a prompt is never empty
        versions = np.full(len(sampled), tokens.get("version", 0))
        logp = np.minimum(tokens["logprobs"], 0.0)
        segments.append(Segment.drawn(sampled, logp, versions, parent, frozen=not trained(event.agent)))
        contexts[event.agent] = ([*prompt, *sampled], len(segments) - 1)
    return Trajectory(tuple(segments), finish=finish)
