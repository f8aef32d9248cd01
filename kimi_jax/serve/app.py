"""The HTTP side: routes, errors, streams, clients that go away (the OpenAI API).

A call is read and checked (400), admitted (429), turned into requests in a helper thread (pictures are decoded there),
accepted by the engine (400 again: only it knows its room), and answered. Whatever ends the call early, its slots are
freed: every step is a context that closes what it opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kimi_jax.config import ModelConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import Chat, chat_request, with_stop_tokens
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.serve import protocol
from kimi_jax.serve.answer import Answer, ChatAnswer
from kimi_jax.serve.protocol import ApiError, Call, ChatCall, CompletionCall
from kimi_jax.serve.worker import EngineFailed, EngineWorker, Overloaded, RequestFailed, Run

GONE = 499  # what proxies call a client that did not wait


@dataclass
class Server:
    """What the routes share.

    name: of the model, as clients call it. max_sequence_length: of the engine. open_address: opens addresses of
    pictures that are not data URIs; None refuses them. max_body: bytes of a request that are read.
    """

    name: str
    tokenizer: Tokenizer
    config: ModelConfig
    worker: EngineWorker
    max_sequence_length: int
    open_address: Callable[[str], bytes] | None = None
    max_body: int = 64 << 20
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # (route, status) -> how many
    first_token: tuple[int, float] = (0, 0.0)  # how many answers began, and their seconds from call to first token
    started: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        """The ASGI application; the engine's thread lives as long as its lifespan."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.start()
            try:
                yield
            finally:
                await self.worker.stop()

        routes = [
            Route("/v1/chat/completions", ChatEndpoint(self), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(self), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models: the one there is."""
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "kimi_jax"}
        return _json({"object": "list", "data": [{**model, "max_model_len": self.max_sequence_length}]})

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: 200 while the engine lives, else 503 and the reason."""
        if self.worker.failure:
            return _json({"status": "failed", "reason": self.worker.failure}, 503)
        return _json({"status": "ok"})

    async def metrics(self, _: HttpRequest) -> Response:
        """GET /metrics: Prometheus text."""
        count, seconds = self.first_token
        lines = ["# TYPE kimi_answers_total counter"]
        lines += [
            f'kimi_answers_total{{route="{route}",status="{status}"}} {n}'
            for (route, status), n in sorted(self.answers.items())
        ]
        lines += ["# TYPE kimi_admitted gauge", f"kimi_admitted {self.worker.admitted}"]
        lines += ["# TYPE kimi_first_token_seconds summary", f"kimi_first_token_seconds_sum {seconds:.6f}"]
        lines += [f"kimi_first_token_seconds_count {count}"]
        for name, value in self.worker.stats.items():
            gauge = name in ("waiting", "running", "free_pages", "cached_pages")
            name = f"kimi_engine_{name}" if gauge else f"kimi_engine_{name}_total"
            lines += [f"# TYPE {name} {'gauge' if gauge else 'counter'}", f"{name} {value}"]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


class Endpoint:
    """An ASGI application for one kind of call."""

    route = ""

    def __init__(self, server: Server):
        self._server = server

    def parse(self, body: Any) -> Call:
        """The call a body makes. Raises ApiError(400)."""
        raise NotImplementedError

    def requests(self, call: Any) -> list[Request]:
        """What the call asks of the sampler, choice by choice. Raises ValueError, BadRecord."""
        raise NotImplementedError

    def answer(self, call: Any, requests: list[Request]) -> Answer:
        """An answer that has not begun."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call, or says why not."""
        begun, status = time.monotonic(), 200

        async def error(problem: ApiError) -> int:
            headers = {"retry-after": "1"} if problem.status == 429 else {}
            await _json(problem.body(), problem.status, headers)(scope, receive, send)
            return problem.status

        try:
            call = self.parse(await _read_json(HttpRequest(scope, receive), self._server.max_body))
            if call.model not in ("", self._server.name):
                raise ApiError(
                    404, f"no model {call.model!r:.80} here, only {self._server.name!r}", "model", "model_not_found"
                )
            await _while_client_stays(receive, self._serve(call, begun, send))
        except ApiError as problem:
            status = await error(problem)
        except ClientDisconnect:
            status = GONE
        except Exception as problem:
            status = await error(_our_fault(problem))
        finally:
            self._server.answers[self.route, status] += 1

    async def _serve(self, call: Call, begun: float, send: Send) -> None:
        """Admission, preparation, answer. Raises only as long as nothing has been sent."""
        server = self._server
        async with contextlib.AsyncExitStack() as stack:
            with _as_api_errors():
                stack.enter_context(server.worker.admit(call.num_requests))
                requests = await asyncio.to_thread(self.requests, call)
                run = await stack.enter_async_context(server.worker.submit(requests))
            answer = self.answer(call, requests)
            choices = self._choices(run, answer, begun)
            if call.stream:
                await _send_stream(send, choices, answer, call.stream_usage)
            else:
                async for _ in choices:
                    pass
        # only now may the client know that it is over: its next call finds the room free
        await (_send_done(send) if call.stream else _send_whole(send, answer.whole()))

    async def _choices(self, run: Run, answer: Answer, begun: float) -> AsyncIterator[int]:
        """Feeds the answer and yields which choice has grown; one that a stop string ended is taken from the engine."""
        first = True
        async for index, event in run.events():
            if first:
                count, seconds = self._server.first_token
                self._server.first_token = count + 1, seconds + time.monotonic() - begun
                first = False
            answer.choices[index].feed(event)
            if answer.choices[index].shown.finish_reason:
                run.stop(index)
            yield index

    def sampling(self, call: Call) -> Sampling:
        """Of the first choice; `max_new_tokens` 0 becomes all the room there is."""
        most = call.sampling.max_new_tokens or self._server.max_sequence_length
        return dataclasses.replace(call.sampling, max_new_tokens=most)


class ChatEndpoint(Endpoint):
    """POST /v1/chat/completions."""

    route = "chat"

    def parse(self, body: Any) -> ChatCall:
        """See Endpoint."""
        return protocol.chat_call(body)

    def requests(self, call: ChatCall) -> list[Request]:
        """One prompt, as often as there are choices."""
        server = self._server
        chat = Chat(call.messages, call.tools, call.thinking, call.preserve_thinking, server.open_address)
        return _choices(chat_request(chat, server.tokenizer, server.config, self.sampling(call)), call.num_choices)

    def answer(self, call: ChatCall, requests: list[Request]) -> ChatAnswer:
        """See Endpoint."""
        return ChatAnswer(call, self._server.name, self._server.tokenizer, requests)


class CompletionEndpoint(Endpoint):
    """POST /v1/completions. A prompt is raw: what spells a special token becomes it."""

    route = "completions"

    def parse(self, body: Any) -> CompletionCall:
        """See Endpoint."""
        return protocol.completion_call(body)

    def requests(self, call: CompletionCall) -> list[Request]:
        """Every prompt, as often as there are choices."""
        server = self._server
        sampling, result = with_stop_tokens(self.sampling(call), server.tokenizer), []
        for prompt in call.prompts:
            ids = server.tokenizer.encode(prompt, allow_special_tokens=True) if isinstance(prompt, str) else prompt
            result += _choices(Request(np.array(ids, np.int32), (), sampling), call.num_choices)
        return result

    def answer(self, call: CompletionCall, requests: list[Request]) -> Answer:
        """See Endpoint."""
        return Answer(call, self._server.name, self._server.tokenizer, requests)


def _choices(request: Request, count: int) -> list[Request]:
    """The request `count` times, with seeds of their own if one is given."""
    seed, sampling = request.sampling.seed, request.sampling
    seeds = [None if seed is None else seed + i for i in range(count)]
    return [dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=seed)) for seed in seeds]


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    """What may go wrong with a call, as what its client is told."""
    try:
        yield
    except BadRecord as error:
        raise ApiError(400, str(error), "messages", error.reason) from error
    except Overloaded as error:
        raise ApiError(429, str(error), code="overloaded") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def _our_fault(problem: Exception) -> ApiError:
    """What a client is told when it did nothing wrong; the log has the rest."""
    if isinstance(problem, EngineFailed):
        return ApiError(503, f"the engine has failed: {problem}", code="engine_failed")
    if isinstance(problem, RequestFailed):
        logging.error("a request failed: %s", problem)
        return ApiError(500, f"this request failed: {problem}", code="request_failed")
    logging.error("a call failed", exc_info=problem)
    return ApiError(500, f"internal error: {type(problem).__name__}")


async def _read_json(request: HttpRequest, max_body: int) -> Any:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > max_body:
            raise ApiError(413, f"the body has more than {max_body} bytes")
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error


async def _while_client_stays(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; when the client goes away first, cancels it and raises ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _send_stream(send: Send, choices: AsyncIterator[int], answer: Answer, usage: bool) -> None:
    """Server-sent events. What goes wrong after the first byte is said in the stream."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        for piece in answer.begin():
            await _send_event(send, piece)
        async for index in choices:
            for piece in answer.pieces(index):
                await _send_event(send, piece)
        if usage:
            await _send_event(send, answer.usage_piece())
    except Exception as problem:
        await _send_event(send, _our_fault(problem).body())


async def _send_done(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send_event(send: Send, event: Mapping[str, Any]) -> None:
    body = b"data: " + json.dumps(event, allow_nan=False).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _send_whole(send: Send, body: Mapping[str, Any]) -> None:
    content = json.dumps(body, allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII JSON: half surrogates of a client's text have no UTF-8."""
    return Response(json.dumps(body, allow_nan=False), status, dict(headers or {}), "application/json")
