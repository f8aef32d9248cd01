"""Newton-Schulz orthogonalisation of a stack of matrices: the inner step of Muon.

Source: docs/paper_notes.md section 2.4 (Moonlight's constants). The iteration pushes every singular value of a matrix
towards 1 and keeps its singular vectors; with these coefficients it stops near 1 (about 0.7 to 1.2), which is what Muon
is tuned for.

Shape letters: N matrices, R rows, C columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROOM = 2**27  # bytes of whole matrices on a device at a time; about five times as much while they are iterated
EPSILON = 1e-7  # added to the Frobenius norm, so that a zero matrix stays zero


def default_dtype(platform: str | None = None) -> jnp.dtype:
    """Dtype of the iteration: bfloat16 as in the paper, float32 on a CPU, where bfloat16 is slower.

    platform: of the devices that will run it ("cpu", "tpu"), where they are not those of this process.
    """
    return jnp.dtype(jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16)


def orthogonalize(
    matrices: Float[Array, "N R C"], steps: int = 5, dtype: DTypeLike | None = None, unroll: bool = True
) -> Float[Array, "N R C"]:
    """Each matrix with its singular values moved to about 1, in the dtype of the input; a zero matrix gives zeros.

    The Gram matrix is formed on the shorter side, so a step costs 4 min(R,C)^2 max(R,C) + 2 min(R,C)^3 FLOPs a matrix.
    `dtype` is that of the iteration (default: `default_dtype()`; pass it when compiling for another backend). The norm
    is always float32. `unroll` changes speed only: XLA:CPU runs unrolled chains of different parameters side by side
    and loops one by one; the TPU compiler makes code for every product that it sees. Source: docs/paper_notes.md
    section 2.4, "Muon details".
    """
    dtype = jnp.dtype(dtype) if dtype is not None else default_dtype()
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    # Left to itself, a TPU multiplies float32 matrices in bfloat16.
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)

    x = matrices.astype(jnp.float32)
    x = (x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + EPSILON)).astype(dtype)

    def iterate(_: Array, x: Array) -> Array:
        transposed = jnp.swapaxes(x, 1, 2)
        gram = matmul(x, transposed) if wide else matmul(transposed, x)
        poly = b * gram + c * matmul(gram, gram)
        return a * x + (matmul(poly, x) if wide else matmul(x, poly))

    x = lax.fori_loop(0, steps, iterate, x, unroll=unroll)
    return x.astype(matrices.dtype)


class Distribution(NamedTuple):
    """How the matrices of a parameter lie: its leading axes are `batch` axes of matrices, then `rows` axes of their
    rows, the rest are their columns; `spec` shards it over `mesh`."""

    batch: int
    rows: int
    mesh: Mesh | AbstractMesh
    spec: PartitionSpec

    def kind(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Equal for parameters of this and that `shape` whose matrices are of one shape and sharded in one way."""
        inner = tuple(shape[self.batch :])
        parts = tuple(self.spec)[self.batch :]
        return inner, self.rows, parts + (None,) * (len(inner) - len(parts))


def orthogonalize_sharded(
    leaves: Sequence[Float[Array, "..."]],
    where: Sequence[Distribution],
    steps: int = 5,
    dtype: DTypeLike | None = None,
) -> list[Float[Array, "..."]]:
    """`orthogonalize` of every matrix of parameters of one `kind` that are sharded over a mesh, without gathering them.

    A device has parts of many matrices and needs whole ones: an all-to-all gives each device of a
    group that shares matrices a few whole ones of them, a second one takes the results back. That is done for so many
    matrices at a time that a device holds about ROOM bytes of whole ones. Where the matrices cannot be distributed
    evenly, zeros fill up. Parameters of one kind go together because the TPU compiler makes code for every loop that it
    sees.
    """
    dtype = jnp.dtype(dtype) if dtype is not None else default_dtype()
    inner, rows, parts = where[0].kind(leaves[0].shape)
    mesh = where[0].mesh
    # axes of one matrix, after one axis for all matrices here: (which, mesh axes that shard it)
    sharded = [(i + 1, part) for i, part in enumerate(parts) if part is not None]
    group = math.prod(mesh.shape[axis] for _, part in sharded for axis in ((part,) if isinstance(part, str) else part))
    shape = math.prod(inner[:rows]), math.prod(inner[rows:])
    each = max(1, ROOM // (math.prod(shape) * dtype.itemsize))  # whole matrices a device holds at a time

    def distribute(x: Array) -> Array:
        for axis, part in sharded:
            x = lax.all_to_all(x, part, 0, axis, tiled=True)
        whole = orthogonalize(x.reshape(-1, *shape), steps, dtype, unroll=False).reshape(x.shape)
        for axis, part in reversed(sharded):
            whole = lax.all_to_all(whole, part, axis, 0, tiled=True)
        return whole

    def here(*local: Array) -> tuple[Array, ...]:
        stacks = [x.reshape(-1, *x.shape[w.batch :]).astype(dtype) for x, w in zip(local, where, strict=True)]
        counts = [x.shape[0] for x in stacks]
        total = sum(counts)
        portion = min(each, -(-total // group)) * group
        stacks.append(jnp.zeros((-total % portion, *stacks[0].shape[1:]), dtype))
        x = jnp.concatenate(stacks)
        out = lax.map(distribute, x.reshape(-1, portion, *x.shape[1:])).reshape(x.shape)
        ends = [sum(counts[:i]) for i in range(1, len(counts) + 1)]
        return tuple(y.reshape(x.shape).astype(x.dtype) for y, x in zip(jnp.split(out, ends), local, strict=False))

    specs = tuple(w.spec for w in where)
    return list(jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)(*leaves))
