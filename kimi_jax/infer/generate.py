"""From a conversation to a request of the sampler, and from its tokens back to text.

Source: docs/released_model.md section 6.

n   tokens of a prompt, media pads expanded

Tokens may end within a character and a stop string may begin within a token, so text is given out only when it is
certain: a stream never splits a character, and never shows the beginning of what turns out to be a stop string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kimi_jax.config import ModelConfig
from kimi_jax.data.conversation import END, Message, opens_reasoning, with_released_ids
from kimi_jax.data.processor import PromptLimits, prepare
from kimi_jax.data.reply import Delta, Pieces, Reply, ReplyParser
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.request import Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine
    from kimi_jax.infer.lockstep import Leader

STOP_TOKENS = ("[EOS]", "<|im_end|>", "[EOT]")  # the model ends its text with any of them


@dataclass(frozen=True)
class Chat:
    """A conversation that waits for an answer.

    messages, tools: see `data.conversation`; tool calls may carry ids of any program, the model sees the released ones.
    thinking: whether the model reasons first. preserve_thinking: keeps the reasoning of earlier answers.
    open_url: opens URLs of images that are not data URIs; without it those are refused.
    limits: of the prompt, checked before media are decoded; None for no limits.
    sampled: by number, the messages of the assistant whose tokens are known: those of the completions that they were,
    to the last one. They are part of the prompt as they are, so that the history is what the model saw.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool = True
    preserve_thinking: bool = False
    open_url: Callable[[str], bytes] | None = None
    limits: PromptLimits | None = None
    sampled: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def reasons(self) -> bool:
        """Whether the prompt ends within the reasoning: what `ReplyParser` has to know."""
        return opens_reasoning(self.messages, self.thinking)


def chat_request(chat: Chat, tokenizer: Tokenizer, config: ModelConfig, sampling: Sampling) -> Request:
    """What the sampler takes: ids with expanded pads, media as uint8 patches, the tokenizer's stop tokens.

    Nothing in a message becomes a special token, whatever it spells. Raises ValueError for a message of another form,
    tokens that cannot be part of a prompt, or an image for a text-only model, and BadRecord as
    `data.processor.prepare` does.
    """
    prompt = prepare(
        with_released_ids(chat.messages, chat.sampled),
        tokenizer,
        chat.tools,
        chat.thinking,
        chat.preserve_thinking,
        add_generation_prompt=True,
        open_url=chat.open_url,
        limits=chat.limits,
        sampled={i: _history_ids(ids, f"messages[{i}].token_ids", tokenizer) for i, ids in chat.sampled.items()},
    )
    if prompt.media:
        if config.vision is None:
            raise ValueError("this model is text-only; it cannot take images")
        if tokenizer.media_pad_id != config.media_placeholder_token_id:
            raise ValueError(
                f"the tokenizer's media pad is {tokenizer.media_pad_id}, the model's "
                f"{config.media_placeholder_token_id}: they do not belong together"
            )
    return Request(prompt.input_ids, prompt.media, with_stop_tokens(sampling, tokenizer))


def _history_ids(ids: Sequence[int], where: str, tokenizer: Tokenizer) -> Sequence[int]:
    """The tokens of an answer without the <|im_end|>, which the template writes. Raises ValueError for media pads."""
    if tokenizer.media_pad_id in ids:  # of which image would it be?
        raise ValueError(f"{where} holds the media pad {tokenizer.media_pad_id}, which no answer can be continued from")
    return ids[:-1] if ids and ids[-1] == tokenizer.special_id(END) else ids


def with_stop_tokens(sampling: Sampling, tokenizer: Tokenizer) -> Sampling:
    """The settings with the tokenizer's own stop tokens beside those they name."""
    own = tuple(tokenizer.special_id(name) for name in STOP_TOKENS)
    return dataclasses.replace(sampling, stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *own))))


