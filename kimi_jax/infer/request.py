"""What goes into the engine and what comes out: requests, events, completions. Tokens in, tokens out.

Text, chat templates and images' preprocessing are `infer.generate`'s work.

n tokens of a prompt   k listed alternatives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from kimi_jax.data.example import MediaItem

MIN_TEMPERATURE = 1e-5  # below it requests are greedy: logits divided by less overflow float32
MAX_TOP_LOGPROBS = 20  # alternatives that may be asked for; what the OpenAI interface allows


@dataclass(frozen=True)
class Sampling:
    """How one request is continued.

    temperature: 0 is greedy, and so is all below MIN_TEMPERATURE.
    top_p: only the most probable tokens that together reach this mass.
    seed: None draws one; taken modulo 2^32. The same seed and prompt give the same tokens whatever else is in the batch
    and whatever answers came before. One thing remains in bfloat16: a prompt that shares the beginning of an earlier
    prompt is read in other pieces, which rounds otherwise; `Engine.set_params`, which forgets prefixes, rules it out.
    max_new_tokens: at least 1, or 0 for a request that is only scored. stop_ids: sampling one ends the request, and it
    is part of the result.
    top_logprobs: how many of the most probable tokens are listed beside each sampled one, at most MAX_TOP_LOGPROBS.
    logprobs: that log-probabilities will be looked at. They come always; see `reproducible`.
    score_from: index of the first token of the prompt whose own log-probability is wanted (1: all but the first, which
    nothing precedes); None for none. What lies before it may come from the prefix cache.
    routed_experts: that the experts of every token are recorded.
    shares_prefix: whether pages of other requests may serve as its beginning; answers of one group share their prompt
    in any case. Without, the numbers of a prompt do not depend on what was read before it, not even in the last bit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    logprobs: bool = False
    score_from: int | None = None
    routed_experts: bool = False
    shares_prefix: bool = True

    @property
    def reproducible(self) -> bool:
        """Whether pages that decoding made must not serve as its prefix: the numbers would depend on their history."""
        return self.seed is not None or self.logprobs or self.top_logprobs > 0 or self.score_from is not None

    def problem(self) -> str | None:
        """What is wrong with these values, or None."""
        if not 0 <= self.temperature <= float(np.finfo(np.float32).max):
            return f"temperature must be a finite float32 that is at least 0, not {self.temperature}"
        if not 0 < self.top_p <= 1:
            return f"top_p must be above 0 and at most 1, not {self.top_p}"
        if self.max_new_tokens < (1 if self.score_from is None else 0):
            return f"max_new_tokens must be at least 1 (0 if the prompt is scored), not {self.max_new_tokens}"
        if self.score_from is not None and self.score_from < 1:
            return f"score_from must be at least 1 (nothing precedes the first token), not {self.score_from}"
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            return f"top_logprobs must be 0..{MAX_TOP_LOGPROBS}, not {self.top_logprobs}"
        return None


class GrammarError(Exception):
    """Why an answer cannot follow its grammar any further: it takes too long, or needs too much memory."""


@runtime_checkable
class Matcher(Protocol):
    """Where one answer stands in its grammar."""

    def allowed(self) -> np.ndarray:
        """uint32 [W]: bit i % 32 of word i // 32 says whether token i may be next; tokens behind the last word may not.

        At least one may. Raises GrammarError.
        """

    def accept(self, token: int) -> None:
        """This token, which was allowed, is next. Raises GrammarError."""


@runtime_checkable
class Grammar(Protocol):
    """What an answer may say, of any number of answers (`serve.grammar`)."""

    def start(self) -> Matcher:
        """The beginning of an answer."""


@dataclass(frozen=True)
class Request:
    """A prompt.

    token_ids: int32 [n], every image or video chunk as as many media pads as it has features. media: the items in
    order of appearance; their patches [N, 3*p*p] in raster order, bytes, or floats already in [-1, 1].
    grammar: what the answer may say; its tokens are drawn one a call, of those that are allowed. Log-probabilities are
    those without it.
    """

    token_ids: np.ndarray
    media: tuple[MediaItem, ...] = ()
    sampling: Sampling = Sampling()
    grammar: Grammar | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token, or the end without one (cancelled, error, a prompt that was only scored).

    logprob: log softmax(logits / temperature) of the token, before top_p; if greedy of softmax(logits). top: the
    most probable tokens and their log-probabilities in the same distribution. finish_reason: None while it goes on,
    "stop" (a stop id), "length" (max_new_tokens or the longest sequence), "cancelled", "error" (`error` says why).
    cached_tokens: of the request's prompt, how many tokens came from the prefix cache. version: of the weights that
    drew the token. prompt_logprobs: with the first event of a request that asked for scores. experts: with the last
    event of a request that asked for them, see `Completion`.
    """

    request_id: int
    token_id: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish_reason: str | None
    error: str | None = None
    cached_tokens: int = 0
    version: int = 0
    prompt_logprobs: tuple[float, ...] = ()
    experts: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Completion:
    """All of a request's sampled tokens. cached_tokens: how many tokens of the prompt came from the prefix cache.

    versions: of the weights that drew each token. prompt_logprobs: of the prompt's tokens from `Sampling.score_from`
    on, in the same distribution as those of the answer. experts: int32 [prompt + answer - 1, L, k], those that every
    token but the last was routed to in each of the L MoE layers (the last one was drawn and never read).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    top: tuple[tuple[tuple[int, float], ...], ...]
    versions: tuple[int, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    experts: np.ndarray | None = field(default=None, compare=False)


@runtime_checkable
class RequestEngine(Protocol):
    """What runs requests, step by step: of an `infer.engine.Engine` all that its simplest users need."""

    @property
    def idle(self) -> bool:
        """Nothing waits or runs."""

    def submit(self, request: Request) -> int:
        """Put a request in line; its number. Raises ValueError for one that cannot be served."""

    def cancel(self, request_id: int) -> None:
        """End a request at the next step. Unknown and finished ones are ignored."""

    def step(self) -> list[TokenEvent]:
        """Go on with all requests; what happened."""


def completion(events: Sequence[TokenEvent], prompt_tokens: int) -> Completion:
    """The events of one request, from its first to its last, as one. Raises RuntimeError if the request failed."""
    if events[-1].finish_reason == "error":
        raise RuntimeError(f"request {events[-1].request_id}: {events[-1].error}")
    sampled = [event for event in events if event.token_id is not None]
    return Completion(
        tuple(event.token_id for event in sampled if event.token_id is not None),
        tuple(event.logprob for event in sampled if event.logprob is not None),
        events[-1].finish_reason or "",
        prompt_tokens,
        events[-1].cached_tokens,
        tuple(event.top for event in sampled),
        tuple(event.version for event in sampled),
        next((event.prompt_logprobs for event in events if event.prompt_logprobs), ()),
        events[-1].experts,
    )
