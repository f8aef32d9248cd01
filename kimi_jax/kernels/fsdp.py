"""FSDP weights: all-gathered where they are used; their gradients are reduce-scattered.

Source: docs/architecture.md section 6 (fully sharded weights). Inside `shard_map`, where nobody else does it, and axis
by axis: of a gather over all 512 chips of a pod the TPU compiler makes a sum of matrices that are zero elsewhere, of
the reduce-scatter of a gradient an all-reduce. Either sends twice the bytes.

Weights come in the dtype in which they are stored and are cast before they are gathered; their gradients are summed in
`MemoryConfig.reduce_dtype` and returned in the dtype of the weights, so that nothing rounds them in between.

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


def _gathered_axes(part: Any, kept: tuple[str | None, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in names(part) if axis not in kept)


def all_gather(weight: Array, spec: PartitionSpec, kept: tuple[str | None, ...] = ()) -> Array:
    """`weight`, sharded by `spec`, gathered along all mesh axes but `kept`: those on which the work is distributed."""
    for dim, part in enumerate(spec):
        for axis in reversed(_gathered_axes(part, kept)):
            weight = _gather(weight, axis, dim)
    return weight


def reduce_scatter(
    total: Array, spec: PartitionSpec, kept: tuple[str | None, ...], summed: tuple[str, ...], dtype: str
) -> Array:
    """The reverse for gradients: summed in `dtype` along the mesh axes `summed`, everybody keeps the part in `spec`.

    The axes of `spec` that are not `kept` must be among `summed`. The result has `dtype`.
    """
    done: set[str] = set()
    total = total.astype(dtype)
    for dim, part in enumerate(spec):
        for axis in _gathered_axes(part, kept):
            total = _scatter(total, axis, dim)
            done.add(axis)
    rest = tuple(axis for axis in summed if axis not in done)
    return lax.psum(total, rest) if rest else total


def all_reduce(x: Array, axes: tuple[str | None, ...], dtype: str) -> Array:
    """The sum of x over the mesh axes that are not None, in `dtype`; x itself, in its own dtype, if there are none."""
    over = tuple(axis for axis in axes if axis is not None)
    return lax.psum(x.astype(dtype), over) if over else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather_rows(x: Float[Array, "n ..."], axes: tuple[str, ...], dtype: str) -> Float[Array, "N ..."]:
    """x of all devices along the mesh axes, one after the other; its gradient is reduce-scattered in `dtype`."""
    return lax.all_gather(x, axes, axis=0, tiled=True)


def _gather_rows_fwd(x: Array, axes: tuple[str, ...], dtype: str) -> tuple[Array, tuple[Array]]:
    return all_gather_rows(x, axes, dtype), (x[:0],)


def _gather_rows_bwd(axes: tuple[str, ...], dtype: str, residuals: tuple[Array], grad: Array) -> tuple[Array]:
    part = lax.psum_scatter(grad.astype(dtype), axes, scatter_dimension=0, tiled=True)
    return (part.astype(residuals[0].dtype),)


all_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


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


class LinearSharding(NamedTuple):
    """How tokens [B, S, .] and a matrix lie over a mesh; hashable.

    rows, tokens: mesh axes of B and S; matrix: of [*inputs, *outputs]; inputs: how many of them; distributed: the mesh
    axis that distributes the inputs or the outputs to devices, where one does, and stays. reduce_dtype: of sums over
    devices.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    matrix: PartitionSpec
    inputs: int
    distributed: str
    reduce_dtype: str

    def sides(self) -> tuple[bool, bool]:
        """Whether inputs and outputs are distributed."""
        before, after = self.matrix[: self.inputs], self.matrix[self.inputs :]
        return any(self.distributed in names(part) for part in before), any(
            self.distributed in names(part) for part in after
        )

    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Of what is multiplied and of the product."""
        first, last = (PartitionSpec(self.rows or None, self.tokens or None, self.distributed if side else None)
                       for side in self.sides())  # fmt: skip
        return first, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fsdp_matmul(
    sharding: LinearSharding, x: Float[Array, "B S I"], matrix: Float[Array, "..."]
) -> Float[Array, "B S O"]:
    """x @ matrix, the matrix seen as [I, O] and cast to the dtype of x, which is that of the result.

    Products are accumulated in float32; sums over devices, of the result as of both gradients, are in
    `sharding.reduce_dtype`. The matrix' gradient has the matrix' dtype.
    """
    first, last = sharding.specs()

    def here(x: Array, matrix: Array) -> Array:
        y = dot(
            "bsi,io->bso", x, _flat(x, all_gather(matrix.astype(x.dtype), sharding.matrix, (sharding.distributed,)))
        )
        return all_reduce(y, (sharding.distributed if sharding.sides()[0] else None,), sharding.reduce_dtype).astype(
            x.dtype
        )

    return jax.shard_map(here, mesh=sharding.mesh, in_specs=(first, sharding.matrix), out_specs=last, check_vma=False)(
        x, matrix
    )


def _fwd(sharding: LinearSharding, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return fsdp_matmul(sharding, x, matrix), (x, matrix)


def _bwd(sharding: LinearSharding, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    first, last = sharding.specs()

    def here(x: Array, matrix: Array, grad: Array) -> tuple[Array, Array]:
        gathered = all_gather(matrix.astype(x.dtype), sharding.matrix, (sharding.distributed,))
        dx = dot("bso,io->bsi", grad, _flat(x, gathered))
        dx = all_reduce(dx, (sharding.distributed if sharding.sides()[1] else None,), sharding.reduce_dtype).astype(
            x.dtype
        )
        total = dot("bsi,bso->io", x, grad).reshape(gathered.shape)
        summed = *sharding.rows, *sharding.tokens
        return dx, reduce_scatter(
            total, sharding.matrix, (sharding.distributed,), summed, sharding.reduce_dtype
        ).astype(matrix.dtype)

    specs = first, sharding.matrix, last
    return jax.shard_map(here, mesh=sharding.mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)(
        *residuals, grad
    )


fsdp_matmul.defvjp(_fwd, _bwd)


def _flat(x: Array, matrix: Array) -> Array:
    return matrix.reshape(x.shape[-1], -1)


def dot(spec: str, a: Array, b: Array) -> Array:
    """`einsum` of two arrays of one dtype, accumulated and returned in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=exact, preferred_element_type=jnp.float32)
