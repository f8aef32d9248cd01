"""Images of many requests in one call of the vision tower, each of them once.

The tower has a program for each class of image sizes and each number of images in a call. So that few are ever
compiled, images of a class go TOGETHER at a time, and what is left of them one by one.

F features of an item   D width   p patch size   N patches
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import Grid

if TYPE_CHECKING:
    from kimi_jax.model import Model

TOGETHER = 8
MIN_PATCHES = 64  # of a bin
MOST_PATCHES = 8192  # of a call: larger images go one by one


def bucket(n: int, least: int) -> int:
    """n rounded up to `least`, or to one of four sizes between powers of two."""
    if n <= least:
        return least
    step = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // step) * step


def bin_size(grid: Grid) -> int:
    """Patches of the bin that an item is put into: those of one size are one class, for which a program is compiled."""
    size = bucket(math.prod(grid), MIN_PATCHES)
    return size + -size % 4


def encode_media(model: Model, items: Mapping[bytes, MediaItem]) -> dict[bytes, np.ndarray | Exception]:
    """The features float32 [F, D] of each item, or why there are none: one image that fails does not end the others.

    items: by what tells them apart (`cache.media_digest`); patches [N, 3*p*p], bytes or floats in [-1, 1].
    """
    classes: dict[tuple, list[bytes]] = defaultdict(list)
    for key, item in items.items():
        classes[bin_size(item.grid), item.patches.dtype.str].append(key)  # bytes reach the device as bytes
    found: dict[bytes, np.ndarray | Exception] = {}
    for (size, _), keys in classes.items():
        whole = len(keys) - len(keys) % TOGETHER if size * TOGETHER <= MOST_PATCHES else 0
        for i in range(0, whole, TOGETHER):
            found |= _encode(model, {key: items[key] for key in keys[i : i + TOGETHER]})
        for key in keys[whole:]:
            found |= _encode(model, {key: items[key]})
    return found


def _encode(model: Model, items: dict[bytes, MediaItem]) -> dict[bytes, np.ndarray | Exception]:
    try:
        return dict(zip(items, model.item_features(list(items.values())), strict=True))
    except Exception as error:  # whatever it is: it is told to the request whose image it was
        if len(items) == 1:
            return dict.fromkeys(items, error)
        return {k: v for key, item in items.items() for k, v in _encode(model, {key: item}).items()}
