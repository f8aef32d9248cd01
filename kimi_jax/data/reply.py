"""What the model wrote, taken apart: reasoning, answer, tool calls.

Source: docs/released_model.md sections 6 and 8, items 5 and 6.

  thinking   ... </think> answer <|tool_calls_section_begin|> calls <|tool_calls_section_end|> <|im_end|>
  instant    answer, then the same
  a call     <|tool_call_begin|> functions.NAME:IDX <|tool_call_argument_begin|> JSON <|tool_call_end|>

What is a marker is decided by the token's id, never by its spelling: the parser takes pieces, and only a piece that is
a `conversation.Mark` is a special token. Text that spells `<|im_end|>` or a whole tool call in ordinary tokens is text.

Nothing the model can write raises. A tool call that begins before `</think>` ends the reasoning: it is a call, not
something the model thought of. What is wrong with a call stands in its `error`, other oddities in `problems`.
One parser does it, piece by piece as a stream brings them; any division of the text into pieces gives the same reply.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END, END, THINK, THINK_END, Mark
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.untrusted import refuse_constant

_ID = re.compile(r"functions\.(?P<name>.+):(?P<index>\d+)", re.DOTALL)
# state -> what may end it or change it; everything else is text of that state
_MARKS: dict[str, tuple[str, ...]] = {
    "reasoning": (THINK_END, THINK, CALLS, CALL, END),
    "content": (THINK_END, THINK, CALLS, CALL, END),
    "section": (CALL, CALLS_END, END),
    "id": (ARGUMENTS, CALL_END, CALL, CALLS_END, END),
    "arguments": (CALL_END, CALL, CALLS_END, END),
}
_ALL_MARKS = (THINK, THINK_END, CALLS, CALLS_END, CALL, ARGUMENTS, CALL_END, END)


@dataclass(frozen=True)
class ToolCall:
    """One call.

    id:        as the model wrote it, normally functions.NAME:IDX; name: of the function.
    arguments: the text of the arguments, as written.
    error:     why the arguments are no JSON object, or that the call was cut off; "" if all is well.
    """

    id: str
    name: str
    arguments: str
    error: str = ""

    @property
    def parsed(self) -> dict[str, Any] | None:
        """The arguments as a dict; None if there is an error."""
        return None if self.error else _parse_arguments(self.arguments)[0]


@dataclass(frozen=True)
class Reply:
    """A whole answer. finished: the model itself ended it, with <|im_end|>."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()
    finished: bool = False

    def message(self) -> dict[str, Any]:
        """The assistant message to put into the conversation, in OpenAI form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class Delta:
    """What a piece of the stream added. call: number of the call that begins (it has an id) or goes on, or -1."""

    reasoning: str = ""
    content: str = ""
    call: int = -1
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class ReplyParser:
    """Takes a stream of pieces apart. thinking: whether the prompt ended with an open <think>.

    `feed` and `close` return what each piece adds. `reply` is all of it so far, whole after `close`.
    """

    thinking: bool = True
    _state: str = field(init=False, default="")
    _text: dict[str, str] = field(init=False)
    _calls: list[ToolCall] = field(init=False, default_factory=list)
    _problems: list[str] = field(init=False, default_factory=list)
    _call: tuple[str, str] | None = field(init=False, default=None)  # id and name of the one whose arguments come
    _in_section: bool = field(init=False, default=False)
    _broke_off_thinking: bool = field(init=False, default=False)
    _finished: bool = field(init=False, default=False)
    _deltas: list[Delta] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._state = "reasoning" if self.thinking else "content"
        self._text = dict.fromkeys(_MARKS, "")

    @property
    def reply(self) -> Reply:
        """All that is certain so far."""
        text = self._text
        return Reply(text["reasoning"], text["content"], tuple(self._calls), tuple(self._problems), self._finished)

    def feed(self, piece: str) -> list[Delta]:
        """Adds a piece: a special token if it is a `Mark`, else text. What follows <|im_end|> is ignored."""
        if self._finished:
            return []
        if isinstance(piece, Mark) and piece in _MARKS[self._state]:
            self._enter(piece)
        else:
            self._add(piece)
        deltas, self._deltas = self._deltas, []
        return deltas

    def close(self) -> list[Delta]:
        """The stream is over: finishes what was open."""
        if not self._finished and self._state in ("id", "arguments"):
            self._end_call("cut off before <|tool_call_end|>")
            self._state = "section"
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add(self, text: str) -> None:
        if not text:
            return
        if self._state == "section":
            if text.strip() and not self._text["section"].strip():
                self._problems.append("text between tool calls")
        elif self._state == "arguments":
            self._deltas.append(Delta(call=len(self._calls), arguments=text))
        elif self._state == "reasoning":
            self._deltas.append(Delta(reasoning=text))
        elif self._state == "content":
            self._deltas.append(Delta(content=text))
        self._text[self._state] += text

    def _enter(self, mark: str) -> None:
        if self._state in ("id", "arguments"):
            if mark == ARGUMENTS:
                self._begin_arguments()
                return
            self._end_call("" if mark == CALL_END else f"{mark} before <|tool_call_end|>")
        if mark in (THINK, THINK_END):
            self._think(mark)
        elif mark in (CALLS, CALL):
            if self._state == "reasoning":
                self._problems.append("a tool call before </think>")
                self._broke_off_thinking = True
            self._in_section = self._in_section or mark == CALLS
            self._state = "section" if mark == CALLS else "id"
        elif mark == END:
            self._finished = True
        else:
            self._in_section = self._in_section and mark == CALL_END
            self._state = "section" if self._in_section else "content"

    def _think(self, mark: str) -> None:
        begun = bool(self._text[self._state].strip() or self._calls)
        if self._state == "reasoning" and mark == THINK_END:
            self._state = "content"
        elif self._state == "content" and mark == THINK_END and (self._broke_off_thinking or not begun):
            self._broke_off_thinking = False  # the end of what a tool call broke off
        elif mark == THINK and not begun and (self._state == "reasoning" or not self._text["reasoning"]):
            self._state = "reasoning"
        else:
            self._add(mark)  # the model speaks of the mark

    def _begin_arguments(self) -> None:
        text = self._text["id"].strip()
        match = _ID.fullmatch(text)
        if match is None:
            self._problems.append(f"the tool call id {text!r} is not functions.NAME:IDX")
        self._call = text, match["name"] if match else text.removeprefix("functions.")
        self._deltas.append(Delta(call=len(self._calls), id=self._call[0], name=self._call[1]))
        self._state = "arguments"

    def _end_call(self, cut: str) -> None:
        if self._call is None:
            self._begin_arguments()
        assert self._call is not None
        arguments = self._text["arguments"]
        error = _parse_arguments(arguments)[1]
        if cut and (error or not arguments.strip()):
            error = cut
        elif cut:
            self._problems.append(cut)
        error = error if self._call[1] else "a tool call without a name"
        self._calls.append(ToolCall(*self._call, arguments, error))
        self._text["id"] = self._text["arguments"] = ""
        self._call = None


class Pieces:
    """Token ids to the pieces that `ReplyParser` takes: markers by their id, all else as text.

    A character that several tokens spell is held back until it is whole. Ids outside the vocabulary have no text (a
    model's vocabulary may be larger than its tokenizer's). A marker that the tokenizer lacks never occurs.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._marks = {i: mark for mark in _ALL_MARKS if (i := tokenizer.find_special(mark)) is not None}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> list[str]:
        """What one more token makes certain."""
        mark = self._marks.get(token_id)
        if mark is not None:
            return [*self.close(), mark]
        known = 0 <= token_id < self._tokenizer.vocab_size
        text = self._utf8.decode(self._tokenizer.decode_bytes([token_id])) if known else ""
        return [text] if text else []

    def close(self) -> list[str]:
        """No more text comes, or a marker comes next: a character that is not whole becomes U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return [text] if text else []


def parse_reply(token_ids: Iterable[int], tokenizer: Tokenizer, thinking: bool = True) -> Reply:
    """A whole answer taken apart; never raises. thinking: whether the prompt ended with an open <think>."""
    parser, pieces = ReplyParser(thinking), Pieces(tokenizer)
    for token_id in token_ids:
        for piece in pieces.feed(int(token_id)):
            parser.feed(piece)
    for piece in pieces.close():
        parser.feed(piece)
    parser.close()
    return parser.reply


def _parse_arguments(text: str) -> tuple[dict[str, Any] | None, str]:
    """(arguments, error). No text at all is a call without arguments."""
    if not text.strip():
        return {}, ""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        return None, f"the arguments are not JSON: {error}"
    if not isinstance(value, dict):
        return None, f"the arguments are a JSON {type(value).__name__}, not an object"
    return value, ""
