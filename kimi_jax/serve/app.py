"""The HTTP side: routes, errors, streams, clients that go away (the OpenAI API).

A call that finds no room is refused before its body is read (429). Its body is read within limits of time and memory,
checked (400), and admitted with as many requests as it makes. Remote media are fetched by the event loop; helper
threads plan and decode media; the engine accepts the requests (400 again: only it knows its room). Whatever ends the
call early, its slots and its memory are freed: every step is a context that closes what it opened.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_jax.config import ModelConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.media_part import media_urls
from kimi_jax.data.processor import PromptLimits
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import Chat, chat_request, with_stop_tokens
from kimi_jax.infer.line import Caller
from kimi_jax.infer.request import Grammar, Request, Sampling
from kimi_jax.serve import protocol
from kimi_jax.serve.answer import ApiAnswer, ChatAnswer
from kimi_jax.serve.body import VALUE_BYTES, count_values, parse_json, read_body
from kimi_jax.serve.budget import MemoryBudget, Reservation
from kimi_jax.serve.grammar import Grammars, grammar_text
from kimi_jax.serve.guard import Guard, declared_length, refuse
from kimi_jax.serve.protocol import ApiCall, ApiError, ChatCall, CompletionCall
from kimi_jax.serve.remote import Fetcher, IPNetwork
from kimi_jax.serve.urls import is_remote, opener
from kimi_jax.serve.weights import MAX_BODY, WeightsFolder
from kimi_jax.serve.worker import EngineFailed, EngineWorker, Overloaded, RequestFailed, Submission

GONE = 499  # what proxies call a client that did not wait
PREPARING_THREADS = 4  # that parse bodies and decode media; others wait
MAX_REMOTE = 32  # remote URLs in one call
T = TypeVar("T")


@dataclass
class Server:
    """What the routes share.

    name: of the model, as clients call it. max_sequence_length: of the engine. media_folder: images and videos below it
    may be named by path; "" for none. remote: whether http URLs are fetched; allowed_networks: which of the
    networks that are not public those may reach. api_key: "" for none. max_body: bytes of a request's body.
    max_memory: bytes for the bodies and media of all requests. body_seconds: for a body to arrive. weights: where
    a call may take other weights from; None: there is no such call.
    """

    name: str
    tokenizer: Tokenizer
    config: ModelConfig
    worker: EngineWorker
    max_sequence_length: int
    media_folder: str = ""
    remote: bool = False
    allowed_networks: Sequence[IPNetwork] = ()
    api_key: str = ""
    max_body: int = 64 << 20
    max_memory: int = 2 << 30
    body_seconds: float = 60.0
    weights: WeightsFolder | None = None
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # (route, status) -> how many
    first_token: tuple[int, float] = (0, 0.0)  # how many answers began, and their seconds from call to first token
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.memory = MemoryBudget(self.max_memory)
        vocabulary = range(self.tokenizer.vocab_size)
        longest = max(len(self.tokenizer.decode_bytes([i])) for i in vocabulary)
        self.max_characters = longest * self.max_sequence_length
        self._threads = concurrent.futures.ThreadPoolExecutor(PREPARING_THREADS, "prepare")
        self.fetcher: Fetcher | None = None
        self.grammars: Grammars | None = None

    def app(self) -> Guard:
        """The ASGI application; the engine's thread lives as long as its lifespan."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.fetcher = Fetcher(self.allowed_networks) if self.remote else None
            self.grammars = Grammars(self.tokenizer)
            self.worker.start()
            try:
                yield
            finally:
                await self.worker.stop()
                await asyncio.to_thread(self.grammars.close)
                self._threads.shutdown(wait=False, cancel_futures=True)
                if self.fetcher:
                    self.fetcher.close()

        routes = [
            Route("/v1/chat/completions", ChatEndpoint(self), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(self), methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            *([Route("/v1/weights", self.change_weights, methods=["POST"])] if self.weights else []),
        ]
        answering = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
        return Guard(WithVersion(answering, self.worker), self.api_key)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns, from one of the threads that prepare calls."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models: the one there is."""
        return _json({"object": "list", "data": [self._description()]})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/{id}: that one."""
        if request.path_params["model"] != self.name:
            problem = self.unknown_model(request.path_params["model"])
            return _json(problem.body(), problem.status)
        return _json(self._description())

    def _description(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "kimi_jax"}
        return {**model, "max_model_len": self.max_sequence_length}

    def unknown_model(self, name: str) -> ApiError:
        """What is said about a model that is not here."""
        return ApiError(404, f"no model {name!r:.80} here, only {self.name!r}", "model", "model_not_found")

    async def change_weights(self, request: HttpRequest) -> Response:
        """POST /v1/weights: go on with those of another checkpoint."""
        assert self.weights is not None
        declared = declared_length(request.scope)
        try:
            with _as_api_errors():
                body = await read_body(request.receive, declared, MAX_BODY, self.body_seconds, lambda _: None)
                return _json(await self.weights.change(parse_json(body), self.worker))
        except ApiError as problem:
            return _json(problem.body(), problem.status)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as problem:
            return _json(_our_fault(problem).body(), _our_fault(problem).status)

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
        lines += ["# TYPE kimi_weight_version gauge", f"kimi_weight_version {self.worker.version}"]
        lines += ["# TYPE kimi_memory_bytes gauge", f"kimi_memory_bytes {self.memory.used}"]
        lines += ["# TYPE kimi_first_token_seconds summary", f"kimi_first_token_seconds_sum {seconds:.6f}"]
        lines += [f"kimi_first_token_seconds_count {count}"]
        for name, value in self.worker.stats.items():
            gauge = name in ("waiting", "running", "free_pages", "cached_pages")
            name = f"kimi_engine_{name}" if gauge else f"kimi_engine_{name}_total"
            lines += [f"# TYPE {name} {'gauge' if gauge else 'counter'}", f"{name} {value}"]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


class WithVersion:
    """An ASGI application around another. X-Weight-Version: the weights that the server has when it begins to answer,
    so that who collects rollouts knows of new ones, and of a server that stayed behind, from any answer."""

    def __init__(self, app: ASGIApp, worker: EngineWorker):
        self._app, self._worker = app, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on, and its answer with one header more."""

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                version = b"x-weight-version", str(self._worker.version).encode()
                message = {**message, "headers": [*message.get("headers", ()), version]}
            await send(message)

        await self._app(scope, receive, send_with_version)


class Endpoint:
    """An ASGI application for one kind of call."""

    route = ""

    def __init__(self, server: Server):
        self._server = server

    def parse(self, body: Any) -> ApiCall:
        """The call a body makes. Raises ApiError(400)."""
        raise NotImplementedError

    def requests(self, call: Any, fetched: Mapping[str, bytes], memory: Reservation) -> list[Request]:
        """What the call asks of the sampler, choice by choice. fetched: the bytes of its remote URLs.

        Raises ValueError, BadRecord, Overloaded.
        """
        raise NotImplementedError

    def answer(self, call: Any, requests: list[Request]) -> ApiAnswer:
        """An answer that has not begun."""
        raise NotImplementedError

    async def grammar(self, call: Any) -> Grammar | None:
        """What the answers may say; None: anything. Raises ApiError(400)."""
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call, or says why not."""
        begun, status, unread = time.monotonic(), 200, True
        server, place = self._server, (scope.get("client") or ("", 0))[0]
        try:
            async with contextlib.AsyncExitStack() as stack:
                with _as_api_errors():
                    stack.enter_context(server.worker.admit(1, place))
                    memory = stack.enter_context(server.memory.reservation())
                    body = await read_body(
                        receive, declared_length(scope), server.max_body, server.body_seconds, memory.change
                    )
                    unread = False
                    memory.change(VALUE_BYTES * await server.in_thread(count_values, body))
                    call = self.parse(await server.in_thread(parse_json, body))
                    del body
                    if call.model not in ("", server.name):
                        raise server.unknown_model(call.model)
                    stack.enter_context(server.worker.admit(call.num_requests - 1, place))
                work = self._serve(call, (place, call.user), begun, memory, send, stack)
                await _while_client_stays(receive, work)
        except ApiError as problem:
            status = problem.status
            await refuse(problem, receive, send, unread)
        except ClientDisconnect:
            status = GONE
        except Exception as problem:
            status = _our_fault(problem).status
            await refuse(_our_fault(problem), receive, send, unread)
        finally:
            server.answers[self.route, status] += 1

    async def _serve(
        self,
        call: ApiCall,
        caller: Caller,
        begun: float,
        memory: Reservation,
        send: Send,
        room: contextlib.AsyncExitStack,
    ) -> None:
        """Preparation, answer. Raises only as long as nothing has been sent. room: what is closed before the end."""
        server = self._server
        async with room:
            with _as_api_errors():
                fetched = await self._fetch(call, memory)
                grammar = await self.grammar(call)
                requests = await server.in_thread(self.requests, call, fetched, memory)
                requests = [dataclasses.replace(request, grammar=grammar) for request in requests]
                run = await room.enter_async_context(server.worker.submit(requests, caller))
            answer = self.answer(call, requests)
            choices = self._choices(run, answer, begun)
            if call.stream:
                await _send_stream(send, choices, answer, call.stream_usage)
            else:
                async for _ in choices:
                    pass
        # only now may the client know that it is over: its next call finds the room free
        await (_send_done(send) if call.stream else _send_whole(send, answer.whole()))

    async def _fetch(self, call: ApiCall, memory: Reservation) -> dict[str, bytes]:
        """The bytes of the call's remote URLs. Raises BadRecord, ApiError, Overloaded."""
        fetcher = self._server.fetcher
        if not fetcher or not isinstance(call, ChatCall):
            return {}
        urls = list(dict.fromkeys(filter(is_remote, media_urls(call.messages))))
        if len(urls) > MAX_REMOTE:
            raise ApiError(400, f"more than {MAX_REMOTE} remote URLs in one call", "messages")
        tasks = [asyncio.ensure_future(fetcher.fetch(url, memory.change)) for url in urls]
        try:
            return dict(zip(urls, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()

    async def _choices(self, run: Submission, answer: ApiAnswer, begun: float) -> AsyncIterator[int]:
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

    def sampling(self, call: ApiCall) -> Sampling:
        """Of the first choice; `max_new_tokens` 0 becomes all the room there is."""
        most = call.sampling.max_new_tokens or self._server.max_sequence_length
        return dataclasses.replace(call.sampling, max_new_tokens=most)


class ChatEndpoint(Endpoint):
    """POST /v1/chat/completions."""

    route = "chat"

    def parse(self, body: Any) -> ChatCall:
        """See Endpoint."""
        return protocol.chat_call(body)

    def requests(self, call: ChatCall, fetched: Mapping[str, bytes], memory: Reservation) -> list[Request]:
        """One prompt, as often as there are choices."""
        server = self._server
        open_url = opener(server.media_folder, fetched, memory.change)
        limits = PromptLimits(server.max_sequence_length, server.max_characters, memory.change)
        chat = Chat(call.messages, call.tools, call.thinking, call.preserve_thinking, open_url, limits, call.sampled)
        return _choices(chat_request(chat, server.tokenizer, server.config, self.sampling(call)), call.num_choices)

    async def grammar(self, call: ChatCall) -> Grammar | None:
        """Of a schema, or a tool that must be called."""
        server = self._server
        text = grammar_text(call, server.tokenizer)
        if text is None:
            return None
        assert server.grammars is not None
        return await server.grammars.compile(text)

    def answer(self, call: ChatCall, requests: list[Request]) -> ChatAnswer:
        """See Endpoint."""
        return ChatAnswer(call, self._server.name, self._server.tokenizer, requests)


class CompletionEndpoint(Endpoint):
    """POST /v1/completions. A prompt is raw: what spells a special token becomes it."""

    route = "completions"

    def parse(self, body: Any) -> CompletionCall:
        """See Endpoint."""
        return protocol.completion_call(body)

    def requests(self, call: CompletionCall, fetched: Mapping[str, bytes], memory: Reservation) -> list[Request]:
        """Every prompt, as often as there are choices."""
        server = self._server
        limits = PromptLimits(server.max_sequence_length, server.max_characters, memory.change)
        for prompt in call.prompts:  # before the first of them is encoded
            if isinstance(prompt, str):
                limits.check_text([prompt])
            else:
                limits.check_tokens(len(prompt))
        sampling, result = with_stop_tokens(self.sampling(call), server.tokenizer), []
        for prompt in call.prompts:
            ids = server.tokenizer.encode(prompt, allow_special_tokens=True) if isinstance(prompt, str) else prompt
            result += _choices(Request(np.array(ids, np.int32), (), sampling), call.num_choices)
        return result

    def answer(self, call: CompletionCall, requests: list[Request]) -> ApiAnswer:
        """See Endpoint."""
        return ApiAnswer(call, self._server.name, self._server.tokenizer, requests)


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
    except MemoryError as error:
        raise ApiError(413, "this request needs more memory than there is", code="too_large") from error
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


async def _no_route(_: HttpRequest, error: Exception) -> Response:
    """What is at no route, or answers another method, as OpenAI's errors are."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    return _json(ApiError(status, str(detail)).body(), status)


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


async def _send_stream(send: Send, choices: AsyncIterator[int], answer: ApiAnswer, usage: bool) -> None:
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
