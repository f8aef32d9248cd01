"""Embedding and loss over a mesh: neither the table nor its gradient moves where tokens can move instead.

Source: docs/architecture.md section 6 (what a layout costs on the wire). Look-up: a device has a few columns of the
table; it learns all token ids of those it shares the columns with (small), looks all of them up in its columns, and an
all-to-all gives everybody whole rows of its own tokens. Loss: the output matrix is gathered once, its gradient
scattered; tokens are dealt over `tensor` too, so that nobody does the same tokens.

B rows   S tokens a row   V vocabulary   D width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.cross_entropy import chunked_cross_entropy


class VocabularyCut(NamedTuple):
    """Mesh axes of rows, of a row's tokens in the model and in the loss, and how the matrix is cut."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    context: tuple[str, ...]
    loss_context: tuple[str, ...]
    matrix: PartitionSpec


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def look_up(cut: VocabularyCut, table: Float[Array, "V D"], tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of the table, cut like the tokens."""
    where = PartitionSpec(cut.rows or None, cut.context or None)
    vocabulary, columns = (_names(part) for part in cut.matrix)

    def here(table: Array, tokens: Array) -> Array:
        if vocabulary:
            table = lax.all_gather(table, vocabulary, axis=0, tiled=True)
        if not columns:
            return table[tokens]
        every = lax.all_gather(tokens, columns, axis=0, tiled=True)
        return lax.all_to_all(table[every], columns, 0, 2, tiled=True)

    out = PartitionSpec(*where, None)
    return jax.shard_map(here, mesh=cut.mesh, in_specs=(cut.matrix, where), out_specs=out, check_vma=False)(
        table, tokens
    )


def dealt_cross_entropy(
    cut: VocabularyCut, hidden: Float[Array, "B S D"], kernel: Float[Array, "D V"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
    """`chunked_cross_entropy` of every device's own tokens."""
    where = PartitionSpec(cut.rows or None, cut.loss_context or None)

    def here(hidden: Array, kernel: Array, targets: Array) -> Array:
        for axis, part in enumerate(cut.matrix):
            if names := _names(part):
                kernel = lax.all_gather(kernel, names, axis=axis, tiled=True)
        nll = chunked_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1))
        return nll.reshape(targets.shape)

    specs = PartitionSpec(*where, None), cut.matrix, where
    # backward goes on only when the matrix' gradient is scattered: 4.4 GiB of K2.5's would wait beside all layers'.
    # Not on a CPU: it may start collectives in any order then, and several virtual devices wait for each other forever
    hidden, kernel = lax.platform_dependent(
        hidden, kernel, tpu=lambda *both: lax.optimization_barrier(both), default=lambda *both: both
    )
    return jax.shard_map(here, mesh=cut.mesh, in_specs=specs, out_specs=where, check_vma=False)(hidden, kernel, targets)
