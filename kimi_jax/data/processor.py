"""A conversation with media to what the model takes: ids, pixels, grids.

Source: docs/released_model.md sections 3, 5 and 6.

S   tokens of the prompt, one media pad for each feature
N   patches of all items together;  items: images and video chunks, in reading order

The release leaves one pad an item and lets the model expand it; here the ids come expanded, which gives the same.
Sizes are planned from the headers of all media first, so that a prompt that is too long is refused before any of them
is decoded. Media stay uint8; their float form is made only for those who ask for it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from kimi_jax.data import BadRecord
from kimi_jax.data.chat import IMAGE_TYPES, VIDEO_TYPES, Message, encode_pieces, media_pieces, render
from kimi_jax.data.example import MediaItem
from kimi_jax.data.image import normalise
from kimi_jax.data.media_plan import MediaPlan, plan_media
from kimi_jax.data.patches import num_features
from kimi_jax.data.tokenizer import Tokenizer

MAX_HEAD = 1024  # characters of a data URI between its scheme and its comma
MAX_PERCENT_ENCODED = 1 << 20  # characters of a data URI that is not base64
MARKS_OF_AN_ITEM = 4  # special tokens around a media item beside its pads' place, at least
_DATA_URI = re.compile(rf"data:(?P<type>[^,]{{0,{MAX_HEAD}}}),", re.IGNORECASE)
_WHITESPACE = b" \t\r\n\f\v"


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
class Limits:
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

    def check_text(self, pieces: Sequence[str]) -> None:
        """Raises ValueError for more text than any prompt of `max_tokens` can hold."""
        count = sum(map(len, pieces))
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
    allow_special_tokens: bool = False,
    open_address: Callable[[str], bytes] | None = None,
    limits: Limits | None = None,
) -> Prompt:
    """Renders a conversation (see `chat.apply_chat_template`), opens its media and expands their pads.

    An image stands in its part under the part's type: a PIL image, an array, frames, the bytes of a file, or an
    address as a string or as {"url": ...}. Data URIs are read here; any other address goes to `open_address`, and is
    refused without one. limits: checked before media are decoded; None for no limits.
    Raises BadRecord: those of `plan_media` and `MediaPlan.decode`; refused; placeholder_mismatch (a text spells
    <|media_pad|> and `allow_special_tokens`). Raises ValueError for a message of another form or a prompt beyond the
    limits.
    """
    plans: list[MediaPlan] = []
    planned_tokens = 0

    def plan(part: Mapping[str, Any]) -> list[str]:
        nonlocal planned_tokens
        is_video = part["type"] in VIDEO_TYPES
        source, shown = _media_source(part, open_address)
        plans.append(plan_media(source, is_video, shown))
        for grid in plans[-1].grids:
            planned_tokens += num_features(grid) + MARKS_OF_AN_ITEM
        if limits:  # after each one: a body may hold a million of them
            limits.check_tokens(planned_tokens)
        return _pieces([(grid, "00:00:00.000") for grid in plans[-1].grids], is_video)

    arguments = (tools, thinking, preserve_thinking, add_generation_prompt)
    pieces = render(messages, *arguments, plan)
    if limits:
        limits.check_text(pieces)
    ids = encode_pieces(pieces, tokenizer, allow_special_tokens)
    if limits:
        passing = max((each.passing_bytes for each in plans), default=0)
        planned = [grid for each in plans for grid in each.grids]
        limits.check_tokens(len(ids) + sum(num_features(grid) - 1 for grid in planned))
        limits.reserve(passing + sum(each.lasting_bytes for each in plans))
    stamps_are_planned = any(each.num_frames for each in plans)
    decoded = []
    while plans:  # a decoded source is let go before the next one is decoded
        decoded.append(plans.pop(0).decode())
    if limits:
        limits.reserve(-passing)
    if stamps_are_planned:  # the stamps and the number of chunks are known only now
        each_part = iter(decoded)

        def write(part: Mapping[str, Any]) -> list[str]:
            return _pieces([(item.grid, s) for item, s in next(each_part)], part["type"] in VIDEO_TYPES)

        pieces = render(messages, *arguments, write)
        ids = encode_pieces(pieces, tokenizer, allow_special_tokens)
    media = tuple(item for items in decoded for item, _ in items)
    grids = np.array([item.grid for item in media], np.int64).reshape(-1, 3)
    return Prompt(expand_pads(np.array(ids, np.int32), grids, tokenizer.media_pad_id), media, "".join(pieces))


def _pieces(items: Sequence[tuple[Any, str]], is_video: bool) -> list[str]:
    """The prompt around the items of one part, each with its time stamp."""
    if not is_video:
        return media_pieces("image")
    return [piece for _, stamp in items for piece in media_pieces("video", stamp)]


def expand_pads(ids: np.ndarray, grid_thws: np.ndarray, media_pad_id: int) -> np.ndarray:
    """Each pad of `ids` repeated for the features of its item: (h/2)(w/2), whatever t.

    Raises BadRecord(placeholder_mismatch) unless there is one pad an item.
    """
    is_pad = ids == media_pad_id
    if is_pad.sum() != len(grid_thws):
        raise BadRecord("placeholder_mismatch", "prompt", f"{is_pad.sum()} media pads for {len(grid_thws)} items")
    repeats = np.ones(len(ids), np.int64)
    repeats[is_pad] = grid_thws[:, 1] * grid_thws[:, 2] // 4
    return np.repeat(ids, repeats)


def media_addresses(messages: Sequence[Message]) -> list[str]:
    """Whatever stands as a string where a media part has its address, in order; other parts are passed over."""
    found = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) else ():
            if isinstance(part, Mapping) and part.get("type") in IMAGE_TYPES + VIDEO_TYPES:
                found.append(_value(part))
    return [value for value in found if isinstance(value, str)]


def _value(part: Mapping[str, Any]) -> Any:
    kind = part["type"]
    value = part.get(kind, part.get(kind.removesuffix("_url")))
    return value.get("url") if isinstance(value, Mapping) else value


def _media_source(part: Mapping[str, Any], open_address: Callable[[str], bytes] | None) -> tuple[Any, str]:
    """What a part holds, addresses opened, and how messages call it."""
    kind, value = part["type"], _value(part)
    if value is None:
        raise ValueError(f"a part of type {kind} has nothing under {kind!r}")
    if not isinstance(value, str):
        return value, kind
    shown = value if len(value) < 60 else value[:57] + "..."
    if value[:5].lower() == "data:":
        return read_data_uri(value, shown), shown
    if open_address is None:
        raise BadRecord("refused", shown, "only data URIs are opened here, neither files nor remote addresses")
    return open_address(value), shown


def read_data_uri(uri: str, key: str = "data URI") -> bytes:
    """The bytes in a data URI, in time and memory linear in its length.

    Raises BadRecord(broken_image) for a malformed one: no comma within MAX_HEAD characters, what is not base64, or
    more than MAX_PERCENT_ENCODED characters in another encoding.
    """
    head = _DATA_URI.match(uri)
    if head is None:
        raise BadRecord("broken_image", key, "not a data URI: data:TYPE;base64,...")
    start = head.end()
    if head["type"].rpartition(";")[2].strip().lower() != "base64":
        if len(uri) - start > MAX_PERCENT_ENCODED:
            raise BadRecord("broken_image", key, f"more than {MAX_PERCENT_ENCODED} characters that are not base64")
        return unquote_to_bytes(uri[start:].encode("utf-8", "surrogatepass"))
    try:
        return base64.b64decode(uri[start:].encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("broken_image", key, f"the data URI is not base64: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why base64 failed; a UnicodeEncodeError would repeat the whole text."""
    return "a character outside ASCII" if isinstance(error, UnicodeError) else str(error)
