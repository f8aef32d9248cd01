"""The project's own engine as a model of the swarm: no server between, token ids in and out.

Each answer carries what RL needs of it in `Response.tokens`: the prompt's ids as they were sampled from, the sampled
ids and their log-probabilities. Prompts of the agents share their beginnings in the engine's prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from kimi_jax.agents.events import Usage
from kimi_jax.agents.model import Call, Declaration, Message, ModelError, ModelRequest, RateLimited, Response
from kimi_jax.data.reply import ReplyParser
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import Chat, ReplyStream, chat_request
from kimi_jax.infer.request import Sampling
from kimi_jax.serve.worker import EngineFailed, EngineWorker, Overloaded, RequestFailed

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine


class LocalModel:
    """Use as an async context: the engine runs in a thread of its own meanwhile. name: goes into the journal.

    thinking: whether answers begin with reasoning. temperature, top_p: of sampling; the release recommends 1.0 with
    thinking, 0.6 without, and 0.95.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        *,
        thinking: bool = True,
        temperature: float = 1.0,
        top_p: float = 0.95,
        waiting: int = 256,
    ):
        self.name = name
        self.version = 0  # of the weights; who changes them counts
        self._engine, self._tokenizer, self._thinking = engine, tokenizer, thinking
        self._temperature, self._top_p = temperature, top_p
        self._worker = EngineWorker(engine, limit=waiting)

    async def __aenter__(self) -> Self:
        self._worker.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._worker.stop()

    async def complete(self, request: ModelRequest) -> Response:
        """One answer. Raises RateLimited if too many requests wait, ModelError for a prompt that is too long."""
        chat = to_chat(request.messages, request.tools, self._thinking)
        sampling = Sampling(self._temperature, self._top_p, max_new_tokens=request.max_tokens, logprobs=True)
        try:
            asked = chat_request(chat, self._tokenizer, self._engine.config, sampling)
        except ValueError as error:
            raise ModelError(str(error)) from error
        shown = ReplyStream(self._tokenizer, asked.sampling.stop_ids, ReplyParser(chat.reasons))
        version, ids = self.version, list[int]()
        logprobs: list[float] = []
        try:
            with self._worker.admit(1):
                async with self._worker.submit([asked]) as run:
                    async for _, event in run.events():
                        shown.feed(event)
                        if event.token_id is not None:
                            ids.append(event.token_id)
                            logprobs.append(float(event.logprob or 0.0))
        except Overloaded as error:
            raise RateLimited(str(error)) from error
        except (EngineFailed, RequestFailed, ValueError) as error:
            raise ModelError(str(error)) from error
        return to_response(shown, asked.token_ids.tolist(), ids, logprobs, version)


def to_chat(messages: Sequence[Message], tools: Sequence[Declaration], thinking: bool) -> Chat:
    """The conversation of an agent. Turns that were sampled here are part of the prompt by their ids, as they were."""
    sampled = {i: message["token_ids"] for i, message in enumerate(messages) if "token_ids" in message}
    plain = [{name: value for name, value in message.items() if name != "token_ids"} for message in messages]
    declared = [{"type": "function", "function": dict(tool)} for tool in tools]
    return Chat(plain, declared or None, thinking, preserve_thinking=True, sampled=sampled)


def to_response(shown: ReplyStream, prompt: list[int], ids: list[int], logprobs: list[float], version: int) -> Response:
    """What the agent gets of an answer that was sampled to its end; `ids` and what RL needs of them beside it."""
    reply = shown.reply
    calls = tuple(Call(call.id, call.name, call.arguments) for call in reply.tool_calls)
    tokens: dict[str, Any] = {"prompt": prompt, "sampled": ids, "logprobs": logprobs, "version": version}
    usage = Usage(len(prompt), len(ids))
    return Response(reply.content, calls, usage, reply.reasoning, shown.finish_reason, tokens)
