"""Images and video chunks of requests: which bins they are put into, and what the vision tower makes of them.

The tower has a program for each class of image sizes and each number of images in a call. So that few are ever
compiled, images of a class go TOGETHER at a time, and what is left of them one by one. An image that several requests
share is encoded once.

F features of an item   D width   p patch size   N patches
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import Grid, num_features, place_item
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.packed_batch import VisionBins, empty_bins

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


def fill_bins(items: Sequence[MediaItem], parts: int = 1) -> tuple[tuple[VisionBins, ...], list[slice]]:
    """The items as bins (one item each, classes by rounded size), and where each one's features stand among them all.

    parts: devices that share the bins of a class; a single bin every device has.
    Returns the batch's `vision`, and of each item the numbers of its features.
    """
    sizes = [bin_size(item.grid) for item in items]
    classes, places, offset = [], [slice(0)] * len(items), 0
    for size in sorted(set(sizes)):
        members = [i for i, each in enumerate(sizes) if each == size]
        patches, count = items[members[0]].patches, bucket(len(members), 1)
        count += -count % parts if count > 1 else 0
        bins = empty_bins(count, size, patches.shape[1], patches.dtype)
        for v, i in enumerate(members):
            place_item(bins, v, 0, 1, items[i].patches, items[i].grid)
            start = offset + v * (size // 4)
            places[i] = slice(start, start + num_features(items[i].grid))
        classes.append(bins)
        offset += bins.feature_slots.size
    return tuple(classes), places


class VisionEncoder:
    """Vision tower and projector. params: the tree of `nn.kimi`, or of it `vision` and `projector` alone; they can be
    replaced by others of the same shapes. mesh: over which they lie; None for one device.

    What is compiled is shared by all encoders of a configuration and mesh.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any], mesh: Mesh | None = None):
        self.params, self._encode = params, _compiled(config, mesh)
        self._parts = 1 if mesh is None else sharding.layout(mesh).parts("bins")

    def features(self, items: Sequence[MediaItem]) -> list[np.ndarray]:
        """The features float32 [F, D] of each item, all in one call of the tower."""
        if not items:
            return []
        bins, places = fill_bins(items, self._parts)
        tower = {name: self.params[name] for name in ("vision", "projector")}
        features = np.asarray(self._encode(tower, bins).astype(jnp.float32))
        return [features[place] for place in places]


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, mesh: Mesh | None) -> Callable:
    """(params, bins) -> features of all bins, on every device, so that each host can read them."""
    module = KimiK25(config)

    def encode(params: dict[str, Any], bins: tuple[VisionBins, ...]) -> jax.Array:
        if mesh is not None:
            bins = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _bin_sharding(mesh, len(x))), bins)
        return module.apply({"params": params}, bins, method="vision_features")

    return jax.jit(encode, out_shardings=None if mesh is None else sharding.replicated(mesh))


def _bin_sharding(mesh: Mesh, count: int) -> NamedSharding:
    return NamedSharding(mesh, sharding.layout(mesh).spec(("bins",), (count,)))


def encode_media(encoder: VisionEncoder, items: Mapping[bytes, MediaItem]) -> dict[bytes, np.ndarray | Exception]:
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
            found |= _encode(encoder, {key: items[key] for key in keys[i : i + TOGETHER]})
        for key in keys[whole:]:
            found |= _encode(encoder, {key: items[key]})
    return found


def _encode(encoder: VisionEncoder, items: dict[bytes, MediaItem]) -> dict[bytes, np.ndarray | Exception]:
    try:
        return dict(zip(items, encoder.features(list(items.values())), strict=True))
    except Exception as error:  # whatever it is: it is told to the request whose image it was
        if len(items) == 1:
            return dict.fromkeys(items, error)
        return {k: v for key, item in items.items() for k, v in _encode(encoder, {key: item}).items()}
