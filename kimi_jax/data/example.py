"""What a source yields, and how it becomes tokens and patches.

Source: docs/released_model.md section 5; docs/architecture.md section 3.

n   tokens of the example (media pads expanded, end of document included)
N   patches of one media item;  C = 3 * patch_size^2
S   tokens a packed row holds
P   patches a bin holds;  v  bins of that size in a group

Media stand in the text as released:
  image        <|media_begin|>image<|media_content|><|media_pad|>...<|media_end|>
  video chunk  HH:MM:SS.mmm<|media_begin|>video<|media_content|><|media_pad|>...<|media_end|>
All of it has loss weight 0: it is given, never learned. A plain document ends with [EOS], whose weight is that of the
last text span; a conversation ends as its last turn does, with <|im_end|>. Nothing stands at the beginning of either.
Text never becomes a special token, whatever it spells: a special token is a `Text` of its own, marked as `special`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.image import Image, ResizePlan, decode, fit_image, image_patches_of, image_size
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.video import Video, chunk_patches, chunks, fit_frame, timestamp, video_size

__all__ = [
    "BadRecord",
    "DataError",
    "EncodeLimits",
    "Encoded",
    "Example",
    "Image",
    "MediaItem",
    "Source",
    "Span",
    "Text",
    "Turns",
    "Video",
    "encode",
    "fill_pads",
    "place_items",
    "split",
    "text_of",
    "token_spans",
]  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A span of text. `loss_weight` is the weight of predicting each of its tokens (0: given, not learned).

    special: the text is the name of one special token ("<|im_end|>"). Only code that writes the structure of a
             conversation or of media sets it (`conversation.encode`), never a reader of files.
    ids:     the tokens themselves, where they are known and the text is not (`conversation.encode`, `sampled`); never
             from a reader of files either: they may hold special tokens.
    """

    text: str
    loss_weight: float | int = 1.0
    special: bool = False
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Turns:
    """Where a conversation may be shortened when it is longer than a row.

    ends: the number of parts up to the first turn (system messages and tools), then up to the end of each turn.
    keep: "first" leaves out the last turns, "last" the first ones (system messages and tools stay); "all": it is
          refused (BadRecord too_long).
    """

    ends: tuple[int, ...]
    keep: Literal["first", "last", "all"] = "all"


@dataclass(frozen=True)
class Example:
    """One document: text, images and videos in reading order. `key` names it in error messages and reports.

    parts: `Text`, `Image`, `Video`; before media are opened, whatever stands for one (`conversation.encode`).
    turns: of a conversation. None: a plain document, which ends with [EOS] and may be split anywhere.
    """

    parts: tuple[Any, ...]
    key: str = ""
    turns: Turns | None = None


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
    shortened:    turns of a conversation were left out.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    media: tuple[MediaItem, ...]
    modality: int
    key: str
    shortened: bool = False


@dataclass(frozen=True)
class EncodeLimits:
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
class _Visual:
    """An image, or a video, before anything is decoded: its size, and the frames of each of its items."""

    part: Image | Video
    width: int
    height: int
    frames: tuple[int, ...]  # of each chunk; (1,) for an image

    def plan(self, limits: EncodeLimits, patch_size: int, area: float | None = None) -> ResizePlan:
        """The largest plan within the limits and, if given, within `area` patches before padding."""
        if isinstance(self.part, Image):
            limit = limits.image_patches if area is None else min(area, limits.image_patches)
            return fit_image(self.width, self.height, limits.max_patches, limit, limits.side_patches, patch_size)
        limit = limits.frame_patches if area is None else min(area, limits.frame_patches)
        most = max(self.frames)
        return fit_frame(self.width, self.height, most, limits.max_patches, limit, limits.side_patches, patch_size)

    def items(self, plan: ResizePlan, patch_size: int, key: str) -> list[MediaItem]:
        """Decoded, resized, cut."""
        if isinstance(self.part, Image):
            patches = image_patches_of(decode(self.part.image, key), plan, patch_size)
            return [MediaItem(patches, (1, plan.h, plan.w))]
        return [MediaItem(*chunk_patches(self.part, chunk, plan, patch_size)) for chunk in chunks(self.part)]


# ---------------------------------------------------------------------------------------------------- parts to tokens


class Span(NamedTuple):
    """Tokens that have one loss weight. part: which part of the example they come from.

    is_pads: the span is the place of the next media item: one pad in `ids`, which `fill_pads` repeats.
    """

    ids: list[int]
    loss_weight: float | int
    part: int
    is_pads: bool = False


Stamps: TypeAlias = Sequence[Sequence[str] | None]  # of each media part: None for an image, of a video its chunks'
PAD = "<|media_pad|>"


