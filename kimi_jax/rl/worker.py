"""Drawing answers: prompts of problems, groups that share them, answers in parts, repetition.

Source: Kimi K2.5 report (arXiv 2602.02276) appendix D (token in, token out); Kimi k1.5 report (arXiv 2501.12599)
section 2.6.2 (partial rollouts, repetition). docs/rl.md section 8.

K samples of a group   n tokens

What an answer gets next depends on its seed, its position and what stands before it, and on nothing else that is drawn
beside it (`infer.request.Sampling`). So an interrupted answer goes on from its tokens alone, and a run that is killed
draws the same again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kimi_jax.config import ConfigError, RolloutConfig, TrainConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Encoded, EncodeLimits, Example, encode
from kimi_jax.data.routing import FREE
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Event, Request, Sampling
from kimi_jax.model import Model
from kimi_jax.rl.tasks import Problem
from kimi_jax.rl.types import Group, Segment, Trajectory

REPEAT_EVERY = 16  # tokens between two looks for repetition
FAILED = "error"  # finish of an answer that the engine could not draw


@dataclass
class Answer:
    """One sample as far as it is drawn.

    experts: int32 [m, L, k] of the first m tokens of prompt and answer, if they are recorded; each as it was routed
    when it was first read. finish: "" while it goes on; "stop", "length", "repetition", "media_pad" (the model wrote
    one, which is not kept), "error".
    """

    seed: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = ""
    experts: np.ndarray | None = None


@dataclass
class PendingGroup:
    """A group that is being drawn: K answers to one problem. task, index: which problem of which task of the run."""

    task: str
    index: int
    problem: Problem
    prompt: Encoded
    answers: list[Answer]

    @property
    def complete(self) -> bool:
        """Whether every answer has come to its end."""
        return all(answer.finish for answer in self.answers)

    @property
    def failed(self) -> bool:
        """Whether an answer could not be drawn; the group is then drawn anew from another prompt."""
        return any(answer.finish == FAILED for answer in self.answers)

    def tokens(self, answer: Answer) -> np.ndarray:
        """int32 [n]: the prompt and what an answer has so far."""
        return np.concatenate([self.prompt.tokens, np.array(answer.tokens, np.int32)])

    def group(self, rewards: Sequence[float]) -> Group:
        """The finished group with these rewards."""
        trajectories = [self._trajectory(*each) for each in zip(self.answers, rewards, strict=True)]
        return Group(self.problem.key, tuple(trajectories), self.prompt.media)

    def _trajectory(self, answer: Answer, reward: float) -> Trajectory:
        given = Segment.given(self.prompt.tokens, media=tuple(range(len(self.prompt.media))))
        drawn = Segment.drawn(answer.tokens, answer.logp, answer.versions, 0)
        if answer.experts is not None:
            length = len(given.tokens) + len(drawn.tokens)
            experts = np.full((length, *answer.experts.shape[1:]), FREE, np.int32)
            experts[: len(answer.experts)] = answer.experts[:length]
            given = dataclasses.replace(given, experts=experts[: len(given.tokens)])
            drawn = dataclasses.replace(drawn, experts=experts[len(given.tokens) :])
        return Trajectory((given, drawn), reward, answer.finish)


class RolloutWorker:
    """An engine that draws answers with the weights it was last given.

    Raises ConfigError for settings that no rollout can be made with.
    """

    def __init__(self, config: TrainConfig, rollout: RolloutConfig, temperature: float, mesh: Mesh | None = None):
        if config.lora is not None:
            raise ConfigError("config.lora: reinforcement learning trains whole weights; leave the adapters out")
        self._config, self._rollout, self._temperature = config, rollout, temperature
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        self._limits = EncodeLimits(config.data.sequence_length, config.data.vision_bins if config.model.vision else ())
        # a pad stands for a feature of an image: what is behind one that nobody gave could not be trained on
        self._pad_id = config.model.media_placeholder_token_id
        self._stop_ids = config.model.eos_token_id, self._pad_id
        self._engine: Engine | None = None

    def set_params(self, params: Any, version: int) -> None:
        """Draw with these weights from now on; `version` is noted at every token."""
        if self._engine is None:
            model = Model(dataclasses.replace(self._config.model, remat=False), params, mesh=self._mesh)
            self._engine = Engine(
                model, slots=self._rollout.slots, page_size=self._rollout.page_size, mesh=self._mesh,
                max_sequence_length=self._config.data.sequence_length, tokens_per_call=self._rollout.tokens_per_call,
            )  # fmt: skip
        self._engine.set_params(params, version)

    def prompt(self, problem: Problem) -> Encoded:
        """The problem as the model reads it. Raises BadRecord for one that leaves no room for an answer."""
        found = encode(Example(problem.parts, problem.key), self.tokenizer, self._limits)
        length = len(found.tokens) - 1  # without [EOS]
        if length >= self._config.data.sequence_length:
            raise BadRecord("too_long", problem.key, f"a prompt of {length} tokens leaves no room for an answer")
        return dataclasses.replace(found, tokens=found.tokens[:-1], loss_weights=found.loss_weights[:-1])

    def begin(self, task: str, index: int, problem: Problem, samples: int, seed: int) -> PendingGroup:
        """A group of which nothing is drawn yet; the seeds of its answers follow from seed, task and index."""
        return PendingGroup(
            task, index, problem, self.prompt(problem), [Answer(_seed(seed, task, index, k)) for k in range(samples)]
        )

    def draw(self, groups: Sequence[PendingGroup], most: int = 0, greedy: bool = False) -> None:
        """Draws up to `most` more tokens (0: all that are allowed) of every answer that has not ended."""
        assert self._engine is not None, "set_params comes first"
        running: dict[int, tuple[Answer, int]] = {}
        for group in groups:
            fresh = [a for a in group.answers if not a.finish and not a.tokens]
            if fresh:
                request = self._request(group, fresh[0], most, greedy)
                numbers = self._engine.submit_group(request, [a.seed for a in fresh])
                running |= {number: (a, self.room(group)) for number, a in zip(numbers, fresh, strict=True)}
            for answer in group.answers:
                if answer.tokens and not answer.finish:
                    number = self._engine.submit(self._request(group, answer, most, greedy))
                    running[number] = answer, self.room(group)
        while not self._engine.idle:
            for event in self._engine.step():
                self._take(event, running)

    def score(self, groups: Sequence[PendingGroup]) -> list[list[np.ndarray]]:
        """float32 [n] for each answer of each group: log-probabilities of its tokens under the weights of now."""
        assert self._engine is not None, "set_params comes first"
        requests = []
        for group in groups:
            for answer in group.answers:
                sampling = Sampling(self._temperature, max_new_tokens=0, score_from=len(group.prompt.tokens))
                requests.append(Request(group.tokens(answer), group.prompt.media, sampling))
        scored = iter(self._engine.run(requests))
        return [[np.array(next(scored).prompt_logprobs, np.float32) for _ in group.answers] for group in groups]

    def text(self, answer: Answer) -> str:
        """What an answer says, without special tokens."""
        return self.tokenizer.decode(answer.tokens, skip_special_tokens=True)

    def _request(self, group: PendingGroup, answer: Answer, most: int, greedy: bool) -> Request:
        left = self.room(group) - len(answer.tokens)
        sampling = Sampling(
            0.0 if greedy else self._temperature, seed=answer.seed, max_new_tokens=min(left, most or left),
            stop_ids=self._stop_ids, logprobs=True, routed_experts=self._rollout.replay_experts,
        )  # fmt: skip
        return Request(group.tokens(answer), group.prompt.media, sampling)

    def room(self, group: PendingGroup) -> int:
        """Most tokens that an answer of this group may have."""
        left = self._config.data.sequence_length - len(group.prompt.tokens)
        return min(self._rollout.max_new_tokens, left)

    def _take(self, event: Event, running: dict[int, tuple[Answer, int]]) -> None:
        if event.request_id not in running or running[event.request_id][0].finish:
            return
        answer, room = running[event.request_id]
        if event.experts is not None:
            known = [] if answer.experts is None else [answer.experts]
            answer.experts = np.concatenate([*known, event.experts[sum(map(len, known)) :]])
        if event.token_id == self._pad_id:
            answer.finish = "media_pad"
            return
        if event.token_id is not None and event.logprob is not None:
            answer.tokens.append(event.token_id)
            answer.logp.append(event.logprob)
            answer.versions.append(event.version)
            if self._repeats(answer.tokens):
                answer.finish = "repetition"
                assert self._engine is not None
                self._engine.cancel(event.request_id)
                return
        if event.finish_reason == "length":
            answer.finish = "length" if len(answer.tokens) >= room else ""
        elif event.finish_reason:
            answer.finish = "stop" if event.finish_reason == "stop" else FAILED

    def _repeats(self, tokens: list[int]) -> bool:
        """Looked for at fixed lengths only, so that an answer ends at the same token whatever is drawn beside it."""
        if len(tokens) % REPEAT_EVERY or not self._rollout.repeat_period:
            return False
        for period in range(1, self._rollout.repeat_period + 1):
            whole = period * self._rollout.repeat_times
            if len(tokens) >= whole and tokens[-whole:-period] == tokens[period - whole :]:
                return True
        return False


def _seed(seed: int, task: str, index: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}/{task}/{index}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
