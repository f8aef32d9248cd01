"""Weights that are cut only to need less room: gathered where they are used, their gradients summed and cut again.

Source: docs/architecture.md section 6 (fully sharded weights). Inside `shard_map`, where nobody else does it, and axis
by axis: of a gather over all 512 chips of a pod the TPU compiler makes a sum of matrices that are zero elsewhere, of
the sum and cut of a gradient an all-reduce. Either sends twice the bytes.

B rows   S tokens   I, O inputs and outputs of a matrix
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

LANES = 128  # values of a vector of a TPU


def names(part: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _spread(part: Any, kept: tuple[str | None, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in names(part) if axis not in kept)


def whole(weight: Array, spec: PartitionSpec, kept: tuple[str | None, ...] = ()) -> Array:
    """`weight`, cut by `spec`, gathered along all mesh axes but `kept`: those on which the work is dealt."""
    for dim, part in enumerate(spec):
        for axis in reversed(_spread(part, kept)):
            weight = _gather(weight, axis, dim)
    return weight


def part_of_sum(total: Array, spec: PartitionSpec, kept: tuple[str | None, ...], summed: tuple[str, ...]) -> Array:
    """The reverse for gradients: summed along the mesh axes `summed`, of which everybody keeps the part in `spec`.

    The axes of `spec` that are not `kept` must be among `summed`.
    """
    done: set[str] = set()
    for dim, part in enumerate(spec):
        for axis in _spread(part, kept):
            total = _scatter(total, axis, dim)
            done.add(axis)
    rest = tuple(axis for axis in summed if axis not in done)
    return lax.psum(total, rest) if rest else total


def _gather(x: Array, axis: str, dim: int) -> Array:
    """Along columns that are no whole vectors the compiler does not gather either: parts first, then in their place."""
    if dim < x.ndim - 1 or x.shape[-1] % LANES == 0:
        return lax.all_gather(x, axis, axis=dim, tiled=True)
    parts = jnp.moveaxis(lax.all_gather(x, axis), 0, -2)
    return parts.reshape(*x.shape[:-1], -1)


def _scatter(x: Array, axis: str, dim: int) -> Array:
    """Nor does it scatter along columns at all."""
    if dim < x.ndim - 1:
        return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    parts = x.reshape(*x.shape[:-1], lax.axis_size(axis), -1)
    return lax.psum_scatter(jnp.moveaxis(parts, -2, 0), axis)


class MatrixCut(NamedTuple):
    """How tokens [B, S, .] and a matrix lie over a mesh; hashable.

    rows, tokens: mesh axes of B and S; matrix: of [*inputs, *outputs]; inputs: how many of them; dealt: the mesh axis
    that deals the inputs or the outputs to devices, where one does, and stays.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    matrix: PartitionSpec
    inputs: int
    dealt: str

    def sides(self) -> tuple[bool, bool]:
        """Whether inputs and outputs are dealt."""
        before, after = self.matrix[: self.inputs], self.matrix[self.inputs :]
        return any(self.dealt in names(part) for part in before), any(self.dealt in names(part) for part in after)

    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Of what is multiplied and of the product."""
        first, last = (PartitionSpec(self.rows or None, self.tokens or None, self.dealt if side else None)
                       for side in self.sides())  # fmt: skip
        return first, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread_matmul(cut: MatrixCut, x: Float[Array, "B S I"], matrix: Float[Array, "..."]) -> Float[Array, "B S O"]:
    """x @ matrix, the matrix seen as [I, O], in their common dtype. Gradients are summed in that dtype too."""
    first, last = cut.specs()

    def here(x: Array, matrix: Array) -> Array:
        y = _dot("bsi,io->bso", x, _flat(x, whole(matrix, cut.matrix, (cut.dealt,)))).astype(x.dtype)
        return lax.psum(y, cut.dealt) if cut.sides()[0] else y

    return jax.shard_map(here, mesh=cut.mesh, in_specs=(first, cut.matrix), out_specs=last, check_vma=False)(x, matrix)


def _fwd(cut: MatrixCut, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return spread_matmul(cut, x, matrix), (x, matrix)


def _bwd(cut: MatrixCut, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    first, last = cut.specs()

    def here(x: Array, matrix: Array, grad: Array) -> tuple[Array, Array]:
        gathered = whole(matrix, cut.matrix, (cut.dealt,))
        dx = _dot("bso,io->bsi", grad, _flat(x, gathered)).astype(x.dtype)
        dx = lax.psum(dx, cut.dealt) if cut.sides()[1] else dx
        total = _dot("bsi,bso->io", x, grad).astype(matrix.dtype).reshape(gathered.shape)
        return dx, part_of_sum(total, cut.matrix, (cut.dealt,), (*cut.rows, *cut.tokens))

    specs = first, cut.matrix, last
    return jax.shard_map(here, mesh=cut.mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)(*residuals, grad)


spread_matmul.defvjp(_fwd, _bwd)


def _flat(x: Array, matrix: Array) -> Array:
    return matrix.reshape(x.shape[-1], -1)


def _dot(spec: str, a: Array, b: Array) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)
