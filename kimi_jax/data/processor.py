"""A conversation with media to what the model takes: ids, pixels, grids.

Source: docs/released_model.md sections 3, 5 and 6.

S   tokens of the prompt, one media pad for each feature
N   patches of all items together;  items: images and video chunks, in reading order

The release leaves one pad an item and lets the model expand it; here the ids come expanded, which gives the same.
Sizes are planned from the headers of all media first, so that a prompt that is too long is refused before any of them
is decoded. Media stay uint8; their float form is made only for those who ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_jax.data.conversation import Message, encode
from kimi_jax.data.example import MediaItem, Text, fill_pads, text_of, token_spans
from kimi_jax.data.image import normalise
from kimi_jax.data.media_part import read_part
from kimi_jax.data.media_plan import MediaPlan, plan_media
from kimi_jax.data.message_fields import VIDEO_TYPES
from kimi_jax.data.patches import num_features
from kimi_jax.data.tokenizer import Tokenizer

PLANNED_STAMP = "00:00:00.000"  # as long as every other
MARKS_OF_AN_ITEM = 4  # special tokens around a media item beside its pads' place, at least


@dataclass(frozen=True)
class Prompt:
    """What `model.logits` and the sampler take.

    input_ids: int32 [S]. media: images and video chunks, patches uint8 [n, 3*p*p]. text: the prompt with one pad an
    item, for people.
    """

    input_ids: np.ndarray
    media: tuple[MediaItem, ...]
    text: str

    @property
    def pixel_values(self) -> np.ndarray | None:
        """float32 [N, 3, 14, 14] as the release has them; None without media."""
        return np.concatenate([normalise(item.patches) for item in self.media]) if self.media else None

    @property
    def grid_thws(self) -> np.ndarray | None:
        """int64 [items, 3]; None without media."""
        return np.array([item.grid for item in self.media], np.int64) if self.media else None


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt may take, checked before anything is decoded.

    max_tokens: of prompt and answer together. max_characters: of all text; no prompt with more of them can have fewer
    tokens than that. reserve: is called with the bytes that the media will take, before they are decoded, and raises
    if there is no room for them; with a negative number when some are free again.
    """

    max_tokens: int
    max_characters: int
    reserve: Callable[[int], None]

    def check_tokens(self, count: int) -> None:
        """Raises ValueError unless a prompt of at least `count` tokens leaves room for an answer."""
        if count >= self.max_tokens:
            raise ValueError(
                f"the prompt has {count} tokens or more; prompt and answer together have at most {self.max_tokens}"
            )

    def check_text(self, parts: Sequence[Any]) -> None:
        """Raises ValueError for more text than any prompt of `max_tokens` can hold."""
        count = sum(len(part.text) for part in parts if isinstance(part, Text))
        if count > self.max_characters:
            raise ValueError(
                f"the prompt has {count} characters; prompt and answer together have at most {self.max_tokens} tokens"
            )


def prepare(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    open_url: Callable[[str], bytes] | None = None,
    limits: PromptLimits | None = None,
    sampled: Mapping[int, Sequence[int]] | None = None,
) -> Prompt:
    """Encodes a conversation (see `conversation.encode`), opens its media and expands their pads.

    An image stands in its part as `media_part` says. Data URIs are read here; any other URL goes to `open_url`,
    and is refused without one. limits: checked before media are decoded; None for no limits. sampled: see
    `conversation.encode`.
    Raises BadRecord: those of `plan_media` and `MediaPlan.decode`; refused. Raises ValueError for a message of another
    form or a prompt beyond the limits.
    """
    planned_tokens = 0

    def plan(part: Mapping[str, Any]) -> MediaPlan:
        nonlocal planned_tokens
        source, shown = read_part(part, open_url)
        found = plan_media(source, part["type"] in VIDEO_TYPES, shown)
        planned_tokens += sum(num_features(grid) + MARKS_OF_AN_ITEM for grid in found.grids)
        if limits:  # after each one: a body may hold a million of them
            limits.check_tokens(planned_tokens)
        return found

    found = encode(
        messages, tools, thinking=thinking, preserve_thinking=preserve_thinking,
        add_generation_prompt=add_generation_prompt, media=plan, sampled=sampled,
    ).parts  # fmt: skip
    if limits:
        limits.check_text(found)
    plans = [part for part in found if isinstance(part, MediaPlan)]
    parts = [part if isinstance(part, Text) else None for part in found]
    del found  # a decoded source is let go before the next one is decoded
    stamps = [[PLANNED_STAMP] * len(each.grids) if each.num_frames else None for each in plans]
    spans = list(token_spans(parts, stamps, tokenizer))
    if limits:
        passing = max((each.passing_bytes for each in plans), default=0)
        planned = [grid for each in plans for grid in each.grids]
        limits.check_tokens(sum(len(span.ids) for span in spans) + sum(num_features(grid) - 1 for grid in planned))
        limits.reserve(passing + sum(each.lasting_bytes for each in plans))
    decoded = []
    while plans:
        decoded.append(plans.pop(0).decode())
    if limits:
        limits.reserve(-passing)
    if any(each is not None for each in stamps):  # the stamps and the number of chunks are known only now
        stamps = [None if each is None else [s for _, s in items] for each, items in zip(stamps, decoded, strict=True)]
        spans = list(token_spans(parts, stamps, tokenizer))
    media = tuple(item for items in decoded for item, _ in items)
    ids, _ = fill_pads(spans, [item.grid for item in media], tokenizer.media_pad_id)
    return Prompt(ids, media, text_of(parts, stamps))
