"""What a source yields, and how it becomes tokens and patches.

Source: docs/released_model.md section 5; docs/architecture.md section 3.

n   tokens of the example (media pads expanded, end of document included)
N   patches of one media item;  C = 3 * patch_size^2
S   tokens a packed row holds
P   patches a bin holds;  v  bins of that size in a group

Media stand in the text as released:
  image        <|media_begin|>image<|media_content|><|media_pad|>...<|media_end|>
  video chunk  HH:MM:SS.mmm<|media_begin|>video<|media_content|><|media_pad|>...<|media_end|>
All of it has loss weight 0: it is given, never learned. A document ends with [EOS], whose weight is that of the last
text span. Nothing stands at the beginning of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.image import Image, Plan, decode, fit_image, image_size, picture_patches
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.video import Video, chunk_patches, chunks, fit_frame, timestamp, video_size

__all__ = [
    "BadRecord", "DataError", "Encoded", "Example", "Image", "Limits", "MediaItem", "Source", "Text", "Video",
    "encode", "place_items", "split",
]  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A span of text. `loss_weight` is the weight of predicting each of its tokens (0: given, not learned)."""

    text: str
    loss_weight: float | int = 1.0


@dataclass(frozen=True)
class Example:
    """One document: text, images and videos in reading order. `key` names it in error messages and reports."""

    parts: tuple[Text | Image | Video, ...]
    key: str = ""


