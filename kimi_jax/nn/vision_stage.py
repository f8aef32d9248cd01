"""The Decoupled Encoder Process: all devices encode images, however the decoder is sharded, and only features stay.

Source: docs/paper_notes.md section 3, "DEP"; docs/architecture.md section 3. The packer gives every device along the
batch's axes bins of the same size beside its rows. Here the devices that share these rows (the axes of context and
tensor) share the bins too:

    shard    every device of the group takes its own bins out of those of the group          (nothing is sent)
    encode   tower and projector on a device's own bins; the forward pass keeps nothing but their features, the backward
             pass of the decoder ends at them, and then the tower runs again and goes backward
    fuse     the features of the group are gathered and put in the place of the media tokens  (inside the group)

B rows   S tokens   D width   G packs   V bins of a class   W windows of a bin   F features a pack
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.fsdp import all_gather_rows
from kimi_jax.nn.layout import Layout
from kimi_jax.packed_batch import VisionBins


def place_features(
    x: Float[Array, "B S D"], features: Float[Array, "G F D"], feature_index: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Early fusion: where feature_index >= 0, feature number feature_index of the row's pack replaces the embedding.

    Rows of a pack are consecutive. An index beyond the features gives NaN rather than a silent wrong image.
    """
    packs, width = features.shape[0], x.shape[-1]
    index = feature_index.reshape(packs, -1)
    taken = jax.vmap(lambda f, i: f.at[jnp.maximum(i, 0)].get(mode="fill", fill_value=jnp.nan))(features, index)
    return jnp.where(feature_index[..., None] >= 0, taken.reshape(*x.shape[:-1], width).astype(x.dtype), x)


def join_classes(features: tuple[Float[Array, "_ _ D"], ...], num_packs: int) -> Float[Array, "G F D"]:
    """Features [V, W, D] of each bin class, pack after pack: for each class its bins, for each bin its slots."""
    return jnp.concatenate([f.reshape(num_packs, -1, f.shape[-1]) for f in features], axis=1)


def shard_bins(layout: Layout, bins: VisionBins) -> VisionBins:
    """The arrays [V, ...] of one class, sharded by "batch", as [V', ...], sharded by "bins".

    V' > V where a group's bins are not a multiple of its devices: the last bin is taken again, and nobody reads it.
    """
    group = _group(layout)
    if not group:
        return bins

    def share(x: Array) -> Array:
        each = -(-x.shape[0] // _devices(layout, group))
        return x[jnp.minimum(lax.axis_index(group) * each + jnp.arange(each), x.shape[0] - 1)]

    specs = PartitionSpec(layout.axes("batch") or None), PartitionSpec(layout.axes("bins"))
    take = jax.shard_map(share, mesh=layout.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    return jax.tree.map(take, bins)


def fuse(
    layout: Layout | None,
    x: Float[Array, "B S D"],
    features: tuple[Float[Array, "_ _ D"], ...],
    feature_index: Int[Array, "B S"],
    bins: tuple[int, ...],
    num_packs: int,
) -> Float[Array, "B S D"]:
    """`place_features`, of features [V', W, D] that lie as `shard_bins` left their bins. bins: V of each class."""
    if layout is None:
        return place_features(x, join_classes(features, num_packs), feature_index)
    parts, group = layout.parts("batch"), _group(layout)

    def here(x: Array, features: tuple[Array, ...], feature_index: Array) -> Array:
        if group:
            gather = functools.partial(all_gather_rows, axes=group, dtype=layout.reduce_dtype)
            features = tuple(gather(f)[: v // parts] for f, v in zip(features, bins, strict=True))
        return place_features(x, join_classes(features, num_packs // parts), feature_index)

    tokens = PartitionSpec(layout.axes("batch") or None, layout.axes("sequence") or None)
    specs = tokens, PartitionSpec(layout.axes("bins") or None), tokens
    return jax.shard_map(here, mesh=layout.mesh, in_specs=specs, out_specs=tokens, check_vma=False)(
        x, features, feature_index
    )


def _group(layout: Layout) -> tuple[str, ...]:
    """The mesh axes whose devices share rows of the batch."""
    return tuple(axis for axis in layout.axes("bins") if axis not in layout.axes("batch"))


def _devices(layout: Layout, axes: tuple[str, ...]) -> int:
    return math.prod(layout.mesh.shape[axis] for axis in axes)
