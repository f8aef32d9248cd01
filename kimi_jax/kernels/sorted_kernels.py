"""The routed experts by TPU kernels, on rows in the order of their experts; bfloat16 only.

Source: design.md section 6. Floats: megablox' grouped matmul (`gmm` forward, `tgmm` for the weights' gradients: XLA's
own gradient of `ragged_dot` is dense on jax 0.10.2). INT4: `kernels.int4_matmul`; its matrices have no gradient.
Adapters: rows @ a @ b beside the product by their base, so that no matrix of the sum is made. Banks may hold more
experts than there are groups of rows; what rows beyond the last group hold is unspecified.

W rows   n groups of rows   E experts of the banks, of which group 0 belongs to number `first`   D, F widths   r rank
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import int4_matmul
from kimi_jax.kernels.banks import Adapted, Bank, Int4

# rows, inputs, outputs of a tile. A v5p kernel has 16 MB of VMEM; `tgmm` accumulates inputs x outputs in float32
TILES, OUTER_TILES = (512, 1024, 1024), (512, 1024, 512)


def takes(rows: Array, banks: tuple[Bank, ...]) -> bool:
    """Whether the kernels can do it: they would multiply float32 as bfloat16, which float32 is not chosen for."""
    bases = [bank.base if isinstance(bank, Adapted) else bank for bank in banks]
    return rows.dtype == jnp.bfloat16 and all(
        int4_matmul.takes(rows, base) if isinstance(base, Int4) else base.dtype == jnp.bfloat16 for base in bases
    )


def swiglu(
    rows: Float[Array, "W D"],
    sizes: Int[Array, " n"],
    banks: tuple[Bank, Bank, Bank],
    first: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> Float[Array, "W D"]:
    """(silu(row @ gate[e]) * (row @ up[e])) @ down[e]; the first sizes[0] rows are of group 0, and so on."""
    groups = _Groups(sizes, jnp.asarray(first, jnp.int32), interpret)
    gate, up, down = banks
    inside = jax.nn.silu(_product(groups, rows, gate))
    inside = (inside * _product(groups, rows, up)).astype(rows.dtype)
    return _product(groups, inside, down, rows.dtype)


def swiglu_grads(
    rows: Float[Array, "W D"],
    scale: Float[Array, " W"],
    sizes: Int[Array, " n"],
    banks: tuple[Bank, Bank, Bank],
    grad: Float[Array, "W D"],
    totals: tuple[Any, Any, Any],
    first: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "W D"], Float[Array, " W"], tuple[Any, Any, Any]]:
    """Gradients of scale * swiglu(rows) by rows, scale (float32) and banks; those are added to the totals (float32, in
    the form of `banks.learned`).

    With a = row gate, b = row up, h = silu(a): y = (h b) down; the scale's gradient is <h b, grad down^T>.
    The kernels sum where they can: over gate and up inside one product, over rounds onto the totals in place.
    """
    groups = _Groups(sizes, jnp.asarray(first, jnp.int32), interpret)
    gate, up, down = banks
    # the kernels leave rows beyond the last expert as memory was
    valid = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    a, b = _product(groups, rows, gate), _product(groups, rows, up)
    dinside = jnp.where(valid, _product(groups, grad, down, transpose=True), 0.0)
    s = jax.nn.sigmoid(a)
    h = a * s
    inside = jnp.where(valid, h * b, 0.0)
    dscale = jnp.sum(inside * dinside, axis=1)
    dinside = dinside * scale[:, None]
    da = jnp.where(valid, dinside * b * (s + h * (1 - s)), 0.0).astype(rows.dtype)
    db = jnp.where(valid, dinside * h, 0.0).astype(rows.dtype)
    inside = (inside * scale[:, None]).astype(rows.dtype)
    pairs = (rows, da), (rows, db), (inside, grad)
    dbanks = tuple(_outer(groups, *each) for each in zip(totals, banks, pairs, strict=True))
    return _back(groups, da, db, gate, up), dscale, dbanks


# ---------------------------------------------------------------------------------------------- a product for each bank


class _Groups(NamedTuple):
    sizes: Int[Array, " n"]
    first: Int[Array, ""]
    interpret: bool


def _tiles(rows: int, width: int, height: int, tiles: tuple[int, int, int] = TILES) -> tuple[int, int, int]:
    """The rows must be whole tiles."""
    tall = next(size for size in (tiles[0], 256, 128, 64, 32, 16, 8) if rows % size == 0)
    return tall, min(tiles[1], width), min(tiles[2], height)


def _product(
    groups: _Groups, rows: Array, bank: Bank, dtype: DTypeLike = jnp.float32, transpose: bool = False
) -> Float[Array, "W _"]:
    """Each row by its expert's matrix, or the transpose of it."""
    sizes, first, interpret = groups
    if isinstance(bank, Int4):
        return int4_matmul.int4_gmm(
            rows, bank, sizes, first, dtype=dtype, transpose=transpose, interpret=interpret
        )  # fmt: skip
    if isinstance(bank, Adapted):
        a, b = bank.a.astype(rows.dtype), bank.b.astype(rows.dtype)
        one, other = (b, a) if transpose else (a, b)
        low = _product(groups, _product(groups, rows, one, rows.dtype, transpose), other, transpose=transpose)
        return (_product(groups, rows, bank.base, transpose=transpose) + low).astype(dtype)
    made = bank.shape[1 if transpose else 2]
    tiling = _tiles(rows.shape[0], rows.shape[1], made)
    # group g of the rows belongs to matrix g - group_offset
    return gmm(rows, bank, sizes, dtype, tiling, -first, transpose_rhs=transpose, interpret=interpret)


def _back(groups: _Groups, da: Array, db: Array, gate: Bank, up: Bank) -> Float[Array, "W D"]:
    """da gate^T + db up^T in their dtype: of floats as one product, which sums in its accumulator."""
    if isinstance(gate, jax.Array) and isinstance(up, jax.Array):
        both = jnp.concatenate([da, db], axis=1), jnp.concatenate([gate, up], axis=2)
        return _product(groups, *both, da.dtype, transpose=True)
    return (_product(groups, da, gate, transpose=True) + _product(groups, db, up, transpose=True)).astype(da.dtype)


def _outer(groups: _Groups, total: Any, bank: Bank, pair: tuple[Array, Array]) -> Any:
    """The total plus the gradient by the bank: inputs x and gradients of the outputs dy in `pair`."""
    x, dy = pair
    if isinstance(bank, Int4):
        return None
    if isinstance(bank, Adapted):
        a, b = bank.a.astype(x.dtype), bank.b.astype(x.dtype)
        back, there = _product(groups, dy, b, x.dtype, transpose=True), _product(groups, x, a, x.dtype)
        return _sum_outer(groups, total[0], x, back), _sum_outer(groups, total[1], there, dy)
    return _sum_outer(groups, total, x, dy)


def _sum_outer(groups: _Groups, total: Float[Array, "E C O"], x: Array, dy: Array) -> Float[Array, "E C O"]:
    tiling = _tiles(x.shape[0], x.shape[1], dy.shape[1], OUTER_TILES)
    outer = functools.partial(tgmm, tiling=tiling, num_actual_groups=total.shape[0], interpret=groups.interpret)
    return outer(x.T, dy, groups.sizes, group_offset=-groups.first, existing_out=total)
