"""Prefix cache, and which pages a request gets: those of a prefix that is known, those of its group's prompt, new ones.

Source: docs/architecture.md section 9. `cache.PagePool` counts pages and knows their keys; here is what an answer may
share. Scored tokens must be computed, and so must tokens whose experts are asked for and were not recorded. A prefix
that somebody else is just reading is worth waiting for.

s tokens a page   L MoE layers   k experts of a token
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kimi_jax.infer.cache import PagePool
from kimi_jax.infer.sequence import Answer, AnswerGroup


class Place(NamedTuple):
    """Pages in order: the first `shared` hold earlier tokens; `num_cached` tokens of the sequence are in the cache.

    copied: (from, to) if the page behind the shared ones begins as another does.
    """

    pages: list[int]
    shared: int
    num_cached: int
    copied: tuple[int, int] | None = None


class Pages:
    """Gives pages to sequences, and keeps what prompts and groups of answers have in common."""

    def __init__(self, pool: PagePool, page_size: int):
        self.pool, self.page_size = pool, page_size
        self._groups: set[AnswerGroup] = set()  # whose prompt's pages are held
        self._experts: dict[int, np.ndarray] = {}  # int32 [s, L, k] of known pages, where they were asked for

    def count(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page_size)

    # --------------------------------------------------------------------------------------------------------- giving

    def being_prefilled(self, prefilling: Iterable[Answer]) -> dict[bytes, bool]:
        """Keys of the pages that these will fill, and whether they record the experts."""
        return dict(pair for s in prefilling if not s.stale for pair in self.to_prefill(s, s.num_cached))

    def to_prefill(self, sequence: Answer, num_cached: int) -> list[tuple[bytes, bool]]:
        """The same of one that has read so many tokens."""
        return [(key, sequence.sampling.routed_experts) for key in sequence.keys[num_cached // self.page_size :]]

    def worth_waiting(self, sequence: Answer, coming: dict[bytes, bool]) -> bool:
        """Whether somebody is reading what it would have to read next."""
        group = sequence.group
        if group is not None and (group.pages is not None or group.prefiller is not None):
            return group.pages is None
        known, keys = self._known(sequence), self._keys(sequence)
        if len(known) == len(keys) or keys[len(known)] not in coming:
            return False
        return coming[keys[len(known)]] or not sequence.sampling.routed_experts

    def give(self, sequence: Answer) -> Place | None:
        """Pages for all that it can ever get; None if there are not enough."""
        group, need = sequence.group, self.count(sequence.limit)
        if group is not None and group.pages is not None:
            count = sequence.prompt - 1
            shared = group.pages[: count // self.page_size]
            pages = self.pool.share(shared, need)
            if pages is None:
                return None
            part = count % self.page_size > 0
            copied = (group.pages[len(shared)], pages[len(shared)]) if part else None
            group.lend(sequence)
        else:
            shared, copied = self._known(sequence), None
            pages = self.pool.share(shared, need)
            if pages is None:
                return None
            count = len(shared) * self.page_size
        for page in pages[len(shared) :]:
            self._experts.pop(page, None)
        for i, page in enumerate(shared):
            if page in self._experts:
                sequence.add_experts(i * self.page_size, self._experts[page])
        first = self.pool.first_decoded(shared)
        if first < len(shared):
            sequence.num_prefilled = min(sequence.num_prefilled, first * self.page_size)
        return Place(pages, len(shared), count, copied)

    def _keys(self, sequence: Answer) -> list[bytes]:
        return sequence.keys[: sequence.shareable // self.page_size]

    def _known(self, sequence: Answer) -> list[int]:
        """The pages that hold the beginning of what it has to read."""
        record, recorded = sequence.sampling.routed_experts, len(sequence.experts)

        def usable(i: int, page: int) -> bool:
            return not record or (i + 1) * self.page_size <= recorded or page in self._experts

        return self.pool.find(self._keys(sequence), not sequence.sampling.reproducible, usable)

    # -------------------------------------------------------------------------------------------------------- keeping

    def insert(self, sequence: Answer, keys: list[bytes]) -> None:
        """Its full pages, which have these keys, are known from now on; unless part of them is of earlier weights."""
        if sequence.stale:
            return
        size = self.page_size
        full = keys[: sequence.num_cached // size]
        for i, (page, key) in enumerate(zip(sequence.pages, full, strict=False), 1):
            self.pool.insert(page, key, decoded=i * size > sequence.num_prefilled)
            if sequence.sampling.routed_experts and sequence.goal <= sequence.prompt and page not in self._experts:
                self._experts[page] = np.array(sequence.experts[(i - 1) * size : i * size])

    def clear(self) -> None:
        """The weights changed: no page is known any more."""
        self.drop_groups()
        self.pool.clear()
        self._experts.clear()

    # --------------------------------------------------------------------------------------------------------- groups

    def begun(self, sequence: Answer) -> None:
        """It has begun, or never will: one member less that needs its group's pages."""
        group = sequence.group
        if group is not None:
            group.left -= 1
            if not group.left:
                self._drop(group)

    def hold(self, sequence: Answer) -> None:
        """Its prompt has been read: the pages are held for the members of its group that still have to begin."""
        group = sequence.group
        if group is None or group.prefiller is not sequence:
            return
        group.prefiller = None
        if group.left and not sequence.stale:
            pages = sequence.pages[: self.count(sequence.prompt - 1)]
            group.pages = self.pool.share(pages, len(pages))
            group.num_prefilled = sequence.num_prefilled
            group.experts, group.scores = sequence.experts[: sequence.prompt - 1], list(sequence.scores)
            self._groups.add(group)

    def drop_groups(self) -> None:
        """No pages are held any more; of each group the next member reads the prompt."""
        for group in tuple(self._groups):
            self._drop(group)

    def _drop(self, group: AnswerGroup) -> None:
        if group.pages is not None:
            self.pool.release(group.pages)
            group.pages = None
        self._groups.discard(group)
