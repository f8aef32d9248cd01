"""What the engine knows of one request on its way, and of several answers to one prompt.

n tokens of a prompt   F features   D width   L MoE layers   k experts of a token
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kimi_jax.data.example import MediaItem
from kimi_jax.infer.cache import page_keys
from kimi_jax.infer.request import Grammar, Matcher, Sampling, TokenEvent


@dataclass(eq=False)
class AnswerGroup:
    """Answers that differ in their seeds only: one of them reads the prompt, the others begin at its last token.

    When the prompt has been read, `pages` holds those of the prompt, for as long as somebody still has to begin.
    """

    left: int  # members that have not begun
    prefiller: Answer | None = None
    pages: list[int] | None = None
    num_prefilled: int = 0  # tokens whose cache entries are the work of reading alone
    experts: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def lend(self, member: Answer) -> None:
        """What was found out about the prompt. The member begins as if it had decoded up to the prompt's last token."""
        member.goal = member.prompt - 1
        member.num_prefilled = min(self.num_prefilled, member.goal)
        member.experts, member.scores = list(self.experts), list(self.scores)
        member.unreported = tuple(self.scores)


@dataclass(eq=False)
class Answer:
    """A request on its way. `tokens` holds the prompt, then what was sampled; the first `num_cached` are in the cache.

    It is read until `goal` tokens are in the cache (those it had when it began: the prompt, and after an interruption
    the answer so far), and decoded from then on.
    """

    number: int
    sampling: Sampling
    media: tuple[MediaItem, ...]
    tokens: list[int]
    prompt: int  # tokens of it
    limit: int  # most tokens it can get to
    owners: np.ndarray  # int32 [n]: the media item whose feature stands there, or -1
    digests: list[bytes]
    seed: int
    caller: tuple[str, str] = ("", "")  # see `infer.line`
    grammar: Grammar | None = None
    matcher: Matcher | None = None  # where the answer stands in it
    matched: int = 0  # tokens of the answer that it has seen
    group: AnswerGroup | None = None
    keys: list[bytes] = field(default_factory=list)  # of the full pages of what is read
    features: np.ndarray | None = None  # [F, D], until the prompt is read
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    goal: int = 0
    num_hits: int = 0  # tokens that the prefix cache had
    num_prefilled: int = 0  # tokens whose cache entries are the work of reading prompts alone; at most `goal`
    stale: bool = False  # part of its cache is of earlier weights: its pages must not become known
    slot: int = -1
    cancelled: bool = False
    events: list[TokenEvent] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # of the prompt's tokens from `sampling.score_from` on
    unreported: tuple[float, ...] = ()  # the same, from when they are complete until an event has taken them along
    experts: list[np.ndarray] = field(default_factory=list)  # int32 [L, k] each, of the first tokens

    @property
    def prefilling(self) -> bool:
        """Whether tokens are left that are given, not to be drawn."""
        return self.num_cached < self.goal

    def page_keys(self, count: int, page_size: int) -> list[bytes]:
        """Keys of the full pages of the first `count` tokens."""
        tokens = np.array(self.tokens[:count], np.int32)
        owners = np.pad(self.owners, (0, len(self.tokens) - self.prompt), constant_values=-1)[:count]
        return page_keys(tokens, owners, self.digests, page_size)

    def rewind(self, page_size: int) -> None:
        """All tokens so far are to be read; the last one is always computed, since its logits are wanted.

        With a grammar the last one is decoded, not read: only that program takes masks.
        """
        self.num_cached = self.num_hits = 0
        self.goal = self.num_prefilled = len(self.tokens) - (self.matcher is not None)
        self.pages, self.slot, self.stale = [], -1, False
        if not self.scored:
            self.scores = []  # of several versions they would mean nothing
        self.keys = self.page_keys(len(self.tokens) - 1, page_size)

    @property
    def scored(self) -> bool:
        """Whether all log-probabilities that are wanted of the prompt are known."""
        start = self.sampling.score_from
        return start is None or len(self.scores) == self.prompt - start

    @property
    def shareable(self) -> int:
        """Tokens that may come from the prefix cache: those behind which nothing is to be scored."""
        if not self.sampling.shares_prefix:
            return 0
        start = self.sampling.score_from
        return len(self.tokens) if self.scored or start is None else start - 1

    def add_scores(self, start: int, scores: np.ndarray) -> None:
        """Log-probabilities of the tokens from number `start` on; the prompt's wanted ones are taken."""
        first = self.sampling.score_from
        if first is not None and not self.scored:
            begin, end = first + len(self.scores) - start, self.prompt - start
            self.scores += scores[max(begin, 0) : max(end, 0)].tolist()
            self.unreported = tuple(self.scores) if self.scored else ()

    def add_experts(self, start: int, experts: np.ndarray) -> None:
        """Experts int32 [n, L, k] of the tokens from number `start` on; what was recorded before stays."""
        if self.sampling.routed_experts:
            self.experts += list(experts[len(self.experts) - start :])

    def report(
        self, token: int | None, logprob: float | None, top: tuple, reason: str | None, error: str | None = None,
        version: int = 0,
    ) -> TokenEvent:  # fmt: skip
        """The next event, remembered for `Engine.run`."""
        experts = np.array(self.experts) if reason is not None and self.sampling.routed_experts else None
        scores, self.unreported = self.unreported, ()
        event = TokenEvent(self.number, token, logprob, top, reason, error, self.num_hits, version, scores, experts)
        self.events.append(event)
        return event
