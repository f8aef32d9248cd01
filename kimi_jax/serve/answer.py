"""What a client is answered, as JSON: whole, or in the pieces of a stream (the OpenAI API).

Every sampled token counts in the usage and has its place in logprobs and token ids, the one that ends the text too.
With `return_token_ids` come the names that vLLM has for them, `prompt_token_ids` and `token_ids`, and beside the latter
`weight_versions`: for each token the version of the weights that drew it.
"""

from __future__ import annotations

import codecs
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.data.conversation import call_id, opens_reasoning
from kimi_jax.data.reply import Delta, ReplyParser
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.infer.generate import ReplyStream
from kimi_jax.infer.request import Request, TokenEvent
from kimi_jax.serve.protocol import ApiCall, ChatCall

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass
class Choice:
    """One answer as it comes in: its text, and what belongs to its tokens."""

    shown: ReplyStream
    prompt: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    waiting: list[TokenEvent] = field(default_factory=list)  # tokens that no piece of a stream has carried yet
    deltas: list[Delta] = field(default_factory=list)  # and text
    prompt_sent: bool = False
    cached_tokens: int = 0  # of the prompt, from the prefix cache

    def feed(self, event: TokenEvent) -> None:
        """Takes the next event."""
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
            self.waiting.append(event)
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.deltas += self.shown.feed(event)


