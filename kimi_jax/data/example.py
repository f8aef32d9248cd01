"""What a source yields, and how it becomes tokens and patches (reference.md section 5; design.md section 3).

n   tokens of the example (media pads expanded, end of document included)
N   patches of one media item;  C = 3 * patch_size^2
S   tokens a packed row holds;  P  patches a bin holds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.image import Image
from kimi_jax.data.video import Video

__all__ = ["BadRecord", "DataError", "Encoded", "Example", "Image", "Limits", "MediaItem", "Source", "Text", "Video"]


@dataclass(frozen=True)
class Text:
    """A span of text. `loss_weight` is the weight of predicting each of its tokens (0: given, not learned)."""

    text: str
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """One document: text, images and videos in reading order. `key` names it in error messages and reports."""

    parts: tuple[Text | Image | Video, ...]
    key: str = ""


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
