"""How arrays lie over a mesh, as far as the model has to know it.

Source: docs/architecture.md section 3. Most of the model is written as for one device, and the compiler partitions
it. Some places say themselves what happens on each device (`jax.shard_map`): the routed experts, attention, the
decoder's matrices, and the loss over the vocabulary. They, and the constraints at the edges of blocks, get a `Layout`;
without one nothing is sharded.
The table of rules is in `kimi_jax.sharding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kimi_jax.kernels.fsdp import LinearSharding
from kimi_jax.kernels.vocab.vocab_parallel import VocabSharding


class ShardingError(ValueError):
    """A logical name without a rule, a rule without a name or mesh axis, or a size that does not divide."""


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that shard arrays over it.

    rules: (logical name, mesh axes that may shard it, the most wanted first), in order of preference.
    expert_capacity_factor: rows of an expert device's receive buffer over the mean load; the rest takes further rounds.
    exact_above: per-head maximum logits are exact where they may exceed this; else a bound may stand for them.
    reduce_dtype: in which sums over devices are made, see `MemoryConfig`.
    """

    mesh: Mesh | AbstractMesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    expert_capacity_factor: float = 1.25
    exact_above: float = -math.inf
    reduce_dtype: str = "float32"

    def spec(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """How an array with these logical axes is sharded: each mesh axis at most once, only where it divides evenly.

        Of the names that want the same mesh axis the earlier rule gets it. None: this axis of the array is whole.
        Raises ShardingError for a name without a rule or a rule whose mesh axis does not exist.
        """
        out: list[list[str]] = [[] for _ in shape]
        taken: set[str] = set()
        rules = dict(self.rules)
        for name in names:
            if name is not None and name not in rules:
                raise ShardingError(f"no rule for the logical axis {name!r}; add it to kimi_jax.sharding.RULES")
        for name, axes in self.rules:
            if name not in names:
                continue
            place, parts = names.index(name), 1
            for axis in axes:
                if axis not in self.mesh.shape:
                    raise ShardingError(f"RULES[{name!r}] has {axis!r}, but the mesh has only {tuple(self.mesh.shape)}")
                size = self.mesh.shape[axis]
                if size > 1 and axis not in taken and shape[place] % (parts * size) == 0:
                    out[place].append(axis)
                    taken.add(axis)
                    parts *= size
        return PartitionSpec(*(tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in out))

    def axes(self, name: str) -> tuple[str, ...]:
        """All mesh axes of more than one device that shard this logical name, whether or not a size divides."""
        return tuple(axis for axis in dict(self.rules)[name] if self.mesh.shape[axis] > 1)

    def parts(self, name: str) -> int:
        """Into how many parts they divide it."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def vocabulary(self, names: tuple[str, str], shape: tuple[int, ...]) -> VocabSharding:
        """How token ids and a table or output matrix with these logical axes lie over the mesh."""
        sequence = (*self.axes("sequence"), *(("tensor",) if self.mesh.shape["tensor"] > 1 else ()))
        axes = self.axes("batch"), self.axes("sequence"), sequence
        return VocabSharding(self.mesh, *axes, self.spec(names, shape), self.reduce_dtype)

    def matrix(self, names: tuple[str, ...], shape: tuple[int, ...], inputs: int) -> LinearSharding:
        """How tokens [B, S, .] and a matrix with these logical axes lie; the first `inputs` of them are its inputs."""
        return LinearSharding(
            self.mesh, self.axes("batch"), self.axes("sequence"), self.spec(names, shape), inputs, "tensor",
            self.reduce_dtype,
        )  # fmt: skip

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """The same array, sharded by these names; for the edges of blocks, where the compiler should not choose."""
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(names, x.shape)))