def _with_media(parts: Sequence[Any], stamps: Stamps) -> Iterator[tuple[Text, int]]:
    """The parts with the released text around each media item in place of the media, and the number of the part."""
    each = iter(stamps)
    for number, part in enumerate(parts):
        if isinstance(part, Text):
            yield part, number
            continue
        chunk_stamps = next(each)
        kind = "image" if chunk_stamps is None else "video"
        for stamp in [""] if chunk_stamps is None else chunk_stamps:
            yield Text(stamp, 0.0), number
            for text, special in (
                ("<|media_begin|>", True), (kind, False), ("<|media_content|>", True), (PAD, True),
                ("<|media_end|>", True),
            ):  # fmt: skip
                yield Text(text, 0.0, special), number


def token_spans(parts: Sequence[Any], stamps: Stamps, tokenizer: Tokenizer) -> Iterator[Span]:
    """The tokens of parts in reading order. Whatever is no `Text` is a media part, with its `stamps`.

    A time stamp is one text with the text before it, unless that is learned. Raises ValueError for a special token that
    the tokenizer lacks: spelled in ordinary tokens, anybody could forge it.
    """
    waiting = Text("", 0.0)  # a text that is not learned, to which a stamp may belong
    of_part = 0
    for text, number in _with_media(parts, stamps):
        is_stamp = not isinstance(parts[number], Text) and not text.special
        if is_stamp and waiting.text:
            waiting = replace(waiting, text=waiting.text + text.text)
            continue
        if waiting.text:
            yield Span(tokenizer.encode(waiting.text), 0.0, of_part)
        waiting = Text("", 0.0)
        if text.ids is not None:
            yield Span(list(text.ids), text.loss_weight, number)
        elif text.special:
            yield Span([_special_id(tokenizer, text.text)], text.loss_weight, number, text.text == PAD)
        elif text.loss_weight == 0 and text.text:
            waiting, of_part = text, number
        elif text.text:
            yield Span(tokenizer.encode(text.text), text.loss_weight, number)
    if waiting.text:
        yield Span(tokenizer.encode(waiting.text), 0.0, of_part)


def fill_pads(
    spans: Sequence[Span], grids: Sequence[tuple[int, int, int]], media_pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [n] tokens, float32 [n] loss weights): each pad repeated for the features of its item, (h/2)(w/2),
    whatever t. grids: (t, h, w) of the items, in order."""
    each = iter(grids)
    tokens: list[int] = []
    weights: list[float] = []
    for span in spans:
        ids = span.ids
        if span.is_pads:
            _, h, w = next(each)
            ids = [media_pad_id] * (h * w // 4)
        tokens += ids
        weights += [span.loss_weight] * len(ids)
    return np.array(tokens, np.int32), np.array(weights, np.float32)


def text_of(parts: Sequence[Any], stamps: Stamps) -> str:
    """The text of parts, special tokens by name and one pad an item: for people."""
    return "".join(text.text for text, _ in _with_media(parts, stamps))


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    media = {  # by place, not by name: Kimi-VL calls <|media_begin|> otherwise
        "<|media_begin|>": tokenizer.media_begin_id, "<|media_content|>": tokenizer.media_content_id,
        PAD: tokenizer.media_pad_id, "<|media_end|>": tokenizer.media_end_id,
    }  # fmt: skip
    return media[name] if name in media else tokenizer.special_id(name)


# ------------------------------------------------------------------------------------------------------------ encoding


def encode(example: Example, tokenizer: Tokenizer, limits: EncodeLimits | None = None, patch_size: int = 14) -> Encoded:
    """Tokens, loss weights and patches of an example.

    Media that do not fit the limits are planned smaller, all of the example alike, never truncated. A plain text-only
    document may be longer than `limits.sequence_length` (see `split`). A conversation that does not fit loses turns, as
    few as possible, where its `turns` allow it.
    Raises BadRecord: empty; too_long (the text leaves no room even for the smallest images, or a conversation has no
    shorter form); those of decoding. Raises ValueError if the tokenizer lacks a special token of the example.
    """
    limits = limits or EncodeLimits()
    visuals = [_visual(part, example.key) for part in example.parts if not isinstance(part, Text)]
    stamps = [_stamps(visual.part) for visual in visuals]
    for part in example.parts:
        if isinstance(part, Text) and not 0 <= part.loss_weight < float("inf"):
            raise BadRecord("bad_json", example.key, f"a loss weight is {part.loss_weight}")
    spans = list(token_spans(example.parts, stamps, tokenizer))
    if example.turns is None:
        spans.append(Span([tokenizer.eos_id], _last_weight(example.parts), len(example.parts)))
    if sum(len(span.ids) for span in spans) <= (example.turns is None) and not visuals:
        raise BadRecord("empty", example.key, "neither text nor media")
    choice = _longest_that_fits(example, spans, visuals, limits, patch_size)
    media = tuple(
        item
        for visual, plan in zip(choice.visuals, choice.plans, strict=True)
        for item in visual.items(plan, patch_size, example.key)
    )
    tokens, weights = fill_pads(choice.spans, [item.grid for item in media], tokenizer.media_pad_id)
    modality = 2 if any(isinstance(p.part, Video) for p in choice.visuals) else int(bool(choice.visuals))
    encoded = Encoded(tokens, weights, media, modality, example.key, choice.dropped > 0)
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


def _visual(part: Image | Video, key: str) -> _Visual:
    if isinstance(part, Image):
        return _Visual(part, *image_size(part.image, key), (1,))
    if isinstance(part, Video):
        return _Visual(part, *video_size(part, key), tuple(end - start for start, end in chunks(part)))
    raise TypeError(f"example {key}: a part is {type(part).__name__}; parts are Text, Image or Video")


def _stamps(part: Image | Video) -> list[str] | None:
    """The time stamps of a video's chunks; None for an image."""
    return None if isinstance(part, Image) else [timestamp(float(part.timestamps[start])) for start, _ in chunks(part)]


