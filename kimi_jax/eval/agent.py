"""An agent loop for evaluation: the model answers or calls tools, its calls are run, and their results are appended.

Everything that comes from the model or from a tool is bounded before it is used, and nothing of it raises: a call of an
unknown tool, malformed arguments, a tool that fails and a result that is too long are results that the model reads.
`run` takes any function from messages to a `Reply`; `engine_replies` makes one of an engine.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from kimi_jax.data import BadRecord
from kimi_jax.data.conversation import Message
from kimi_jax.data.media_part import open_part
from kimi_jax.data.message_fields import IMAGE_TYPES, VIDEO_TYPES
from kimi_jax.data.reply import Reply, ToolCall
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import Chat, answer, chat_request
from kimi_jax.infer.request import Sampling

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine

Tool: TypeAlias = Callable[..., Any]
Declarations: TypeAlias = Sequence[Mapping[str, Any]]
Replies: TypeAlias = Callable[[Sequence[Message], Declarations], Reply]


class Outcome(StrEnum):
    """How an episode ended."""

    ANSWERED = "answered"  # a message without tool calls, ended by the model itself
    CUT_OFF = "cut_off"  # a message longer than the sampler allows
    OUT_OF_TURNS = "out_of_turns"  # the last turn that was allowed still called tools
    CONTEXT_FULL = "context_full"  # the conversation has become longer than the sampler takes


class CallResult(StrEnum):
    """What became of a tool call."""

    OK = "ok"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"  # no JSON object, or not what the tool takes
    FAILED = "failed"  # the tool raised, or returned what is no result
    REFUSED = "refused"  # one call too many in one message


class ContextFull(Exception):
    """The conversation is longer than the sampler takes."""


@dataclass(frozen=True)
class EpisodeLimits:
    """Bounds of an episode.

    turns: replies of the model. calls: that are run of one reply. characters: of the text of one result; what is beyond
    is cut off, and the result says so. media: images and videos of one result.
    """

    turns: int = 16
    calls: int = 16
    characters: int = 8192
    media: int = 8


@dataclass(frozen=True)
class CallOutcome:
    """A tool call and what became of it."""

    call: ToolCall
    result: CallResult


@dataclass(frozen=True)
class AgentEpisode:
    """What happened. messages: the whole conversation, as the encoder takes it; answer: the last reply's content."""

    outcome: Outcome
    messages: tuple[Message, ...]
    answer: str
    calls: tuple[CallOutcome, ...]
    turns: int


def run(
    replies: Replies,
    messages: Sequence[Message],
    tools: Mapping[str, Tool],
    declarations: Declarations = (),
    limits: EpisodeLimits | None = None,
) -> AgentEpisode:
    """Runs an episode until the model answers or a limit ends it.

    replies: the model. tools: what a call's name runs, with the call's arguments by keyword; a tool returns a text, a
    value that JSON can hold, or a list of message parts (media as PIL images, arrays, bytes or data URIs).
    declarations: the tools as the model is told of them.
    """
    limits = limits or EpisodeLimits()
    conversation: list[Message] = list(messages)
    calls: list[CallOutcome] = []
    for turn in range(1, limits.turns + 1):
        try:
            reply = replies(conversation, declarations)
        except ContextFull:
            return AgentEpisode(Outcome.CONTEXT_FULL, tuple(conversation), "", tuple(calls), turn - 1)
        conversation.append(reply.message())
        if not reply.tool_calls or not reply.finished:
            outcome = Outcome.ANSWERED if reply.finished else Outcome.CUT_OFF
            return AgentEpisode(outcome, tuple(conversation), reply.content, tuple(calls), turn)
        for number, call in enumerate(reply.tool_calls):
            result, content = _run_call(call, tools, limits) if number < limits.calls else _refused(limits)
            calls.append(CallOutcome(call, result))
            conversation.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return AgentEpisode(Outcome.OUT_OF_TURNS, tuple(conversation), "", tuple(calls), limits.turns)


def _run_call(call: ToolCall, tools: Mapping[str, Tool], limits: EpisodeLimits) -> tuple[CallResult, Any]:
    arguments = call.parsed
    if arguments is None:
        return CallResult.BAD_ARGUMENTS, _text(f"error: {call.error}", limits)
    if call.name not in tools:
        return CallResult.UNKNOWN_TOOL, _text(f"error: there is no tool {call.name!r}, only {sorted(tools)}", limits)
    try:
        inspect.signature(tools[call.name]).bind(**arguments)
    except TypeError as error:
        return CallResult.BAD_ARGUMENTS, _text(f"error: {error}", limits)
    try:
        return CallResult.OK, _content(tools[call.name](**arguments), limits)
    except Exception as error:  # whatever a tool raises is for the model to read
        return CallResult.FAILED, _text(f"error: {type(error).__name__}: {error}", limits)


def _refused(limits: EpisodeLimits) -> tuple[CallResult, str]:
    return CallResult.REFUSED, f"error: not run: at most {limits.calls} calls in one message"


def _content(value: Any, limits: EpisodeLimits) -> Any:
    """The content of a tool's message. Raises ValueError, TypeError, BadRecord for what is no result."""
    if not isinstance(value, list) or not all(isinstance(part, Mapping) and "type" in part for part in value):
        return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limits)
    left, media, parts = limits.characters, 0, []
    for part in value:
        if part["type"] in IMAGE_TYPES + VIDEO_TYPES:
            media += 1
            if media > limits.media:
                raise ValueError(f"more than {limits.media} images and videos in one result")
            open_part(part)  # what is broken is the tool's failure, not that of the next prompt
            parts.append(part)
        elif left > 0:
            text = str(part.get("text") or "")
            parts.append({"type": "text", "text": _text(text, limits, left)})
            left -= len(text)
    return parts


def _text(text: str, limits: EpisodeLimits, room: int | None = None) -> str:
    return shorten(text, limits.characters if room is None else room)


def shorten(text: str, room: int) -> str:
    """A tool's text, truncated behind `room` characters, which it then says."""
    return text if len(text) <= room else f"{text[:room]}\n[truncated: {len(text):,} characters, {room:,} are shown]"


def engine_replies(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling, thinking: bool = True, max_tokens: int | None = None
) -> Replies:
    """The replies of an engine that has nothing else to do.

    max_tokens: of a prompt; None: what the engine takes. Raises ContextFull beyond it, and as `generate.answer` does.
    """
    most = engine.max_sequence_length if max_tokens is None else max_tokens

    def replies(messages: Sequence[Message], declarations: Declarations) -> Reply:
        chat = Chat(messages, declarations or None, thinking)
        try:
            request = chat_request(chat, tokenizer, engine.config, sampling)
        except BadRecord as bad:
            if bad.reason == "too_long":
                raise ContextFull(str(bad)) from bad
            raise
        if len(request.token_ids) >= most:
            raise ContextFull(f"a prompt of {len(request.token_ids)} tokens; at most {most - 1} leave room for a reply")
        return answer(engine, request, tokenizer, chat.reasons)

    return replies
