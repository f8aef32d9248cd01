"""The project's engine as the model of many swarms that run in one event loop: their turns are sampled together.

    batch = BatchedModel(engine, tokenizer)
    anyio.run(play_all, backend_options={"loop_factory": VirtualTimeLoop})    # each run has an EpisodeModel(batch, ...)

The runs go on until every one of them waits for the policy, or is over; then all that wait are sampled in one call, in
the order of their episodes. No clock and no thread decides what is sampled beside what, so the same weights and seeds
give the same runs. It needs the loop of `virtual_time.py`, whose clock stands still as long as anything can run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from kimi_jax.agents.events import ROOT
from kimi_jax.agents.local_model import to_chat, to_response
from kimi_jax.agents.model import ModelError, ModelRequest, Response
from kimi_jax.data.reply import ReplyParser
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer import request as sampler
from kimi_jax.infer.generate import ReplyStream, chat_request

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine

LONGER = 1e6  # virtual seconds that the policy waits, longer than any subagent can take
MIN_ANSWER = 8  # tokens; a prompt that leaves less ends its episode

Order = tuple[int, str, int]  # number of the episode, its agent, and that one's turn
Waiting = tuple[Order, sampler.Request, "asyncio.Future[sampler.Completion]"]


class BatchedModel:
    """See the module. temperature: of sampling; max_length: most tokens of a prompt with its answer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_length: int, temperature: float = 1.0):
        self.engine, self.tokenizer = engine, tokenizer
        self.max_length, self.temperature = max_length, temperature
        self._waiting: list[Waiting] = []

    async def sample(self, order: Order, request: sampler.Request) -> sampler.Completion:
        """The completion of a request."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[sampler.Completion] = loop.create_future()
        if not self._waiting:
            loop.call_later(LONGER, self._sample)
        self._waiting.append((order, request, future))
        return await future

    def _sample(self) -> None:
        waiting, self._waiting = sorted(self._waiting, key=lambda each: each[0]), []
        try:
            completions = self.engine.run([request for _, request, _ in waiting])
        except BaseException as error:  # a signal's too: asyncio would log it and leave the episodes waiting for ever
            for _, _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, _, future), completion in zip(waiting, completions, strict=True):
            if not future.done():
                future.set_result(completion)


class EpisodeModel:
    """The policy in one run, as any of its agents. number: of the episode; seed: of its samples; greedy: the most
    probable token each time.

    Tools are not declared: a policy of a few million parameters knows them from its training.
    """

    name = "policy"

    def __init__(self, batch: BatchedModel, number: int, seed: str, greedy: bool = False):
        self._batch, self._number, self._seed, self._greedy = batch, number, seed, greedy
        self._turns: Counter[str] = Counter()  # of each agent

    async def complete(self, request: ModelRequest) -> Response:
        """One turn of an agent. Raises ModelError where the conversation leaves no room for it."""
        batch, agent = self._batch, request.agent
        turn = self._turns[agent]
        self._turns[agent] += 1
        place = f"{turn}" if agent == ROOT else f"{agent}/{turn}"
        digest = hashlib.sha256(f"{self._seed}/{place}".encode()).digest()
        chat = to_chat(request.messages, (), thinking=False)
        sampling = sampler.Sampling(
            0.0 if self._greedy else batch.temperature, seed=int.from_bytes(digest[:4], "big"), logprobs=True,
            stop_ids=(batch.tokenizer.media_pad_id,),
        )  # fmt: skip
        try:
            asked = chat_request(chat, batch.tokenizer, batch.engine.config, sampling)
        except ValueError as error:
            raise ModelError(str(error)) from error
        room = min(batch.max_length - len(asked.token_ids), request.max_tokens)
        if room < MIN_ANSWER:
            raise ModelError(f"the conversation has {len(asked.token_ids)} of {batch.max_length} tokens")
        asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, max_new_tokens=room))
        done = await batch.sample((self._number, agent, turn), asked)
        if done.token_ids[-1] == batch.tokenizer.media_pad_id:  # of no image; behind it nothing could be trained on
            raise ModelError("the answer holds a media pad")
        shown = ReplyStream(batch.tokenizer, asked.sampling.stop_ids, ReplyParser(chat.reasons))
        for i, token in enumerate(done.token_ids):
            last = i == len(done.token_ids) - 1
            shown.feed(sampler.TokenEvent(0, token, None, (), done.finish_reason if last else None))
        version = batch.engine.version
        return to_response(shown, asked.token_ids.tolist(), list(done.token_ids), list(done.logprobs), version)
