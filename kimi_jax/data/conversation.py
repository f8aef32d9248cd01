"""The conversation encoder: messages, tools and media to an `Example`, by the released chat template.

Source: docs/released_model.md section 6, items 1 to 7.

Training data, the terminal chat, the server and evaluation all encode conversations here, so that a model is trained on
the very tokens that it will be asked with.

A message is a dict of the OpenAI kind:
  role               user, assistant, tool, or anything else, which speaks as the system
  name               optional; stands in the header instead of the role
  content            a string, None, or a list of parts: {"type": "text", "text"}, and media under their type, one of
                     image, image_url, video, video_url
  reasoning_content  of an assistant; kept only after its last plain answer, unless `preserve_thinking`
  tool_calls         of an assistant: {"id", "function": {"name", "arguments": a string or an object}}
  tool_call_id       of a tool: which call it answers
  partial            of the last message, an assistant's: the answer continues it (`reasoning` = `reasoning_content`)

Other fields are refused by name, except those of clients that carry nothing (`message_fields`).

Loss mask. `train_on` says what is learned: "all" turns of the assistant, its "last" one, or "none". Learned are the
tokens that the assistant has to write itself: reasoning, `</think>`, content, tool calls with their marks, and the
`<|im_end|>` that ends them. Never learned: headers and the opened `<think>`, which the prompt of an answer already
holds, and what the system, users and tools say. A turn is what stands from behind one plain answer (a message without
tool calls) up to the next: calls, their results, and the answer.
Where something is learned, the last turn of the assistant reads as it did when it was written, with its reasoning;
with "none" it reads as history. Earlier answers have lost their reasoning, as in every later prompt, unless
`preserve_thinking`: their content is then learned behind an empty `<think></think>` that is not.

Only the structure of the template becomes special tokens (`Text.special`), and nothing that a user or a tool wrote. The
released class does otherwise by default: it reads the whole text and takes for a special token whatever spells one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from kimi_jax.data.example import Example, Text, Turns, text_of, token_spans
from kimi_jax.data.media_part import open_part
from kimi_jax.data.message_fields import IMAGE_TYPES, VIDEO_TYPES, MessageError, check_messages
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.tool_declaration import declare_tools

Message: TypeAlias = Mapping[str, Any]
TrainOn: TypeAlias = Literal["last", "all", "none"]

VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"  # not a special token: the template does not open videos


class Mark(str):
    """A piece of a conversation that is a special token."""

    __slots__ = ()


END, USER, ASSISTANT, SYSTEM, MIDDLE = map(
    Mark, ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
)
THINK, THINK_END = Mark("<think>"), Mark("</think>")
CALLS, CALLS_END = Mark("<|tool_calls_section_begin|>"), Mark("<|tool_calls_section_end|>")
CALL, ARGUMENTS, CALL_END = map(Mark, ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"))


def encode(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool = True,
    train_on: TrainOn = "none",
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    media: Callable[[Mapping[str, Any]], Any] = open_part,
    key: str = "",
    sampled: Mapping[int, Sequence[int]] | None = None,
) -> Example:
    """A conversation as text spans with their loss weights (0 or 1), special tokens, and media, in reading order.

    tools:                 OpenAI form; declared in TypeScript (tool_declaration.py).
    thinking:              False: the model answers at once.
    train_on:              what is learned; see the file's docstring.
    preserve_thinking:     keeps the reasoning of earlier answers (the K2.6 argument).
    add_generation_prompt: ends with the header of the answer. None: unless something is learned or the conversation
                           already ends with an answer. One whose last message is `partial` never gets a header.
    media:                 the example's part for a media part of a message; by default the opened Image or Video.
    key:                   names the example in error messages.
    sampled:               messages of the assistant, by number, whose tokens are known: those that were sampled behind
                           the header of the answer, without the `<|im_end|>`. They stand for all that the message
                           says, so that the history is what the model saw; text would be split into other tokens.
    Raises MessageError (a ValueError) for a message or part of another form, for `train_on` with a `partial` message or
    without anything that the assistant wrote, and what `media` raises.
    """
    messages, sampled = list(messages), sampled or {}
    check_messages(messages)
    history, last_answer = _history(messages, train_on)
    spans, calls = _Spans(), 0
    if tools:
        spans.add([SYSTEM, "tool_declare", MIDDLE, declare_tools(tools), END])
    for i, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        continued = i == len(messages) - 1 and is_partial(messages)
        keeps = thinking and (preserve_thinking or i > history or continued)
        learned = is_answer and train_on != "none" and (train_on == "all" or i > history)
        spans.begin(message)
        if i in sampled:
            spans.add([THINK, *([] if thinking else [THINK_END])])
            spans.add_ids(sampled[i], learned)
        elif is_answer:
            spans.add([THINK])
            spans.add([reasoning_of(message) if keeps else ""], learned)
            if not (continued and opens_reasoning(messages, thinking)):
                spans.add([THINK_END], learned and keeps)
        elif message["role"] == "tool":
            spans.add([f"## Return of {message.get('tool_call_id') or ''}\n"])
        called = message.get("tool_calls") if is_answer else None
        if i not in sampled:
            spans.add(_content(message.get("content"), f"messages[{i}].content", media), learned)
            spans.add(_tool_calls(called, calls) if called else [], learned)
        calls += len(called or ())
        spans.add([] if continued else [END], learned)
        if i == last_answer or (is_answer and not called):
            spans.end_turn()
    if add_generation_prompt is None:
        add_generation_prompt = train_on == "none" and (not messages or messages[-1]["role"] != "assistant")
    if add_generation_prompt and not is_partial(messages):
        spans.add([ASSISTANT, "assistant", MIDDLE, THINK, *([] if thinking else [THINK_END])])
    return spans.example(key)


def _history(messages: Sequence[Message], train_on: TrainOn) -> tuple[int, int]:
    """The last answer that is history, whose reasoning is dropped, and the last message of the assistant; -1 for none.

    Raises MessageError for messages that `train_on` cannot learn from.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    plain = [i for i in answers if not messages[i].get("tool_calls")]
    if train_on != "none":
        if is_partial(messages):
            raise MessageError("messages", "end with a partial message, which is no data to learn from")
        if not answers:
            raise MessageError("messages", "hold nothing that the assistant wrote")
        if plain[-1:] == answers[-1:]:
            plain = plain[:-1]  # the answer that is learned reads as it did when it was written
    return max(plain, default=-1), max(answers, default=-1)


