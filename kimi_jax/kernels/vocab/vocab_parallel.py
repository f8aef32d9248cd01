"""Embedding and loss over a mesh: neither the table nor its gradient moves where tokens can move instead.

Source: docs/architecture.md section 6 (what a layout costs on the wire). Look-up: a device has a few columns of the
table; it learns all token ids of those it shares the columns with (small), looks all of them up in its columns, and an
all-to-all gives everybody whole rows of its own tokens. Loss: the output matrix is gathered once, its gradient
scattered; tokens are distributed over `tensor` too, so that nobody does the same tokens.

B rows   S tokens a row   V vocabulary   D width
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.fsdp import all_gather, names, reduce_scatter
from kimi_jax.kernels.vocab.cross_entropy import cross_entropy_and_lse, cross_entropy_grads

SCATTER_BYTES = 2**30  # of a device's float32 sums of rows of the table; more columns are taken one part after another


class VocabSharding(NamedTuple):
    """Mesh axes of rows, of a row's tokens in the model and in the loss, and how the matrix is sharded."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    context: tuple[str, ...]
    loss_context: tuple[str, ...]
    matrix: PartitionSpec
    reduce_dtype: str  # of sums of gradients over devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def look_up(
    sharding: VocabSharding, dtype: str, table: Float[Array, "V D"], tokens: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Rows of the table in `dtype`, sharded like the tokens. The table's gradient is summed in float32 on a device, in
    `sharding.reduce_dtype` over devices, and has the table's dtype."""
    where = PartitionSpec(sharding.rows or None, sharding.context or None)
    vocabulary, columns = (names(part) for part in sharding.matrix)

    def here(table: Array, tokens: Array) -> Array:
        table = table.astype(dtype)
        if vocabulary:
            table = lax.all_gather(table, vocabulary, axis=0, tiled=True)
        if not columns:
            return table[tokens]
        every = lax.all_gather(tokens, columns, axis=0, tiled=True)
        return lax.all_to_all(table[every], columns, 0, 2, tiled=True)

    out = PartitionSpec(*where, None)
    return jax.shard_map(here, mesh=sharding.mesh, in_specs=(sharding.matrix, where), out_specs=out, check_vma=False)(
        table, tokens
    )


