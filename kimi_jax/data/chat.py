"""The released chat template: a conversation to the prompt, as text or ids.

Source: docs/released_model.md section 6, items 1 to 7.

A message is a dict of the OpenAI kind:
  role               user, assistant, tool, or anything else, which speaks as the system
  name               optional; stands in the header instead of the role
  content            a string, None, or a list of parts: {"type": "text", "text"}, and pictures under their type, one of
                     image, image_url, video, video_url
  reasoning_content  of an assistant; kept only after its last plain answer, unless `preserve_thinking`
  tool_calls         of an assistant: {"id", "function": {"name", "arguments": a string or an object}}
  tool_call_id       of a tool: which call it answers
  partial            of the last message, an assistant's: the answer continues it (`reasoning` = `reasoning_content`)

Other fields are refused by name, except those of clients that carry nothing (`message_fields`).

The prompt is built of pieces: special tokens (`Mark`) and text. Only the template's own marks become special tokens,
and nothing that a user or a tool wrote. The released class does otherwise by default: it reads the whole text and takes
for a special token whatever spells one (`allow_special_tokens`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from kimi_jax.data.message_fields import IMAGE_TYPES, VIDEO_TYPES, MessageError, check_messages
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.tool_declaration import declare_tools

Message: TypeAlias = Mapping[str, Any]

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"  # not a special token; the processor puts the chunks there


class Mark(str):
    """A piece of a prompt that is a special token."""

    __slots__ = ()


END, USER, ASSISTANT, SYSTEM, MIDDLE = map(
    Mark, ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
)
THINK, THINK_END = Mark("<think>"), Mark("</think>")
CALLS, CALLS_END = Mark("<|tool_calls_section_begin|>"), Mark("<|tool_calls_section_end|>")
CALL, ARGUMENTS, CALL_END = map(Mark, ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"))
MEDIA, MEDIA_CONTENT, PAD, MEDIA_END = map(
    Mark, ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
)


def media_pieces(kind: str, stamp: str = "") -> list[str]:
    """The prompt around one image, or one video chunk with its time stamp; one pad, however many features."""
    return [stamp, MEDIA, kind, MEDIA_CONTENT, PAD, MEDIA_END]


def placeholder(part: Mapping[str, Any]) -> list[str]:
    """What the template itself writes for a picture, which it does not open."""
    return [VIDEO_PLACEHOLDER] if part["type"] in VIDEO_TYPES else media_pieces("image")


def apply_chat_template(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    tokenizer: Tokenizer | None = None,
    allow_special_tokens: bool = False,
) -> str | list[int]:
    """The prompt of a conversation: text, or with a tokenizer its ids.

    tools:                 OpenAI form; declared in TypeScript (tool_declaration.py).
    thinking:              False: the model answers at once.
    preserve_thinking:     keeps the reasoning of earlier answers (the K2.6 argument).
    add_generation_prompt: ends with the header of the answer. None: unless the conversation already ends with one.
                           A conversation whose last message is `partial` never gets one.
    allow_special_tokens:  the released class's behaviour: what spells a special token in a message becomes one.
    Raises ValueError for a message or part of another form, and for a tokenizer without one of the markers.
    """
    pieces = render(messages, tools, thinking, preserve_thinking, add_generation_prompt)
    if tokenizer is None:
        return "".join(pieces)
    return encode_pieces(pieces, tokenizer, allow_special_tokens)


def encode_pieces(pieces: Sequence[str], tokenizer: Tokenizer, allow_special_tokens: bool = False) -> list[int]:
    """Ids of a prompt; without `allow_special_tokens` only its marks become special tokens.

    Raises ValueError if the tokenizer lacks one of the marks: spelled in ordinary tokens, anybody could forge it.
    """
    if allow_special_tokens:
        return tokenizer.encode("".join(pieces), allow_special_tokens=True)
    ids: list[int] = []
    for is_mark, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, Mark)):
        # neighbouring texts are one to the tokenizer: words may join over their seam
        together = list(group)
        ids += [_mark_id(tokenizer, mark) for mark in together] if is_mark else tokenizer.encode("".join(together))
    return ids


def _mark_id(tokenizer: Tokenizer, mark: str) -> int:
    media: dict[str, int] = {  # by place, not by name: Kimi-VL calls <|media_begin|> otherwise
        MEDIA: tokenizer.media_begin_id, MEDIA_CONTENT: tokenizer.media_content_id, PAD: tokenizer.media_pad_id,
        MEDIA_END: tokenizer.media_end_id,
    }  # fmt: skip
    return media[mark] if mark in media else tokenizer.special_id(mark)


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    media: Callable[[Mapping[str, Any]], list[str]] = placeholder,
) -> list[str]:
    """`apply_chat_template` as pieces. media: the pieces of a picture part."""
    messages = list(messages)
    check_messages(messages)
    partial = is_partial(messages)
    pieces: list[str] = []
    if tools:
        pieces += [SYSTEM, "tool_declare", MIDDLE, declare_tools(tools), END]
    plain = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
    history = plain[-1] if plain and not preserve_thinking else -1
    calls = 0
    for i, message in enumerate(messages):
        role = message["role"]
        pieces += [{"user": USER, "assistant": ASSISTANT}.get(role, SYSTEM), message.get("name") or role, MIDDLE]
        if role == "assistant":
            continued = partial and i == len(messages) - 1
            keep = thinking and (i > history or continued)
            closed = not (continued and opens_reasoning(messages, thinking))
            pieces += [THINK, reasoning_of(message) if keep else "", *([THINK_END] if closed else [])]
        elif role == "tool":
            pieces.append(f"## Return of {message.get('tool_call_id') or ''}\n")
        pieces += _content(message.get("content"), f"messages[{i}].content", media)
        if role == "assistant" and message.get("tool_calls"):
            pieces += _tool_calls(message["tool_calls"], calls)
            calls += len(message["tool_calls"])
        pieces.append(END)
    if partial:
        return pieces[:-1]
    if add_generation_prompt is None:
        add_generation_prompt = not messages or messages[-1]["role"] != "assistant"
    if add_generation_prompt:
        pieces += [ASSISTANT, "assistant", MIDDLE, THINK, *([] if thinking else [THINK_END])]
    return pieces


def is_partial(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    return bool(messages) and bool(messages[-1].get("partial"))


def opens_reasoning(messages: Sequence[Message], thinking: bool) -> bool:
    """Whether the prompt ends within the reasoning: not if the answer continues a message that has content already."""
    return thinking and not (is_partial(messages) and messages[-1].get("content"))


def reasoning_of(message: Message) -> str:
    """The reasoning of an assistant's message, under either of its names."""
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _content(content: Any, where: str, media: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    pieces: list[str] = []
    for i, part in enumerate(content if isinstance(content, Sequence) else [content]):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_TYPES + VIDEO_TYPES:
            pieces += [*media(part), "\n"]
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise ValueError(f"{where}[{i}] is neither a text nor a picture: {part!r:.100}")
    return pieces


def _tool_calls(calls: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """first: number of the first one in the conversation, for those without an id."""
    pieces: list[str] = [CALLS]
    for i, call in enumerate(calls, first):
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str):
            arguments = "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)
        pieces += [CALL, call.get("id") or call_id(call["function"]["name"], i), ARGUMENTS, arguments, CALL_END]
    return [*pieces, CALLS_END]


def call_id(name: str, index: int) -> str:
    """The id of a tool call, which is how the model names the function. index: from 0 over the whole conversation."""
    return f"functions.{name}:{index}"


def with_released_ids(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its tool calls renumbered as the model knows them, and the answers to them likewise.

    For conversations whose ids another program made up ("call_9f2"): those hide the function's name from the model.
    Calls of one message with one id, or none, get their results in the order of the calls.
    Raises ValueError for a message of another form, and for a result of which it cannot be told whose it is.
    """
    check_messages(messages)
    count = 0
    waiting: list[tuple[str, str]] = []  # (id in the conversation, new id) of the calls without a result, in order
    known: set[str] = set()
    strangers: dict[str, int] = {}  # ids that no call has -> message
    result: list[Message] = []
    for number, message in enumerate(messages):
        message = dict(message)
        if message.get("tool_calls"):
            calls = [dict(call) for call in message["tool_calls"]]
            named = [call.get("id") or "" for call in calls]
            waiting = [pair for pair in waiting if pair[0] not in named]  # the latest call of a name is meant
            for call, old in zip(calls, named, strict=True):
                call["id"] = call_id(call["function"]["name"], count)
                waiting.append((old, call["id"]))
                known.add(old)
                count += 1
            message["tool_calls"] = calls
        elif message.get("role") == "tool":
            old = message.get("tool_call_id") or ""
            pair = next((p for p in waiting if old in (p[0], *([] if p[0] else p[1:]))), None)
            if pair is not None:
                waiting.remove(pair)
                message["tool_call_id"] = pair[1]
            elif old in known or not old:
                reason = f"answers the call {old!r} once more" if old else "is missing, and no call without id waits"
                raise MessageError(
                    f"messages[{number}].tool_call_id", f"{reason}: it cannot be told which call it is of"
                )
            else:
                strangers[old] = number
        result.append(message)
    new = {call["id"] for message in result for call in message.get("tool_calls") or ()}
    for old in strangers.keys() & new:
        raise MessageError(f"messages[{strangers[old]}].tool_call_id", f"{old!r} is of no call of this conversation")
    return result