class ApiAnswer:
    """The answer to one call: feed its `choices`, and take `pieces` of them as they come, or the `whole` at the end."""

    kind = piece_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, call: ApiCall, model: str, tokenizer: Tokenizer, requests: Sequence[Request]):
        self._call, self._model, self._tokenizer = call, model, tokenizer
        self._id, self._created = f"{self.id_prefix}-{uuid.uuid4().hex}", int(time.time())
        self.choices = [Choice(self._shown(request), request.token_ids.tolist()) for request in requests]
        self._offsets = [codecs.getincrementaldecoder("utf-8")("replace") for _ in requests]
        self._offset = [0 for _ in requests]

    def begin(self) -> list[dict[str, Any]]:
        """The pieces before the first token."""
        return []

    def pieces(self, index: int) -> list[dict[str, Any]]:
        """The pieces of a stream for what choice `index` was fed since the last time."""
        choice = self.choices[index]
        pieces = [self._piece(index, self._delta(index, delta)) for delta in choice.deltas]
        choice.deltas = []
        if choice.shown.finish_reason:
            pieces.append(self._piece(index, self._delta(index, Delta())))
            pieces[-1]["choices"][0]["finish_reason"] = self._finish_reason(choice)
        if pieces:  # the first piece carries what belongs to the tokens since the last one
            pieces[0]["choices"][0] |= self._extras(index)
        return pieces

    def usage_piece(self) -> dict[str, Any]:
        """The last piece of a stream, for those who ask for the usage."""
        return {**self._head(self.piece_kind), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer without streaming."""
        choices = [
            {
                "index": index, **self._whole(index), "logprobs": None, **self._extras(index),
                "finish_reason": self._finish_reason(choice),
            }
            for index, choice in enumerate(self.choices)
        ]  # fmt: skip
        return {**self._head(self.kind), "choices": choices, "usage": self._usage()}

    # ------------------------------------------------------------------------------------------ plain text, by default

    def _shown(self, request: Request) -> ReplyStream:
        return ReplyStream(self._tokenizer, request.sampling.stop_ids, None, self._call.stop)

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        return {"text": delta.content}

    def _whole(self, index: int) -> dict[str, Any]:
        return {"text": self.choices[index].shown.reply.content}

    def _finish_reason(self, choice: Choice) -> str:
        return choice.shown.finish_reason

    def _logprobs(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            assert event.token_id is not None
            token = self._bytes(event.token_id)
            result["tokens"].append(token.decode("utf-8", "replace"))
            result["token_logprobs"].append(_finite(event.logprob))
            top = {self._bytes(i).decode("utf-8", "replace"): _finite(logprob) for i, logprob in event.top}
            result["top_logprobs"].append(top)
            result["text_offset"].append(self._offset[index])
            self._offset[index] += len(self._offsets[index].decode(token))
        return result

    # -------------------------------------------------------------------------------------------------------- of both

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _piece(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": None, "finish_reason": None}
        return {**self._head(self.piece_kind), "choices": [choice]}

    def _extras(self, index: int) -> dict[str, Any]:
        """Logprobs and ids of the tokens that came since the last time, if they are wanted."""
        choice = self.choices[index]
        events, choice.waiting = choice.waiting, []
        extras: dict[str, Any] = {}
        if self._call.logprobs:
            extras["logprobs"] = self._logprobs(index, events)
        if self._call.return_token_ids:
            if not choice.prompt_sent:
                extras |= self._prompt_ids(index)
            extras["token_ids"] = [event.token_id for event in events]
            extras["weight_versions"] = [event.version for event in events]
        choice.prompt_sent = True
        return extras

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """Each choice has its own prompt."""
        return {"prompt_token_ids": list(self.choices[index].prompt)}

    def _usage(self) -> dict[str, Any]:
        firsts = self.choices[:: self._call.num_choices]  # a prompt counts once, however many choices it has
        prompts = sum(len(choice.prompt) for choice in firsts)
        completion = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": prompts, "completion_tokens": completion, "total_tokens": prompts + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
        }  # fmt: skip

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.decode_bytes([token_id]) if token_id < self._tokenizer.vocab_size else b""


class ChatAnswer(ApiAnswer):
    """The same for a conversation: reasoning, answer and tool calls apart."""

    kind, piece_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, call: ChatCall, model: str, tokenizer: Tokenizer, requests: Sequence[Request]):
        self._thinking = opens_reasoning(call.messages, call.thinking)
        self._first_call = sum(len(message.get("tool_calls") or ()) for message in call.messages)
        self._given: list[set[str]] = [set() for _ in requests]
        super().__init__(call, model, tokenizer, requests)

    def begin(self) -> list[dict[str, Any]]:
        """Each choice says whose message it is."""
        pieces = [self._piece(i, {"delta": {"role": "assistant", "content": ""}}) for i in range(len(self.choices))]
        pieces[0] |= self._prompt_of_all()
        return pieces

    def whole(self) -> dict[str, Any]:
        """See Answer."""
        return {**super().whole(), **self._prompt_of_all()}

    def _prompt_of_all(self) -> dict[str, Any]:
        """All choices have the same prompt, which stands beside them."""
        return {"prompt_token_ids": list(self.choices[0].prompt)} if self._call.return_token_ids else {}

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        return {}

    def _shown(self, request: Request) -> ReplyStream:
        parser = ReplyParser(self._thinking)
        return ReplyStream(self._tokenizer, request.sampling.stop_ids, parser, self._call.stop)

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        if delta.reasoning:
            return {"delta": {"reasoning_content": delta.reasoning}}
        if delta.content:
            return {"delta": {"content": delta.content}}
        if delta.call < 0:
            return {"delta": {}}
        if delta.arguments:
            return {"delta": {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.arguments}}]}}
        function = {"name": delta.name, "arguments": ""}
        call = {"index": delta.call, "id": self._call_id(index, delta.id, delta.name, delta.call), "type": "function"}
        return {"delta": {"tool_calls": [{**call, "function": function}]}}

    def _whole(self, index: int) -> dict[str, Any]:
        message = self.choices[index].shown.reply.message()
        for number, call in enumerate(message.get("tool_calls", ())):
            call["id"] = self._call_id(index, call["id"], call["function"]["name"], number)
            message["content"] = message["content"] or None
        return {"message": message}

    def _call_id(self, index: int, written: str, name: str, number: int) -> str:
        """As the model wrote it if that is of the released form, which it has to see again; else one of that form.

        No two calls of an answer get the same one: their results could not be told apart.
        """
        given, place = self._given[index], self._first_call + number
        new = written if name and re.fullmatch(rf"functions\.{re.escape(name)}:\d+", written) else call_id(name, place)
        while new in given:
            place += 1
            new = call_id(name, place)
        given.add(new)
        return new

    def _finish_reason(self, choice: Choice) -> str:
        stopped, calls = choice.shown.finish_reason == "stop", choice.shown.reply.tool_calls
        return "tool_calls" if stopped and calls else choice.shown.finish_reason

    def _logprobs(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        content = []
        for event in events:
            assert event.token_id is not None
            top = [self._token(i, logprob) for i, logprob in event.top]
            content.append({**self._token(event.token_id, event.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        token = self._bytes(token_id)
        return {"token": token.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(token)}


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