def _look_up_fwd(sharding: VocabSharding, dtype: str, table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(sharding, dtype, table, tokens), (table, tokens)


def _look_up_bwd(
    sharding: VocabSharding, dtype: str, residuals: tuple[Array, Array], grad: Array
) -> tuple[Array, None]:
    where = PartitionSpec(sharding.rows or None, sharding.context or None)
    vocabulary, columns = (names(part) for part in sharding.matrix)

    def here(table: Array, tokens: Array, grad: Array) -> Array:
        if columns:
            tokens = lax.all_gather(tokens, columns, axis=0, tiled=True)
            grad = lax.all_to_all(grad, columns, 2, 0, tiled=True)
        # the columns' devices have exchanged their tokens: what is left to sum over are the other axes of the tokens.
        # Devices that differ in none of them (`tensor`) have the same tokens, and each sums only its own rows
        summed = tuple(axis for axis in (*sharding.rows, *sharding.context) if axis not in columns)
        own = tuple(axis for axis in vocabulary if axis not in summed)
        size = table.shape[0] * math.prod(lax.axis_size(axis) for axis in vocabulary if axis in summed)
        rows = tokens - (lax.axis_index(own) * size if own else 0)
        rows = jnp.where((rows >= 0) & (rows < size), rows, size)
        parts = _column_parts(size, grad.shape[-1])

        def scatter(grad: Array) -> Array:
            total = jnp.zeros((size, grad.shape[-1]), jnp.float32)
            total = total.at[rows].add(grad.astype(jnp.float32), mode="drop")
            return reduce_scatter(total, PartitionSpec(sharding.matrix[0], None), own, summed, sharding.reduce_dtype)

        if parts == 1:
            return scatter(grad).astype(table.dtype)
        pieces = jnp.moveaxis(grad.reshape(*grad.shape[:-1], parts, -1), -2, 0)
        return jnp.moveaxis(lax.map(scatter, pieces), 0, 1).reshape(table.shape).astype(table.dtype)

    specs = sharding.matrix, where, PartitionSpec(*where, None)
    return jax.shard_map(here, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.matrix, check_vma=False)(
        *residuals, grad
    ), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


def _column_parts(rows: int, columns: int) -> int:
    """The least number of equal parts of the columns of which one, in float32, takes at most SCATTER_BYTES."""
    fits = (n for n in range(1, columns) if columns % n == 0 and 4 * rows * columns // n <= SCATTER_BYTES)
    return next(fits, columns)


def sharded_cross_entropy(
    sharding: VocabSharding,
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    temperature: float = 1.0,
) -> Float[Array, "B S"]:
    """`chunked_cross_entropy` of every device's own tokens; the kernel's gradient has the kernel's dtype."""
    # backward goes on only when the matrix' gradient is scattered: 4.4 GiB of K2.5's would wait beside all layers'.
    # Not on a CPU: it may start collectives in any order then, and several virtual devices wait for each other forever
    hidden, kernel = lax.platform_dependent(
        hidden, kernel, tpu=lambda *both: lax.optimization_barrier(both), default=lambda *both: both
    )
    return _nll(sharding, temperature, hidden, kernel, targets)


def _loss_specs(sharding: VocabSharding) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of hidden states, the matrix, and what there is one of a token."""
    where = PartitionSpec(sharding.rows or None, sharding.loss_context or None)
    return PartitionSpec(*where, None), sharding.matrix, where


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(sharding: VocabSharding, temperature: float, hidden: Array, kernel: Array, targets: Array) -> Array:
    return _nll_fwd(sharding, temperature, hidden, kernel, targets)[0]


def _nll_fwd(
    sharding: VocabSharding, temperature: float, hidden: Array, kernel: Array, targets: Array
) -> tuple[Array, tuple]:
    def here(hidden: Array, kernel: Array, targets: Array) -> tuple[Array, Array]:
        kernel = all_gather(kernel.astype(hidden.dtype), sharding.matrix)
        flat = hidden.reshape(-1, hidden.shape[-1])
        both = cross_entropy_and_lse(flat, kernel, targets.reshape(-1), temperature=temperature)
        return both[0].reshape(targets.shape), both[1].reshape(targets.shape)

    specs = _loss_specs(sharding)
    nll, lse = jax.shard_map(here, mesh=sharding.mesh, in_specs=specs, out_specs=(specs[2],) * 2, check_vma=False)(
        hidden, kernel, targets
    )
    return nll, (hidden, kernel, targets, lse)


def _nll_bwd(sharding: VocabSharding, temperature: float, residuals: tuple, grad: Array) -> tuple[Array, Array, None]:
    def here(hidden: Array, kernel: Array, targets: Array, lse: Array, grad: Array) -> tuple[Array, Array]:
        gathered = all_gather(kernel.astype(hidden.dtype), sharding.matrix)
        flat = hidden.reshape(-1, hidden.shape[-1])
        targets, lse, grad = (a.reshape(-1) for a in (targets, lse, grad))
        dhidden, total = cross_entropy_grads(flat, gathered, targets, lse, grad, temperature=temperature)
        summed = *sharding.rows, *sharding.loss_context
        dkernel = reduce_scatter(total, sharding.matrix, (), summed, sharding.reduce_dtype)
        return dhidden.reshape(hidden.shape), dkernel.astype(kernel.dtype)

    tokens, matrix, where = _loss_specs(sharding)
    specs = tokens, matrix, where, where, where
    return *jax.shard_map(here, mesh=sharding.mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)(
        *residuals, grad
    ), None


_nll.defvjp(_nll_fwd, _nll_bwd)
