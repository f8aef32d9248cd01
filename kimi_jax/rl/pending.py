"""Answers while they are drawn, and groups of them: what a checkpoint keeps of a rollout that is not complete.

K samples of a group   n tokens   L MoE layers   k experts of a token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimi_jax.data.example import Encoded
from kimi_jax.data.routing import FREE
from kimi_jax.rl.episode import ExecutedCall
from kimi_jax.rl.tasks import Problem
from kimi_jax.rl.types import GIVEN, Group, Segment, Trajectory

FAILED = "error"  # finish of an answer that the sampler could not draw


@dataclass
class PendingAnswer:
    """One sample as far as it is drawn.

    tokens, logp, versions: of all turns, and of what tools gave between them: GIVEN is the version of a token that was
    not sampled. experts: int32 [m, L, k] of the first m tokens of prompt and answer, if they are recorded; each as it
    was routed when it was first read. finish: "" while it goes on; "stop", "length", "repetition", "media_pad" (the
    model wrote one, which is not kept), "turns" (the last one that is allowed still calls a tool), "error".
    calls: that were made so far, in their order.
    """

    seed: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = ""
    experts: np.ndarray | None = None
    calls: list[ExecutedCall] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        """Tokens that the policy drew."""
        return len(self.versions) - self.versions.count(GIVEN)

    def runs(self) -> list[tuple[int, int]]:
        """(start, end) of turns and of what was given between them, alternating: the first and the last are turns."""
        given = np.array(self.versions, np.int32) == GIVEN
        ends = [*(np.flatnonzero(given[1:] != given[:-1]) + 1).tolist(), len(given)]
        runs = list(zip([0, *ends[:-1]], ends, strict=True))
        return [*runs, (len(given), len(given))] if given[-1:].any() else runs

    def observe(self, tokens: Sequence[int]) -> None:
        """What the model reads next, and has not written."""
        self.tokens += tokens
        self.logp += [0.0] * len(tokens)
        self.versions += [GIVEN] * len(tokens)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON and arrays."""
        return {**vars(self), "calls": [vars(call) for call in self.calls]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> PendingAnswer:
        """What `state` made."""
        return cls(**{**state, "calls": [ExecutedCall(**call) for call in state["calls"]]})


@dataclass
class PendingGroup:
    """A group that is being drawn: K answers to one problem. task, index: which problem of which task of the run."""

    task: str
    index: int
    problem: Problem
    prompt: Encoded
    answers: list[PendingAnswer]

    @property
    def complete(self) -> bool:
        """Whether every answer has come to its end."""
        return all(answer.finish for answer in self.answers)

    @property
    def failed(self) -> bool:
        """Whether an answer could not be drawn; the group is then drawn anew from another prompt."""
        return any(answer.finish == FAILED for answer in self.answers)

    def tokens(self, answer: PendingAnswer) -> np.ndarray:
        """int32 [n]: the prompt and what an answer has so far."""
        return np.concatenate([self.prompt.tokens, np.array(answer.tokens, np.int32)])

    def group(self, rewards: Sequence[float]) -> Group:
        """The finished group with these rewards."""
        trajectories = [self._trajectory(*each) for each in zip(self.answers, rewards, strict=True)]
        return Group(self.problem.key, tuple(trajectories), self.prompt.media)

    def _trajectory(self, answer: PendingAnswer, reward: float) -> Trajectory:
        """A chain: the prompt, then turns and what was given between them."""
        begin = len(self.prompt.tokens)
        segments = [Segment.given(self.prompt.tokens, media=tuple(range(len(self.prompt.media))))]
        for i, (start, end) in enumerate(answer.runs()):
            tokens, part = answer.tokens[start:end], np.s_[start:end]
            turn = (
                Segment.given(tokens, i)
                if i % 2
                else Segment.drawn(tokens, answer.logp[part], answer.versions[part], i)
            )
            segments.append(turn)
        if answer.experts is not None:
            experts = np.full((begin + len(answer.tokens), *answer.experts.shape[1:]), FREE, np.int32)
            experts[: len(answer.experts)] = answer.experts[: len(experts)]
            ends = np.cumsum([len(segment.tokens) for segment in segments])
            each = zip(segments, np.split(experts, ends[:-1]), strict=True)
            segments = [dataclasses.replace(segment, experts=part) for segment, part in each]
        return Trajectory(tuple(segments), reward, answer.finish)
