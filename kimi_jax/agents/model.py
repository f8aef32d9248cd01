"""Models that an agent can ask: an OpenAI-compatible endpoint or a script; the local engine is in `local_model.py`.

A model gets a `ModelRequest` and gives a `Response`, or raises one of the errors below. It never retries: the runtime
does, because only it knows what else is running.
"""

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from kimi_jax.agents.events import NOTHING, Usage
from kimi_jax.untrusted import parse_object

MAX_ANSWER = 1 << 24  # bytes of an endpoint's answer
MAX_CALLS = 256  # tool calls of one turn that are looked at
MAX_COUNT = 1 << 40  # no endpoint counts more tokens than this

Message = dict[str, Any]  # in OpenAI form
Declaration = dict[str, Any]  # of a tool: name, description, parameters


class ModelError(ValueError):
    """The model cannot answer this request; asking again would not help."""


class Unavailable(ModelError):
    """The model did not answer; asking later may help. retry_after: seconds that it asked for, 0 if it said nothing."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Unavailable):
    """There were too many requests (status 429, or 503): fewer have to run at a time."""


@dataclass(frozen=True)
class Call:
    """A tool call. arguments: JSON text as the model wrote it, not checked yet."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ModelRequest:
    """What an agent asks. max_tokens: of the answer; it is no part of the request's identity (see `journal.py`)."""

    agent: str
    messages: Sequence[Message]
    tools: Sequence[Declaration]
    max_tokens: int


@dataclass(frozen=True)
class Response:
    """An answer. tokens: what RL needs of a local model (ids of prompt and answer, log-probabilities), else empty."""

    text: str
    calls: tuple[Call, ...] = ()
    usage: Usage = NOTHING
    reasoning: str = ""
    finish: str = "stop"
    tokens: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> Message:
        """The assistant message that goes into the conversation, with the ids of its tokens where they are known."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.tokens:
            message["token_ids"] = list(self.tokens["sampled"])
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


@runtime_checkable
class AgentModel(Protocol):
    """Anything that answers. name: goes into the journal; a replay refuses another one."""

    name: str

    async def complete(self, request: ModelRequest) -> Response: ...


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ValueError(f"prices are dollars for a million tokens, at least 0, not {self}")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class ScriptedModel:
    """A model that is a function of the request; what the tests, the demo and robustness experiments run on."""

    def __init__(self, answer: Callable[[ModelRequest], Awaitable[Response]], name: str = "scripted"):
        self.name, self._answer = name, answer
        self.asked = 0

    async def complete(self, request: ModelRequest) -> Response:
        self.asked += 1
        return await self._answer(request)


class EndpointModel:
    """An OpenAI-compatible endpoint, by the official client without its retries.

    base_url: with the version, for example http://127.0.0.1:8000/v1. timeout: seconds of one request.
    Answers are read up to MAX_ANSWER bytes and taken apart field by field.
    """

    def __init__(
        self, base_url: str, model: str, api_key: str = "none", timeout: float = 600.0, temperature: float = 1.0
    ):
        import openai  # costs a second

        self.name = model
        self._temperature = temperature
        self._errors = openai
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout)

    async def complete(self, request: ModelRequest) -> Response:
        tools = [{"type": "function", "function": dict(tool)} for tool in request.tools]
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": self._temperature,
        }
        try:
            create: Any = self._client.chat.completions.with_streaming_response.create
            async with create(**body, **({"tools": tools} if tools else {})) as response:
                data = bytearray()
                async for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        raise ModelError(f"the endpoint's answer is larger than {MAX_ANSWER} bytes")
        except self._errors.APIStatusError as error:
            raise _status_error(error.status_code, error.message, error.response.headers) from error
        except self._errors.APIConnectionError as error:
            raise Unavailable(f"no answer from {self._client.base_url}: {error}") from error
        return read_answer(bytes(data))

    async def take_first_name(self) -> None:
        """Names the first model that the endpoint lists. Raises ModelError if it lists none."""
        try:
            async for model in self._client.models.list():
                self.name = str(model.id)[:200]
                return
        except self._errors.APIError as error:
            raise ModelError(f"{self._client.base_url} does not list its models: {error}") from error
        raise ModelError(f"{self._client.base_url} lists no model; name one")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.close()


def _status_error(status: int, message: str, headers: Mapping[str, str]) -> ModelError:
    text = f"status {status}: {message[:1000]}"
    try:
        after = min(max(float(headers.get("retry-after", 0)), 0.0), 3600.0)
    except ValueError:  # a date
        after = 0.0
    if status in (429, 503):
        return RateLimited(text, after)
    return Unavailable(text, after) if status >= 500 or status == 408 else ModelError(text)


def read_answer(data: bytes) -> Response:
    """The JSON answer of a chat completion. Raises ModelError for one of another form."""
    body = parse_object(data, "the endpoint's answer", ModelError)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        calls = tuple(_read_call(call, i) for i, call in enumerate((message.get("tool_calls") or [])[:MAX_CALLS]))
        usage = body.get("usage") or {}
        counted = Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        reasoning = message.get("reasoning_content") or ""
        return Response(
            _text(message.get("content")), calls, counted, _text(reasoning), _text(choice.get("finish_reason"))
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"the endpoint's answer is no chat completion: {error!r:.200}") from error


def _read_call(call: Mapping[str, Any], index: int) -> Call:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some servers parse them
        arguments = json.dumps(arguments)
    return Call(_text(call.get("id")) or f"call_{index}", _text(function["name"]), _text(arguments))


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is no text")
    return value or ""


def _count(value: Any) -> int:
    return min(max(int(value), 0), MAX_COUNT) if isinstance(value, int | float) and math.isfinite(value) else 0
