"""Drawing answers: prompts of problems, groups that share them, answers in parts and in turns, repetition.

Source: Kimi K2.5 report (arXiv 2602.02276) appendix D (token in, token out); Kimi k1.5 report (arXiv 2501.12599)
section 2.6.2 (partial rollouts, repetition). docs/rl.md section 8.

K samples of a group   n tokens

What an answer gets next depends on its seed, its position and what stands before it, and on nothing else that is drawn
beside it (`infer.request.Sampling`). So an interrupted answer goes on from its tokens alone, and a run that is killed
draws the same again. An answer of a task with tools may call them (`rl.episode`): meanwhile others are drawn, and what
the tool gives stands between the turns as tokens that nobody sampled.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from kimi_jax.config import ConfigError, RLConfig, RolloutConfig, TaskConfig, TrainConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Encoded, EncodeLimits, Example, encode
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.generate import STOP_TOKENS
from kimi_jax.infer.request import Request, RequestEngine, Sampling, TokenEvent
from kimi_jax.rl.episode import (
    Finished,
    Interpreters,
    answer_text,
    check_tools,
    encode_prompt,
    encode_results,
    find_calls,
    named_images,
)
from kimi_jax.rl.pending import FAILED, PendingAnswer, PendingGroup
from kimi_jax.rl.tasks import Problem, Task, open_task
from kimi_jax.rl.types import GIVEN

REPEAT_EVERY = 16  # tokens between two looks for repetition


@runtime_checkable
class RolloutEngine(RequestEngine, Protocol):
    """What of an `infer.engine.Engine` draws the answers of groups, with weights that change."""

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[int]: ...

    def set_params(self, params: Any, version: int) -> None: ...


@dataclass(eq=False)
class _Part:
    """An answer that is being drawn, until it has so many sampled tokens."""

    group: PendingGroup
    answer: PendingAnswer
    until: int
    greedy: bool


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
        self._rl = config.rl or RLConfig()
        self._has_tools = any(task.tools for task in self._rl.tasks.values())
        check_tools([name for task in self._rl.tasks.values() for name in task.tools])
        self._interpreters = Interpreters(self._rl.tools) if self._has_tools else None
        self._sampler: RolloutEngine | None = None
        self._counts: Counter[str] = Counter()

    def open_task(self, config: TaskConfig) -> Task:
        """The problems of a task that a run trains on."""
        return open_task(config)

    def set_params(self, params: Any, version: int) -> None:
        """Draw with these weights from now on; `version` is noted at every token."""
        if self._sampler is None:
            self._sampler = self._open(params)
        self._sampler.set_params(params, version)

    def _open(self, params: Any) -> RolloutEngine:
        return open_engine(self._config, self._rollout, params, self._mesh)

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last time: calls of tools, those that failed, that were run again, that differed."""
        counts, self._counts = self._counts, Counter()
        names = ("tool_calls", "tool_errors", "tool_replayed", "tool_differed") if self._has_tools else ()
        return {**dict.fromkeys(names, 0), **counts}

    def close(self) -> None:
        """Ends interpreters."""
        if self._interpreters is not None:
            self._interpreters.close()

    def prompt(self, task: str, problem: Problem) -> Encoded:
        """The problem as the model reads it. Raises BadRecord for one that leaves no room for an answer."""
        tools, thinking = self._tools(task)
        if tools:
            found = encode_prompt(problem, tools, thinking, self.tokenizer, self._limits)
        else:
            found = encode(Example(problem.parts, problem.key), self.tokenizer, self._limits)
            # without [EOS]
            found = dataclasses.replace(found, tokens=found.tokens[:-1], loss_weights=found.loss_weights[:-1])
        if len(found.tokens) >= self._config.data.sequence_length:
            raise BadRecord(
                "too_long", problem.key, f"a prompt of {len(found.tokens)} tokens leaves no room for an answer"
            )
        return found

    def _tools(self, task: str) -> tuple[tuple[str, ...], bool]:
        """(the tools of a task, whether its replies begin with reasoning)."""
        found = self._rl.tasks.get(task)
        return (found.tools, found.thinking) if found is not None and found.tools else ((), False)

    def begin(self, task: str, index: int, problem: Problem, samples: int, seed: int) -> PendingGroup:
        """A group of which nothing is drawn yet; the seeds of its answers follow from seed, task and index."""
        answers = [PendingAnswer(_seed(seed, task, index, k)) for k in range(samples)]
        return PendingGroup(task, index, problem, self.prompt(task, problem), answers)

    def draw(self, groups: Sequence[PendingGroup], most: int = 0, greedy: bool = False) -> None:
        """Draws up to `most` more tokens (0: all that are allowed) of every answer that has not ended.

        Tools that are called meanwhile are waited for, so that what is drawn does not depend on the clock.
        """
        assert self._sampler is not None, "set_params comes first"
        running: dict[int, _Part] = {}
        waiting: dict[int, _Part] = {}  # for tools; by id of the answer
        for group in groups:
            fresh = [a for a in group.answers if not a.finish and not a.tokens]
            parts = [self._part(group, answer, most, greedy) for answer in fresh]
            if parts:
                numbers = self._sampler.submit_group(self._request(parts[0]), [a.seed for a in fresh])
                running |= dict(zip(numbers, parts, strict=True))
            for answer in group.answers:
                if answer.tokens and not answer.finish:
                    self._go_on(self._part(group, answer, most, greedy), running)
        while not self._sampler.idle or waiting:
            if not self._sampler.idle:
                for event in self._sampler.step():
                    self._take(event, running, waiting)
            if self._interpreters is not None:
                for finished in self._interpreters.finished(wait=self._sampler.idle):
                    self._observe(waiting.pop(finished.key), finished, running)

    def _part(self, group: PendingGroup, answer: PendingAnswer, most: int, greedy: bool) -> _Part:
        left = self._rollout.max_new_tokens - answer.sampled
        return _Part(group, answer, answer.sampled + min(left, most or left), greedy)

    def _go_on(self, part: _Part, running: dict[int, _Part]) -> None:
        assert self._sampler is not None
        running[self._sampler.submit(self._request(part))] = part

    def rewards(self, group: PendingGroup, iteration: int) -> list[float]:
        """Of each answer, before shaping: what repeats itself, or ends in a media pad, is worth nothing."""
        return [
            group.problem.reward(self.text(group, answer)) if answer.finish in ("stop", "length") else 0.0
            for answer in group.answers
        ]

    def score(self, groups: Sequence[PendingGroup]) -> list[list[np.ndarray]]:
        """float32 [n] for each answer of each group: log-probabilities of its tokens under the weights of now."""
        assert isinstance(self._sampler, Engine), "set_params comes first, and scores come from this process"
        requests = []
        for group in groups:
            for answer in group.answers:
                sampling = Sampling(self._temperature, max_new_tokens=0, score_from=len(group.prompt.tokens))
                requests.append(Request(group.tokens(answer), group.prompt.media, sampling))
        scored = iter(self._sampler.run(requests))
        return [[np.array(next(scored).prompt_logprobs, np.float32) for _ in group.answers] for group in groups]

    def text(self, group: PendingGroup, answer: PendingAnswer) -> str:
        """What an answer says, without special tokens; of an episode the last reply, without its reasoning."""
        tools, thinking = self._tools(group.task)
        if not tools:
            return self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        start, end = answer.runs()[-1]
        return answer_text(answer.tokens[start:end], self.tokenizer, thinking)

    def _request(self, part: _Part) -> Request:
        group, answer = part.group, part.answer
        own = STOP_TOKENS if self._tools(group.task)[0] else ()
        stop_ids = *self._stop_ids, *map(self.tokenizer.special_id, own)
        sampling = Sampling(
            0.0 if part.greedy else self._temperature, seed=answer.seed,
            max_new_tokens=min(part.until - answer.sampled, self._room(group, answer)), stop_ids=stop_ids,
            logprobs=True, routed_experts=self._rollout.replay_experts,
            # when a tool's result comes depends on the clock, and so would what was read before it
            shares_prefix=not self._has_tools,
        )  # fmt: skip
        return Request(group.tokens(answer), group.prompt.media, sampling)

    def _room(self, group: PendingGroup, answer: PendingAnswer) -> int:
        """Most tokens that may still be sampled of an answer."""
        left = self._config.data.sequence_length - len(group.prompt.tokens) - len(answer.tokens)
        return max(min(self._rollout.max_new_tokens - answer.sampled, left), 0)

    def _take(self, event: TokenEvent, running: dict[int, _Part], waiting: dict[int, _Part]) -> None:
        part = running.get(event.request_id)
        if part is None or part.answer.finish:
            return
        answer = part.answer
        if event.experts is not None:
            known = [] if answer.experts is None else [answer.experts]
            answer.experts = np.concatenate([*known, event.experts[sum(map(len, known)) :]])
        if event.token_id == self._pad_id:
            answer.finish = "media_pad"
        elif event.token_id is not None and event.logprob is not None:
            answer.tokens.append(event.token_id)
            answer.logp.append(event.logprob)
            answer.versions.append(event.version)
            if self._repeats(answer):
                answer.finish = "repetition"
                assert self._sampler is not None
                self._sampler.cancel(event.request_id)
        if event.finish_reason and not answer.finish:
            self._end_turn(part, event.finish_reason, waiting)
        if answer.finish or (event.finish_reason and id(answer) not in waiting):
            self._release(answer)

    def _end_turn(self, part: _Part, reason: str, waiting: dict[int, _Part]) -> None:
        """The sampler is done with a request: the answer ends, calls tools, or goes on another time."""
        group, answer = part.group, part.answer
        if reason == "length":
            answer.finish = "" if self._room(group, answer) else "length"
            return
        answer.finish = "stop" if reason == "stop" else FAILED
        tools, thinking = self._tools(group.task)
        if self._interpreters is None or not tools or reason != "stop":
            return
        runs = answer.runs()
        calls = find_calls(answer.tokens[slice(*runs[-1])], self.tokenizer, thinking)
        if calls and (len(runs) + 1) // 2 >= self._rl.tools.turns:
            answer.finish = "turns"
        elif calls:
            answer.finish = ""
            waiting[id(answer)] = part
            self._interpreters.run(id(answer), calls, answer.calls, named_images(group.problem))

    def _observe(self, part: _Part, finished: Finished, running: dict[int, _Part]) -> None:
        """What the tools gave becomes part of the history, and the next turn begins, if there is room for one."""
        group, answer = part.group, part.answer
        answer.calls += finished.calls
        self._counts["tool_calls"] += len(finished.calls)
        self._counts["tool_errors"] += sum(call.status != "ok" for call in finished.calls)
        self._counts["tool_replayed"] += finished.replayed
        self._counts["tool_differed"] += finished.differed
        given = encode_results(finished.calls, self.tokenizer, self._tools(group.task)[1])
        left = self._config.data.sequence_length - len(group.prompt.tokens) - len(answer.tokens)
        if len(given) >= left or answer.sampled >= self._rollout.max_new_tokens:
            answer.finish = "length"
        else:
            answer.observe(given)
            if answer.sampled < part.until:
                self._go_on(part, running)
                return
        self._release(answer)

    def _release(self, answer: PendingAnswer) -> None:
        if self._interpreters is not None:
            self._interpreters.release(id(answer))

    def _repeats(self, answer: PendingAnswer) -> bool:
        """Looked for at fixed lengths only, so that an answer ends at the same token whatever is drawn beside it; and
        among sampled tokens only: a tool may say the same twice."""
        if len(answer.tokens) % REPEAT_EVERY or not self._rollout.repeat_period:
            return False
        tokens = [token for token, version in zip(answer.tokens, answer.versions, strict=True) if version != GIVEN]
        for period in range(1, self._rollout.repeat_period + 1):
            whole = period * self._rollout.repeat_times
            if len(tokens) >= whole and tokens[-whole:-period] == tokens[period - whole :]:
                return True
        return False


def open_engine(config: TrainConfig, rollout: RolloutConfig, params: Any, mesh: Mesh | None) -> Engine:
    """The engine of a run's rollouts, in this process."""
    return Engine(
        dataclasses.replace(config.model, remat=False), params, slots=rollout.slots, page_size=rollout.page_size,
        max_sequence_length=config.data.sequence_length, tokens_per_call=rollout.tokens_per_call, mesh=mesh,
    )  # fmt: skip


def _seed(seed: int, task: str, index: int, sample: int) -> int:
    digest = hashlib.sha256(f"{seed}/{task}/{index}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
