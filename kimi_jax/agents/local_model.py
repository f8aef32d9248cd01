"""The project's own engine as a model of the swarm: no server between, token ids in and out.

Each answer carries what RL needs of it in `Response.tokens`: the prompt's ids as they were sampled from, the sampled
ids and their log-probabilities. Prompts of the agents share their beginnings in the engine's prefix cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kimi_jax.agents.events import Usage
from kimi_jax.agents.model import Call, ModelError, RateLimited, Request, Response
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

    async def complete(self, request: Request) -> Response:
        """One answer. Raises RateLimited if too many requests wait, ModelError for a prompt that is too long."""
        tools = [{"type": "function", "function": dict(tool)} for tool in request.tools]
        chat = Chat(request.messages, tools or None, self._thinking, preserve_thinking=True)
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
        reply, prompt = shown.reply, asked.token_ids.tolist()
        calls = tuple(Call(call.id, call.name, call.arguments) for call in reply.tool_calls)
        tokens = {"prompt": prompt, "sampled": ids, "logprobs": logprobs, "version": version}
        usage = Usage(len(prompt), len(ids))
        return Response(reply.content, calls, usage, reply.reasoning, shown.finish_reason, tokens)
