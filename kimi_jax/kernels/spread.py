"""Weights that are cut only to need less room: gathered where they are used, their gradients summed and cut again.

Source: design.md section 6 (fully sharded weights). For the inside of `shard_map`, where nobody else does it: a
reduce-scatter sends half of what an all-reduce does, which is what the compiler makes of a sum and a cut.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array


def names(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _spread(part: Any, kept: tuple[str | None, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in names(part) if axis not in kept)


def whole(weight: Array, spec: PartitionSpec, kept: tuple[str | None, ...] = ()) -> Array:
    """`weight`, cut by `spec`, gathered along all mesh axes but `kept`: those on which the work is dealt."""
    for dim, part in enumerate(spec):
        if axes := _spread(part, kept):
            weight = lax.all_gather(weight, axes, axis=dim, tiled=True)
    return weight


def part_of_sum(total: Array, spec: PartitionSpec, kept: tuple[str | None, ...], summed: tuple[str, ...]) -> Array:
    """The reverse for gradients: summed along the mesh axes `summed`, of which everybody keeps the part in `spec`.

    The axes of `spec` that are not `kept` must be among `summed`.
    """
    done: set[str] = set()
    for dim, part in enumerate(spec):
        if axes := _spread(part, kept):
            total = lax.psum_scatter(total, axes, scatter_dimension=dim, tiled=True)
            done.update(axes)
    rest = tuple(axis for axis in summed if axis not in done)
    return lax.psum(total, rest) if rest else total
