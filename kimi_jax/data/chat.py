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

The prompt is built of pieces: special tokens (`Mark`) and text. So it can be turned into ids in two ways: the released
one, which reads the whole text and takes for a special token whatever spells one, and a safe one, in which only the
template's own marks become special tokens, and nothing that a user or a tool wrote.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.tool_declaration import declare_tools

Message: TypeAlias = Mapping[str, Any]

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"  # not a special token; the processor puts the chunks there
IMAGE_TYPES, VIDEO_TYPES = ("image", "image_url"), ("video", "video_url")


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
    allow_special_tokens: bool = True,
) -> str | list[int]:
    """The prompt of a conversation: text, or with a tokenizer its ids.

    tools:                 OpenAI form; declared in TypeScript (tool_declaration.py).
    thinking:              False: the model answers at once.
    preserve_thinking:     keeps the reasoning of earlier answers (the K2.6 argument).
    add_generation_prompt: ends with the header of the answer. None: unless the conversation already ends with one.
    allow_special_tokens:  released behaviour; False keeps what messages say text, even if it spells a special token.
    Raises ValueError for a message or part of another form.
    """
    pieces = render(messages, tools, thinking, preserve_thinking, add_generation_prompt)
    if tokenizer is None:
        return "".join(pieces)
    return encode_pieces(pieces, tokenizer, allow_special_tokens)


def encode_pieces(pieces: Sequence[str], tokenizer: Tokenizer, allow_special_tokens: bool = True) -> list[int]:
    """Ids of a prompt; without `allow_special_tokens` only its marks become special tokens."""
    if allow_special_tokens:
        return tokenizer.encode("".join(pieces), allow_special_tokens=True)
    ids: list[int] = []
    for is_mark, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, Mark)):
        # neighbouring texts are one to the tokenizer: words may join over their seam
        ids += tokenizer.encode("".join(group), allow_special_tokens=is_mark)
    return ids


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
    _check(messages)
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
            keep = thinking and i > history
            pieces += [THINK, (message.get("reasoning_content") or "") if keep else "", THINK_END]
        elif role == "tool":
            pieces.append(f"## Return of {message.get('tool_call_id') or ''}\n")
        pieces += _content(message.get("content"), f"messages[{i}].content", media)
        if role == "assistant" and message.get("tool_calls"):
            pieces += _tool_calls(message["tool_calls"], calls)
            calls += len(message["tool_calls"])
        pieces.append(END)
    if add_generation_prompt is None:
        add_generation_prompt = not messages or messages[-1]["role"] != "assistant"
    if add_generation_prompt:
        pieces += [ASSISTANT, "assistant", MIDDLE, THINK, *([] if thinking else [THINK_END])]
    return pieces


def _check(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] is no message: it needs a role, and is {message!r:.100}")
        for key in ("name", "reasoning_content", "tool_call_id"):
            if not isinstance(message.get(key), str | None):
                raise ValueError(f"messages[{i}].{key} is a text, not {message[key]!r:.100}")
        if not isinstance(message.get("tool_calls"), Sequence | None):
            raise ValueError(f"messages[{i}].tool_calls is a list, not {message['tool_calls']!r:.100}")
        for j, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise ValueError(f"messages[{i}].tool_calls[{j}] needs a function with a name")
            if not isinstance(call.get("id"), str | None):
                raise ValueError(f"messages[{i}].tool_calls[{j}].id is a text, not {call['id']!r:.100}")


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
    Raises ValueError for a message of another form.
    """
    _check(list(messages))
    renamed: dict[str, str] = {}
    result: list[Message] = []
    count = 0
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = [dict(call) for call in message["tool_calls"]]
            for call in calls:
                new = call_id(call["function"]["name"], count)
                renamed[call.get("id") or new] = new
                call["id"] = new
                count += 1
            message["tool_calls"] = calls
        elif message.get("role") == "tool":
            old = message.get("tool_call_id") or ""
            message["tool_call_id"] = renamed.get(old, old)
        result.append(message)
    return result
