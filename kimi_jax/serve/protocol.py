"""What a client may ask, as JSON, checked field by field (the OpenAI API).

A field that would change the answer and is not known here is an error, never ignored; those of `IGNORED` change
nothing. Beyond OpenAI's fields: `thinking` ({"type": "enabled" | "disabled"}), `chat_template_kwargs` (thinking,
preserve_thinking), `stop_token_ids` and `return_token_ids`, and `token_ids` in messages of the assistant.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.config import nearest
from kimi_jax.data.message_fields import MessageError, check_messages
from kimi_jax.infer.request import MAX_TOP_LOGPROBS, Sampling

TOP_P = 0.95  # of the release, like the temperatures below
TEMPERATURES = {True: 1.0, False: 0.6}  # with and without thinking
MAX_CHOICES, MAX_STOPS = 128, 16
MAX_STOP_CHARACTERS = 256  # of one stop string: each is looked for after every token
MAX_STOP_TOKENS = 256
MAX_MESSAGES, MAX_TOOLS = 16384, 1024
MAX_CALLS = 64  # tool calls of an answer that is forced to make some
MAX_USER = 256  # characters that tell users apart
MAX_ERROR = 1000  # characters of a message
# what only the server's operator may see: where an object lies in memory, and a file on the disk
_MEMORY_ADDRESS = re.compile(r"(?: object)?(?: at)? 0x[0-9a-fA-F]+")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/(?:[^\s/'\":,;<>]{1,255}/)+")

IGNORED = frozenset({
    "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "verbosity",
})  # fmt: skip
# fields that exist elsewhere and that nothing here does: accepted with the value that means so
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "modalities": (["text"],), "echo": (False,), "suffix": ("",),
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form. status: of HTTP; param: the field it is about; code: a slug."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = {429: "rate_limit_error", 400: "invalid_request_error", 404: "invalid_request_error"}
        error = {
            "message": public_text(self.message),
            "type": kind.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
            "param": self.param and self.param[:100],
            "code": self.code,
        }
        return {"error": error}


def public_text(text: str) -> str:
    """A message without addresses in memory and without folders of the server, at most MAX_ERROR characters."""
    text = text[:MAX_ERROR]
    return _ABSOLUTE_PATH.sub("", _MEMORY_ADDRESS.sub("", text))


@dataclass(frozen=True)
class ApiCall:
    """What both endpoints share.

    sampling: of the first choice; max_new_tokens 0 means as many as there is room for. num_choices: `n`. user: for whom
    it is, as the client says.
    """

    model: str
    user: str
    sampling: Sampling
    num_choices: int
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    logprobs: bool
    return_token_ids: bool

    @property
    def num_requests(self) -> int:
        """Requests that it makes of the sampler."""
        return self.num_choices


@dataclass(frozen=True)
class ChatCall(ApiCall):
    """A call of /v1/chat/completions; tools is None where none may be called.

    sampled: by number, the messages whose `token_ids` were given; see `infer.generate.Chat`. schema: that the content
    follows, None if it is free. must_call: names of tools, one of which has to be called. most_calls: how many calls
    an answer makes at most that has to follow schemas.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    thinking: bool
    preserve_thinking: bool
    sampled: Mapping[int, tuple[int, ...]]
    schema: Mapping[str, Any] | None
    must_call: tuple[str, ...]
    most_calls: int


@dataclass(frozen=True)
class CompletionCall(ApiCall):
    """A call of /v1/completions; a prompt is a text or its token ids, and each gets `num_choices` answers."""

    prompts: tuple[str | tuple[int, ...], ...]

    @property
    def num_requests(self) -> int:
        """Requests that it makes of the sampler."""
        return self.num_choices * len(self.prompts)