@runtime_checkable
class Source(Protocol):
    """Random access to examples. Must be picklable and deterministic: the same index gives the same example.

    `__getitem__` may raise BadRecord; an augmenting source draws its randomness from (its own seed, index) only.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class MediaItem:
    """One image, or one video chunk of up to four frames.

    patches: uint8 [N, C], pixels of a patch flattened as (channel, y, x), patches in released raster order per frame.
    grid:    (t, h, w) in patches, N = t*h*w, h and w even.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Encoded:
    """An example as the packer takes it.

    tokens:       int32 [n], one media pad for each feature of each item, in the order of `media`.
    loss_weights: float32 [n], the weight of each token *as a target*; 0 for media pads and their wrapper.
    media:        items in reading order.
    modality:     0 text only, 1 with image(s), 2 with video.
    key:          the example's.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    media: tuple[MediaItem, ...]
    modality: int
    key: str


@dataclass(frozen=True)
class Limits:
    """What one example may take. The defaults are the released limits, without a packer: for inference.

    sequence_length: most tokens of an example with media (None: no limit). Text-only ones may be longer: see `split`.
    bins:            (P patches, v bins) of a group, ascending P; empty: no limit.
    """

    sequence_length: int | None = None
    bins: tuple[tuple[int, int], ...] = ()
    image_patches: int = 16384  # in_patch_limit
    frame_patches: int = 4096  # in_patch_limit_each_frame
    side_patches: int = 512  # patch_limit_on_one_side

    @property
    def max_patches(self) -> int | None:
        """Patches of the largest bin; None without a packer."""
        return self.bins[-1][0] if self.bins else None


def place_items(sizes: Sequence[int], free: Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
    """First fit of the items of one example: the largest first, each into the smallest class that has room.

    sizes: patches of each item. free[k][b]: patches left in bin b of class k, classes ascending.
    Returns (class, bin) of each item in the order of `sizes`, or None if they do not all fit. `free` is not changed.
    """
    left = [list(bins) for bins in free]
    places: list[tuple[int, int]] = [(-1, -1)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next(((k, b) for k, bins in enumerate(left) for b, room in enumerate(bins) if room >= sizes[i]), None)
        if place is None:
            return None
        left[place[0]][place[1]] -= sizes[i]
        places[i] = place
    return places


@dataclass(frozen=True)
class _Picture:
    """An image, or a video, before anything is decoded: its size, and the frames of each of its items."""

    part: Image | Video
    width: int
    height: int
    frames: tuple[int, ...]  # of each chunk; (1,) for an image

    def plan(self, limits: Limits, patch_size: int, area: float | None = None) -> Plan:
        """The largest plan within the limits and, if given, within `area` patches before padding."""
        if isinstance(self.part, Image):
            limit = limits.image_patches if area is None else min(area, limits.image_patches)
            return fit_image(self.width, self.height, limits.max_patches, limit, limits.side_patches, patch_size)
        limit = limits.frame_patches if area is None else min(area, limits.frame_patches)
        most = max(self.frames)
        return fit_frame(self.width, self.height, most, limits.max_patches, limit, limits.side_patches, patch_size)

    def items(self, plan: Plan, patch_size: int, key: str) -> list[MediaItem]:
        """Decoded, resized, cut."""
        if isinstance(self.part, Image):
            patches = picture_patches(decode(self.part.image, key), plan, patch_size)
            return [MediaItem(patches, (1, plan.h, plan.w))]
        return [MediaItem(*chunk_patches(self.part, chunk, plan, patch_size)) for chunk in chunks(self.part)]


def encode(example: Example, tokenizer: Tokenizer, limits: Limits | None = None, patch_size: int = 14) -> Encoded:
    """Tokens, loss weights and patches of an example.

    Pictures that do not fit the limits are planned smaller, all of the example alike, never cut off. A text-only
    example may be longer than `limits.sequence_length` (see `split`).
    Raises BadRecord: empty; too_long (the text leaves no room even for the smallest pictures); those of decoding.
    """
    limits = limits or Limits()
    pictures = [_picture(part, example.key) for part in example.parts if not isinstance(part, Text)]
    spans = _spans(example, tokenizer, pictures)
    fixed = sum(len(ids) for ids, _ in spans if isinstance(ids, list))
    if fixed == 1 and not pictures:
        raise BadRecord("empty", example.key, "neither text nor media")
    plans = _plan_together(pictures, fixed, limits, patch_size, example.key)
    media = tuple(
        item
        for picture, plan in zip(pictures, plans, strict=True)
        for item in picture.items(plan, patch_size, example.key)
    )
    tokens: list[int] = []
    weights: list[float] = []
    for ids, weight in spans:
        if isinstance(ids, int):  # the pads of media item number `ids`
            _, h, w = media[ids].grid
            ids = [tokenizer.media_pad_id] * (h * w // 4)
        tokens += ids
        weights += [weight] * len(ids)
    modality = 2 if any(isinstance(p.part, Video) for p in pictures) else int(bool(pictures))
    encoded = Encoded(np.array(tokens, np.int32), np.array(weights, np.float32), media, modality, example.key)
    _check_pads(encoded, tokenizer.media_pad_id)
    return encoded


def split(encoded: Encoded, length: int) -> list[Encoded]:
    """A text-only example longer than `length` tokens as pieces of at most `length`, each its own document.

    The pieces do not overlap, so the first token of a later piece is never a target. Raises BadRecord(too_long) for one
    with media: its text cannot be separated from them.
    """
    count = len(encoded.tokens)
    if count <= length:
        return [encoded]
    if encoded.media:
        raise BadRecord("too_long", encoded.key, f"{count} tokens with media do not fit a row of {length}")
    pieces = range(0, count, length)
    return [
        replace(encoded, tokens=encoded.tokens[i : i + length], loss_weights=encoded.loss_weights[i : i + length])
        for i in pieces
    ]


def _picture(part: Image | Video, key: str) -> _Picture:
    if isinstance(part, Image):
        return _Picture(part, *image_size(part.image, key), (1,))
    if isinstance(part, Video):
        return _Picture(part, *video_size(part, key), tuple(end - start for start, end in chunks(part)))
    raise TypeError(f"example {key}: a part is {type(part).__name__}; parts are Text, Image or Video")


def _spans(
    example: Example, tokenizer: Tokenizer, pictures: list[_Picture]
) -> list[tuple[list[int] | int, float | int]]:
    """(ids, weight) in reading order; instead of ids, the number of the media item whose pads go there."""
    spans: list[tuple[list[int] | int, float | int]] = []
    item = 0
    weight: float | int = 1.0
    for part in example.parts:
        if isinstance(part, Text):
            weight = part.loss_weight
            if not 0 <= weight < float("inf"):
                raise BadRecord("bad_json", example.key, f"a loss weight is {weight}")
            spans.append((tokenizer.encode(part.text, allow_special_tokens=False), weight))
            continue
        if isinstance(part, Image):
            stamps, kind = [""], "image"
        else:
            stamps, kind = [timestamp(float(part.timestamps[start])) for start, _ in chunks(part)], "video"
        for stamp in stamps:
            head = [tokenizer.media_begin_id, *tokenizer.encode(kind), tokenizer.media_content_id]
            spans += [(tokenizer.encode(stamp) + head, 0.0), (item, 0.0), ([tokenizer.media_end_id], 0.0)]
            item += 1
    spans.append(([tokenizer.eos_id], weight))
    return spans


def _plan_together(pictures: list[_Picture], fixed: int, limits: Limits, patch_size: int, key: str) -> list[Plan]:
    """Plans of all pictures of an example, shrunk by one common factor of area if they do not fit together."""

    def fits(plans: list[Plan]) -> bool:
        sizes = [plan.patches * t for picture, plan in zip(pictures, plans, strict=True) for t in picture.frames]
        tokens = fixed + sum(plan.tokens * len(p.frames) for p, plan in zip(pictures, plans, strict=True))
        if limits.sequence_length is not None and tokens > limits.sequence_length:
            return False
        return not limits.bins or place_items(sizes, [[size] * count for size, count in limits.bins]) is not None

    alone = [picture.plan(limits, patch_size) for picture in pictures]
    if not pictures or fits(alone):
        return alone

    def shrunk(factor: float) -> list[Plan]:
        return [p.plan(limits, patch_size, area=factor * a.patches) for p, a in zip(pictures, alone, strict=True)]

    low, high = 0.0, 1.0
    if not fits(shrunk(low)):
        raise BadRecord(
            "too_long",
            key,
            f"{fixed} tokens of text and {len(pictures)} pictures do not fit, however small the pictures",
        )
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(shrunk(middle)) else (low, middle)
    return shrunk(low)


def _check_pads(encoded: Encoded, pad_id: int) -> None:
    pads = int(np.count_nonzero(encoded.tokens == pad_id))
    features = sum(item.grid[1] * item.grid[2] // 4 for item in encoded.media)
    if pads != features:
        raise BadRecord("placeholder_mismatch", encoded.key, f"{pads} media pads for {features} features")
