"""The leaves of a checkpoint that is being made: shapes, dtypes, and the chunks that pieces of released tensors fill.

Source: docs/architecture.md section 9. A chunk is written once, by one piece. With a mesh it also lies within one
device's shard (or is made of whole ones, if they are small), so that a device restores its own bytes and little else.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig, ModelConfig
from kimi_jax.hf.files import DTYPES, CheckpointError
from kimi_jax.hf.leaves import Leaves
from kimi_jax.hf.names import Tensor
from kimi_jax.hf.stream import Released, pieces
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import leaf_name, metadata, unbox

MIN_CHUNK = 1 << 20  # bytes: smaller shards share a chunk, or a large mesh would make millions of files


class Stacks:
    """Our leaves as they will be on disk: shape, dtype, chunks; and the pieces in the order of the files."""

    def __init__(self, checkpoint: Released, mesh: MeshConfig | None = None):
        parts = _parts(checkpoint.config, mesh) if mesh else {}
        blocks: dict[str, int] = {}
        self.leaves: dict[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype]] = {}
        self.scale_leaves: dict[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype]] = {}
        members: dict[str, list[Tensor]] = {}
        for tensor in checkpoint.tensors:
            members.setdefault(tensor.leaf, []).append(tensor)
        for leaf, group in members.items():
            last = group[-1]
            stack = tuple(n + 1 for n in last.index)
            dtype = _widest({checkpoint.dtype(tensor) for tensor in group})
            inner = _chunk(last, parts.get(leaf, ())[len(stack) :], DTYPES[dtype].itemsize)
            blocks[leaf] = inner[last.inputs]
            self.leaves[leaf] = ((*stack, *last.inner), (*(1,) * len(stack), *inner), DTYPES[dtype])
            packed = [checkpoint.is_int4(tensor) for tensor in group]
            if any(packed):
                if not all(packed):
                    lacking = group[packed.index(False)].name
                    raise CheckpointError(f"some tensors beside {lacking} are INT4, but it is not")
                columns = last.columns // checkpoint.quantization.group_size  # type: ignore[union-attr]
                chunk = (*(1,) * len(stack), blocks[leaf] * last.step, columns)
                self.scale_leaves[leaf] = ((*stack, last.rows, columns), chunk, DTYPES[dtype])
        stored = checkpoint.directory.tensors
        order = sorted(
            checkpoint.tensors, key=lambda t: (lambda s: (s.file, s.start))(stored[next(iter(checkpoint.parts(t)))])
        )
        self.pieces = [piece for tensor in order for piece in pieces(tensor, blocks[tensor.leaf])]
        every = [*self.leaves.values(), *self.scale_leaves.values()]
        self.nbytes = sum(math.prod(shape) * dtype.itemsize for shape, _, dtype in every)

    def create(self, params: Leaves, scales: Leaves) -> None:
        """All arrays, empty."""
        for store, leaves in ((params, self.leaves), (scales, self.scale_leaves)):
            for leaf, (shape, chunk, dtype) in leaves.items():
                store.create(leaf, shape, chunk, dtype)


def _parts(config: ModelConfig, mesh: MeshConfig) -> dict[str, tuple[int, ...]]:
    """In how many parts the rules of `kimi_jax.sharding` shard each axis of each leaf. Raises ConfigError for a -1."""
    sizes = {axis: getattr(mesh, axis) for axis in sharding.AXES}
    if min(sizes.values()) < 1:
        raise ConfigError(f"the mesh needs a number of devices for every axis, not {sizes}")
    axes = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    boxed = abstract_params(config)
    specs = jax.tree.map(lambda info, a: sharding.spec(info, a.shape, axes), metadata(boxed), unbox(boxed))
    return {
        leaf_name(path): tuple(
            math.prod(sizes[axis] for axis in ((part,) if isinstance(part, str) else part or ())) for part in spec
        )
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    }


def _chunk(tensor: Tensor, parts: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunk of one slice of a leaf; parts: in how many shards its axes are sharded, empty without a mesh."""
    first = next(pieces(tensor))
    chunk = list(tensor.inner)
    chunk[tensor.inputs] = (first.last - first.first) // tensor.step
    for axis, count in enumerate(parts):
        if count > 1:
            shard, others = tensor.inner[axis] // count, math.prod(chunk) // chunk[axis] * itemsize
            enough = [n for n in _divisors(count) if n * shard * others >= MIN_CHUNK]
            chunk[axis] = max(n for n in _divisors(min([*enough, count]) * shard) if n <= chunk[axis])
    return tuple(chunk)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _widest(dtypes: set[str]) -> str:
    """The dtype that holds them all exactly."""
    return dtypes.pop() if len(dtypes) == 1 else "F32"
