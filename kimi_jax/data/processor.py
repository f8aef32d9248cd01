"""A conversation with pictures to what the model takes: ids, pixels, grids.

Source: docs/released_model.md sections 3, 5 and 6.

S   tokens of the prompt, one media pad for each feature
N   patches of all items together;  items: images and video chunks, in reading order

The release leaves one pad an item and lets the model expand it; here the ids come expanded, which gives the same.
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
from kimi_jax.data.chat import VIDEO_TYPES, Message, encode_pieces, media_pieces, render
from kimi_jax.data.image import process_image
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.video import process_video

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """What `model.logits` and the sampler take.

    input_ids: int32 [S]. pixel_values: float32 [N, 3, 14, 14] and grid_thws: int64 [items, 3], both None without
    pictures. text: the prompt with one pad an item, for people.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray | None
    grid_thws: np.ndarray | None
    text: str


def prepare(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = True,
    preserve_thinking: bool = False,
    add_generation_prompt: bool | None = None,
    allow_special_tokens: bool = False,
    open_address: Callable[[str], bytes] | None = None,
) -> Prompt:
    """Renders a conversation (see `chat.apply_chat_template`), opens its pictures and expands their pads.

    A picture stands in its part under the part's type: a PIL image, an array, frames, the bytes of a file, or an
    address as a string or as {"url": ...}. Data URIs are read here; any other address goes to `open_address`, and is
    refused without one.
    Raises BadRecord: those of `process_image` and `process_video`; refused; placeholder_mismatch (a text spells
    <|media_pad|> and `allow_special_tokens`). Raises ValueError for a message of another form.
    """
    pixels: list[np.ndarray] = []
    grids: list[np.ndarray] = []

    def media(part: Mapping[str, Any]) -> list[str]:
        picture = _picture(part, open_address)
        if part["type"] not in VIDEO_TYPES:
            values, grid = process_image(picture)
            pixels.append(values)
            grids.append(grid)
            return media_pieces("image")
        pieces = []
        for chunk in process_video(picture):
            pixels.append(chunk.pixel_values)
            grids.append(chunk.grid_thw)
            pieces += media_pieces("video", chunk.timestamp)
        return pieces

    pieces = render(messages, tools, thinking, preserve_thinking, add_generation_prompt, media)
    ids = np.array(encode_pieces(pieces, tokenizer, allow_special_tokens), np.int32)
    grid_thws = np.concatenate(grids) if grids else np.zeros((0, 3), np.int64)
    expanded = expand_pads(ids, grid_thws, tokenizer.media_pad_id)
    text = "".join(pieces)
    return Prompt(expanded, np.concatenate(pixels), grid_thws, text) if grids else Prompt(expanded, None, None, text)


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


def _picture(part: Mapping[str, Any], open_address: Callable[[str], bytes] | None) -> Any:
    kind = part["type"]
    value = part.get(kind, part.get(kind.removesuffix("_url")))
    if isinstance(value, Mapping):
        value = value.get("url")
    if value is None:
        raise ValueError(f"a part of type {kind} has nothing under {kind!r}")
    if not isinstance(value, str):
        return value
    shown = value if len(value) < 60 else value[:57] + "..."
    if value[:5].lower() == "data:":
        return read_data_uri(value, shown)
    if open_address is None:
        raise BadRecord("refused", shown, "only data URIs are opened here, neither files nor remote addresses")
    return open_address(value)


def read_data_uri(uri: str, key: str = "data URI") -> bytes:
    """The bytes in a data URI. Raises BadRecord(broken_image) for a malformed one."""
    head = _DATA_URI.match(uri)
    if head is None:
        raise BadRecord("broken_image", key, "not a data URI: data:TYPE;base64,...")
    body = uri[head.end() :]
    if not head["base64"]:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("broken_image", key, f"the data URI is not base64: {error}") from error