def held_back(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of `text` that may be the beginning of one of some strings."""
    longest = max(map(len, strings)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in strings)), 0)


@dataclass
class StopStrings:
    """Passes text on up to the first of some strings; what may begin one is held back.

    `feed` and `close` return what has become certain; `stopped`: one of them has come, the rest is dropped.
    """

    strings: tuple[str, ...] = ()
    stopped: bool = field(init=False, default=False)
    _buffer: str = field(init=False, default="")

    def feed(self, text: str) -> str:
        """Adds a piece of text."""
        if self.stopped or not self.strings:
            return "" if self.stopped else text
        self._buffer += text
        places = [place for string in self.strings if (place := self._buffer.find(string)) >= 0]
        self.stopped = bool(places)
        certain = min(places) if places else len(self._buffer) - held_back(self._buffer, self.strings)
        text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return text

    def close(self) -> str:
        """No more text will come, or something that is not text comes next: gives out what was held back."""
        text, self._buffer = "" if self.stopped else self._buffer, ""
        return text


class ReplyStream:
    """The sampler's events of one request to what a reader is shown.

    parser: takes a conversation's reply apart (`data.reply`); None: all of it is text. stop_ids: what ends the text and
    is not part of it. stop: strings of which the same is true; they are looked for in the answer, not in the reasoning
    or in tool calls. After one of those the sampler still has to be told.
    finish_reason: why it ended: "stop", "length", "cancelled" or "error"; "" while it goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], parser: ReplyParser | None, stop: Sequence[str] = ()
    ):
        self._stop_ids, self._parser = frozenset(stop_ids), parser
        self._pieces = Pieces(tokenizer)
        self._stop = StopStrings(tuple(stop))
        self._content = ""
        self.finish_reason = ""

    @property
    def reply(self) -> Reply:
        """All that was shown so far."""
        whole = self._parser.reply if self._parser else Reply()
        return dataclasses.replace(whole, content=self._content)

    def feed(self, event: TokenEvent) -> list[Delta]:
        """What an event makes certain."""
        if self.finish_reason:
            return []
        shown = [shown for delta in self._parse(event) for shown in self._until_stop(delta)]
        self.finish_reason = "stop" if self._stop.stopped else event.finish_reason or ""
        return shown + self._answer(self._stop.close()) if self.finish_reason else shown

    def is_stop(self, event: TokenEvent) -> bool:
        """Whether the event is the token that ends the text."""
        return event.finish_reason == "stop" and event.token_id in self._stop_ids

    def _parse(self, event: TokenEvent) -> list[Delta]:
        ends = self.is_stop(event)
        pieces = [] if event.token_id is None or ends else self._pieces.feed(event.token_id)
        pieces += self._pieces.close() if event.finish_reason else []
        if self._parser is None:
            return [Delta(content=piece) for piece in pieces]
        deltas = [delta for piece in (*pieces, *([END] if ends else [])) for delta in self._parser.feed(piece)]
        return deltas + self._parser.close() if event.finish_reason else deltas

    def _until_stop(self, delta: Delta) -> list[Delta]:
        if self._stop.stopped:
            return []
        if delta.reasoning or delta.call >= 0:
            return [*self._answer(self._stop.close()), delta]
        return self._answer(self._stop.feed(delta.content))

    def _answer(self, text: str) -> list[Delta]:
        self._content += text
        return [Delta(content=text)] if text else []


def stream(engine: Engine | Leader, request: Request, shown: ReplyStream) -> Iterator[Delta]:
    """Runs one request on an engine that has nothing else to do, and yields what `shown` makes of its tokens.

    A caller that stops early frees the engine. Raises what `Engine.submit` raises, RuntimeError if the engine fails.
    """
    number, running = engine.submit(request), True
    try:
        while not shown.finish_reason:
            for event in engine.step():
                if event.request_id == number:
                    running = event.finish_reason is None
                    yield from shown.feed(event)
                    if event.finish_reason == "error":
                        raise RuntimeError(event.error or "the sampler failed")
    finally:
        if running:
            engine.cancel(number)
            engine.step()


def answer(engine: Engine, request: Request, tokenizer: Tokenizer, thinking: bool, stop: Sequence[str] = ()) -> Reply:
    """The answer to a request that `chat_request` made, taken apart. thinking: see `Chat.reasons`.

    Raises as `stream` does.
    """
    shown = ReplyStream(tokenizer, request.sampling.stop_ids, ReplyParser(thinking), stop)
    for _ in stream(engine, request, shown):
        pass
    return shown.reply