class Fields:
    """Takes the fields of a JSON object one by one, each checked; `finish` refuses what nobody took.

    A field that is null counts as absent. Every method raises ApiError(400) that names the field.
    """

    def __init__(self, body: Any, where: str = ""):
        if not isinstance(body, Mapping):
            raise ApiError(400, f"{where or 'the body'} must be a JSON object, not {_kind(body)}", where or None)
        self._body, self._where, self._taken = dict(body), f"{where}." if where else "", {*IGNORED, *NEUTRAL}
        for name, values in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in values:
                raise self._error(name, f"{reprlib.repr(body[name])} is not supported here, only {values[0]!r}")

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a field, which must be of this kind (bool is no number here)."""
        self._taken.add(name)
        value = self._body.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self._error(name, f"must be {' or '.join(_NAMES[k] for k in kinds)}, not {_kind(value)}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> Any:
        """A number from low to high."""
        value = self.take(name, (int, float), default)
        if value is not None and not low <= value <= high:
            raise self._error(name, f"must be from {low:g} to {high:g}, not {reprlib.repr(value)}")
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        """A whole number from low to high."""
        value = self.take(name, int, default)
        if value is not None and not low <= value <= high:
            raise self._error(name, f"must be from {low} to {high}, not {reprlib.repr(value)}")
        return value

    def objects(self, name: str, most: int) -> list[dict[str, Any]] | None:
        """A list of at most `most` JSON objects."""
        values = self.take(name, list)
        if values and len(values) > most:
            raise self._error(name, f"has {len(values)} entries, more than {most}")
        for i, value in enumerate(values or ()):
            if not isinstance(value, dict):
                raise self._error(name, f"[{i}] must be an object, not {_kind(value)}")
        return values

    def fields(self, name: str) -> Fields:
        """The fields of an object within this one."""
        return Fields(self.take(name, dict, {}), self._where + name)

    def finish(self) -> None:
        """Raises ApiError(400) for a field nobody asked for."""
        for name in self._body.keys() - self._taken:
            if self._body[name] is not None:
                raise self._error(name, f"is not known here{nearest(name[:60], self._taken)}", "unknown_parameter")

    def _error(self, name: str, reason: str, code: str | None = None) -> ApiError:
        return ApiError(400, f"{self._where}{name[:60]} {reason}", self._where + name[:60], code)


_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def chat_call(body: Any) -> ChatCall:
    """A body of /v1/chat/completions. Raises ApiError(400)."""
    fields = Fields(body)
    messages, tools = fields.objects("messages", MAX_MESSAGES), fields.objects("tools", MAX_TOOLS)
    if not messages:
        raise ApiError(400, "messages must hold at least one message", "messages")
    sampled = {i: _sampled(message, i) for i, message in enumerate(messages) if message.get("token_ids") is not None}
    messages = [{name: message[name] for name in message if name != "token_ids"} for message in messages]
    try:
        check_messages(messages)
    except MessageError as error:
        raise ApiError(400, str(error), error.where) from error
    thinking, preserve = _thinking(fields)
    logprobs = fields.take("logprobs", bool, False)
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    most = fields.integer("max_tokens", None, 1, 1 << 31)
    most = fields.integer("max_completion_tokens", most, 1, 1 << 31)
    shared = _shared(fields, TEMPERATURES[thinking], most or 0, top, logprobs)
    schema, parallel = _response_format(fields), fields.take("parallel_tool_calls", bool, True)
    usable, must_call, named = _tool_choice(fields, tools or [], schema is not None)
    fields.finish()
    return ChatCall(
        **shared, messages=messages, tools=usable or None, thinking=thinking, preserve_thinking=preserve,
        sampled=sampled, schema=schema, must_call=must_call, most_calls=MAX_CALLS if parallel and not named else 1,
    )  # fmt: skip


def _response_format(fields: Fields) -> Mapping[str, Any] | None:
    """The JSON schema that the content has to follow, None for none."""
    given = fields.fields("response_format")
    kind = given.take("type", str, "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise ApiError(400, f"response_format.type must be text, json_object or json_schema, not {kind!r:.40}",
                       "response_format.type")  # fmt: skip
    schema = None
    if kind == "json_schema":
        inner = given.fields("json_schema")
        schema = inner.take("schema", dict)
        if schema is None:
            raise ApiError(400, "response_format.json_schema.schema is missing", "response_format.json_schema.schema")
        for name, form in (("name", str), ("description", str), ("strict", bool)):  # it is always strict
            inner.take(name, form)
        inner.finish()
    given.finish()
    return {"type": "object"} if kind == "json_object" else schema


def _tool_choice(
    fields: Fields, tools: list[dict[str, Any]], constrained: bool
) -> tuple[list[dict[str, Any]], tuple[str, ...], bool]:
    """The tools that may be called, the names of which one must be, whether the call names it.

    constrained: calls have to follow the tools' schemas, even if none must be made.
    """
    choice = fields.take("tool_choice", (str, dict), "auto")
    if choice == "none":
        return [], (), False
    names = _function_names(tools) if constrained or choice != "auto" else []
    if choice == "auto":
        return tools, (), False
    if choice == "required" and names:
        return tools, tuple(names), False
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if isinstance(named, dict) and named.get("name") in names:
        return tools, (named["name"],), True
    problem = "names no tool of this call" if named else "must be auto, none, required or name a function of tools"
    raise ApiError(400, f"tool_choice {problem}", "tool_choice")


def _function_names(tools: list[dict[str, Any]]) -> list[str]:
    names = []
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"tools[{i}].function needs a name", f"tools[{i}]")
        if not isinstance(function.get("parameters"), dict | None):
            raise ApiError(400, f"tools[{i}].function.parameters must be an object", f"tools[{i}]")
        names.append(function["name"])
    return names


def _sampled(message: Mapping[str, Any], number: int) -> tuple[int, ...]:
    """The tokens that an earlier answer consisted of, given back with it."""
    where, ids = f"messages[{number}].token_ids", message["token_ids"]
    if message.get("role") != "assistant" or message.get("partial"):
        raise ApiError(400, f"{where} is for whole messages of the assistant", where)
    return _ids(ids if isinstance(ids, list) else [None], where)


def completion_call(body: Any) -> CompletionCall:
    """A body of /v1/completions. Raises ApiError(400)."""
    fields = Fields(body)
    prompts = _prompts(fields.take("prompt", (str, list)))
    top = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    most = fields.integer("max_tokens", 16, 1, 1 << 31)
    shared = _shared(fields, TEMPERATURES[True], most, top or 0, top is not None)
    best = fields.integer("best_of", shared["num_choices"], 1, MAX_CHOICES)
    if best != shared["num_choices"]:
        raise ApiError(400, "best_of must equal n: nothing is chosen here", "best_of")
    fields.finish()
    return CompletionCall(**shared, prompts=prompts)


def _shared(fields: Fields, temperature: float, most: int, top: int, logprobs: bool) -> dict[str, Any]:
    options = fields.fields("stream_options")
    usage = options.take("include_usage", bool, False)
    options.take("include_obfuscation", bool)
    options.finish()
    sampling = Sampling(
        temperature=float(fields.number("temperature", temperature, 0.0, 100.0)),
        top_p=float(fields.number("top_p", TOP_P, 1e-6, 1.0)),
        seed=fields.integer("seed", None, -(1 << 63), (1 << 63) - 1),
        max_new_tokens=most,
        stop_ids=_stop_ids(fields.take("stop_token_ids", list, [])),
        top_logprobs=top,
        logprobs=logprobs,
    )
    users = [fields.take(name, str, "") for name in ("user", "safety_identifier")]  # the latter is the newer name
    return {
        "model": fields.take("model", str, ""),
        "user": (users[0] or users[1])[:MAX_USER],
        "sampling": sampling,
        "num_choices": fields.integer("n", 1, 1, MAX_CHOICES),
        "stop": _stops(fields.take("stop", (str, list), [])),
        "stream": fields.take("stream", bool, False),
        "stream_usage": usage,
        "logprobs": logprobs,
        "return_token_ids": fields.take("return_token_ids", bool, False),
    }


def _thinking(fields: Fields) -> tuple[bool, bool]:
    """(thinking, preserve_thinking): as the makers' own service is asked, or as other servers are."""
    official, template = fields.fields("thinking"), fields.fields("chat_template_kwargs")
    kind = official.take("type", str, "enabled")
    if kind not in ("enabled", "disabled"):
        raise ApiError(400, f"thinking.type must be enabled or disabled, not {kind!r:.40}", "thinking.type")
    thinking = template.take("thinking", bool, kind == "enabled")
    preserve = template.take("preserve_thinking", bool, False)
    official.finish()
    template.finish()
    return thinking, preserve


def _stops(value: str | list[Any]) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, f"stop must be a string or at most {MAX_STOPS} of them, none empty", "stop")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ApiError(400, f"a stop string has at most {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(stops)


def _stop_ids(values: list[Any]) -> tuple[int, ...]:
    if len(values) > MAX_STOP_TOKENS:  # each is compared with every token
        raise ApiError(400, f"stop_token_ids has {len(values)} ids, more than {MAX_STOP_TOKENS}", "stop_token_ids")
    return _ids(values, "stop_token_ids")


def _ids(values: list[Any], name: str) -> tuple[int, ...]:
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 for value in values):
        raise ApiError(400, f"{name} must be a list of token ids", name)
    return tuple(values)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, ids, or a list of either."""
    several = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    if value is None or value == [] or len(several) > MAX_CHOICES:
        raise ApiError(400, f"prompt must be a text or token ids, or up to {MAX_CHOICES} of either", "prompt")
    prompts = []
    for one in several:
        if not isinstance(one, (str, list)) or not one:
            raise ApiError(400, "every prompt must be a text or token ids, and not empty", "prompt")
        prompts.append(one if isinstance(one, str) else _ids(one, "prompt"))
    return tuple(prompts)