class _Spans:
    """The parts of an example while it is written. Neighbouring texts are one to the tokenizer."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._ends: list[int] = []

    def add(self, pieces: Iterable[Any], learned: bool = False) -> None:
        """Pieces: marks, texts, and media parts."""
        for piece in pieces:
            last = self._parts[-1] if self._parts else None
            weight = 1.0 if learned else 0.0
            if not isinstance(piece, str):
                self._parts.append(piece)
            elif isinstance(piece, Mark):
                self._parts.append(Text(str(piece), weight, special=True))
            elif piece and isinstance(last, Text) and not last.special and last.loss_weight == weight:
                self._parts[-1] = Text(last.text + piece, weight)
            elif piece:
                self._parts.append(Text(piece, weight))

    def add_ids(self, ids: Sequence[int], learned: bool) -> None:
        """Tokens whose text is not known."""
        self._parts.append(Text("", 1.0 if learned else 0.0, ids=tuple(ids)))

    def begin(self, message: Message) -> None:
        """The header of a message. The first one that is not the system's begins the first turn."""
        if message["role"] in ("user", "assistant", "tool"):
            self._ends = self._ends or [len(self._parts)]
        opens = {"user": USER, "assistant": ASSISTANT}.get(message["role"], SYSTEM)
        self.add([opens, message.get("name") or message["role"], MIDDLE])

    def end_turn(self) -> None:
        """A turn is over."""
        self._ends.append(len(self._parts))

    def example(self, key: str) -> Example:
        """The whole. What follows the last answer belongs to the last turn."""
        ends = self._ends or [0]
        if ends[-1] != len(self._parts):
            ends = [*(ends if len(ends) == 1 else ends[:-1]), len(self._parts)]
        return Example(tuple(self._parts), key, Turns(tuple(ends)))


def apply_chat_template(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    tokenizer: Tokenizer | None = None,
) -> str | list[int]:
    """The prompt of a conversation: text, or with a tokenizer its ids; one pad an image, a placeholder for a video.

    Raises MessageError as `encode` does, and ValueError for a tokenizer without one of the special tokens.
    """
    parts = encode(
        messages, tools, thinking=thinking, preserve_thinking=preserve_thinking,
        add_generation_prompt=add_generation_prompt, media=_placeholder,
    ).parts  # fmt: skip
    images: list[None] = [None for part in parts if not isinstance(part, Text)]
    if tokenizer is None:
        return text_of(parts, images)
    return [token for span in token_spans(parts, images, tokenizer) for token in span.ids]


def _placeholder(part: Mapping[str, Any]) -> Any:
    """What the template itself writes for media, which it does not open: the part, or of a video only a text."""
    return VIDEO_PLACEHOLDER if part["type"] in VIDEO_TYPES else part


def is_partial(messages: Sequence[Message]) -> bool:
    """Whether the answer continues the last message."""
    return bool(messages) and bool(messages[-1].get("partial"))


def opens_reasoning(messages: Sequence[Message], thinking: bool) -> bool:
    """Whether the prompt ends within the reasoning: not if the answer continues a message that has content already."""
    return thinking and not (is_partial(messages) and messages[-1].get("content"))


def reasoning_of(message: Message) -> str:
    """The reasoning of an assistant's message, under either of its names."""
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _content(content: Any, where: str, media: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    pieces: list[Any] = []
    for i, part in enumerate(content if isinstance(content, Sequence) else [content]):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_TYPES + VIDEO_TYPES:
            pieces += [media(part), "\n"]
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise MessageError(f"{where}[{i}]", f"is neither a text nor an image: {part!r:.100}")
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


def with_released_ids(messages: Sequence[Message], sampled: Container[int] = ()) -> list[Message]:
    """The conversation with its tool calls renumbered as the model knows them, and the answers to them likewise.

    For conversations whose ids another program made up ("call_9f2"): those hide the function's name from the model.
    Calls of one message with one id, or none, get their results in the order of the calls. sampled: numbers of messages
    whose tokens are known, and with them the ids that the model gave its calls: those stay.
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
                if not old or number not in sampled:
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