def _last_weight(parts: Sequence[Any]) -> float | int:
    """The loss weight of the last text, 1 without any: that of the end of the document."""
    return next((part.loss_weight for part in reversed(parts) if isinstance(part, Text)), 1.0)


class _Choice(NamedTuple):
    """What of a conversation is kept: all of it, or all but `dropped` turns."""

    dropped: int
    spans: Sequence[Span]
    visuals: Sequence[_Visual]
    plans: Sequence[ResizePlan]


def _longest_that_fits(
    example: Example, spans: Sequence[Span], visuals: Sequence[_Visual], limits: EncodeLimits, patch_size: int
) -> _Choice:
    """As many turns as fit, found by bisection: what is left of a conversation only gets smaller. Raises BadRecord."""
    places = [i for i, part in enumerate(example.parts) if not isinstance(part, Text)]

    def without(dropped: int) -> _Choice:
        kept = _kept_parts(example, dropped)
        some = [span for span in spans if span.part in kept] if dropped else spans
        shown = [visual for i, visual in zip(places, visuals, strict=True) if i in kept] if dropped else visuals
        return _Choice(dropped, some, shown, _plan_together(shown, some, limits, patch_size, example))

    most = len(example.turns.ends) - 2 if example.turns and example.turns.keep != "all" else 0
    try:
        return without(0)
    except BadRecord as bad:
        if bad.reason != "too_long" or most < 1:
            raise
    low, found = 0, without(most)
    while found.dropped - low > 1:
        middle = (low + found.dropped) // 2
        try:
            found = without(middle)
        except BadRecord:
            low = middle
    return found


def _kept_parts(example: Example, dropped: int) -> frozenset[int]:
    """The parts that stay when some turns are left out: the last ones, or the first ones behind the system's."""
    if example.turns is None or not dropped:
        return frozenset(range(len(example.parts)))
    ends = example.turns.ends
    if example.turns.keep == "first":
        return frozenset(range(ends[-1 - dropped]))
    return frozenset((*range(ends[0]), *range(ends[dropped], ends[-1])))


def _plan_together(
    visuals: Sequence[_Visual], spans: Sequence[Span], limits: EncodeLimits, patch_size: int, example: Example
) -> list[ResizePlan]:
    """Plans of all images and videos of an example, shrunk by one common factor of area if they do not fit together.

    Raises BadRecord(too_long).
    """
    fixed, key = sum(len(span.ids) for span in spans if not span.is_pads), example.key
    longest = limits.sequence_length
    if not visuals and example.turns and longest is not None and fixed > longest:
        raise BadRecord("too_long", key, f"a conversation of {fixed} tokens; a row has {longest}")

    def fits(plans: list[ResizePlan]) -> bool:
        sizes = [plan.patches * t for visual, plan in zip(visuals, plans, strict=True) for t in visual.frames]
        tokens = fixed + sum(plan.tokens * len(p.frames) for p, plan in zip(visuals, plans, strict=True))
        if limits.sequence_length is not None and tokens > limits.sequence_length:
            return False
        return not limits.bins or place_items(sizes, [[size] * count for size, count in limits.bins]) is not None

    alone = [visual.plan(limits, patch_size) for visual in visuals]
    if not visuals or fits(alone):
        return alone

    def shrunk(factor: float) -> list[ResizePlan]:
        return [p.plan(limits, patch_size, area=factor * a.patches) for p, a in zip(visuals, alone, strict=True)]

    low, high = 0.0, 1.0
    if not fits(shrunk(low)):
        raise BadRecord(
            "too_long",
            key,
            f"{fixed} tokens of text and {len(visuals)} images and videos do not fit, however small they are",
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
