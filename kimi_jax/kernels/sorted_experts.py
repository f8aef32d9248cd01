"""The routed experts on rows that already lie in the order of their experts: what an expert device does in one round.

Source: design.md section 6. On TPU megablox' grouped matmul takes such rows as they are (`gmm` forward, `tgmm` for the
weights' gradients: XLA's own gradient of `ragged_dot` is dense on jax 0.10.2). Elsewhere, and in float32, they take
the blocks of `kernels.grouped_matmul`. Rows beyond the last expert are not computed; what they hold is unspecified.

W rows   E experts here   D, F widths
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks

# rows, inputs, outputs of a tile. A v5p kernel has 16 MB of VMEM; `tgmm` accumulates inputs x outputs in float32
TILES, OUTER_TILES = (512, 1024, 1024), (512, 1024, 512)
INNER_ROWS = 256
Banks = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]
Grads = tuple[Float[Array, "W D"], Float[Array, " W"], Banks]


def sorted_swiglu(rows: Float[Array, "W D"], sizes: Int[Array, " E"], banks: Banks) -> Float[Array, "W D"]:
    """(silu(row @ gate[e]) * (row @ up[e])) @ down[e]; the first sizes[0] rows are of expert 0, and so on."""
    return lax.platform_dependent(rows, sizes, banks, tpu=_kernel_or_blocks(_kernel, _blocks, rows), default=_blocks)


def sorted_swiglu_grads(
    rows: Float[Array, "W D"],
    scale: Float[Array, " W"],
    sizes: Int[Array, " E"],
    banks: Banks,
    grad: Float[Array, "W D"],
    totals: Banks,
) -> Grads:
    """Gradients of scale * sorted_swiglu(rows) by rows, scale (float32) and banks; forward is made again.

    Those of the banks are added to the totals (float32).
    """
    tpu = _kernel_or_blocks(_kernel_grads, _blocks_grads, rows)
    return lax.platform_dependent(rows, scale, sizes, banks, grad, totals, tpu=tpu, default=_blocks_grads)


def _kernel_or_blocks(kernel, blocks, rows: Array):
    """megablox multiplies float32 as bfloat16, which float32 is not chosen for."""
    return kernel if rows.dtype == jnp.bfloat16 else blocks


# -------------------------------------------------------------------------------------------------------------- blocks


def _scaled(rows: Array, scale: Array, sizes: Array, banks: Banks) -> Array:
    ends = jnp.cumsum(sizes)
    expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0], dtype=ends.dtype), side="right")
    plan = plan_blocks(expert[:, None].astype(jnp.int32), sizes.shape[0])
    return combine(grouped_swiglu(dispatch(rows, plan), *banks, plan), scale[:, None], plan)


def _blocks(rows: Array, sizes: Array, banks: Banks) -> Array:
    return _scaled(rows, jnp.ones(rows.shape[0], jnp.float32), sizes, banks).astype(rows.dtype)


def _blocks_grads(rows: Array, scale: Array, sizes: Array, banks: Banks, grad: Array, totals: Banks) -> Grads:
    _, pullback = jax.vjp(lambda r, s, b: _scaled(r, s, sizes, b), rows, scale, banks)
    drows, dscale, dbanks = pullback(grad.astype(jnp.float32))
    return drows, dscale, jax.tree.map(lambda total, d: total + d.astype(jnp.float32), totals, dbanks)


# -------------------------------------------------------------------------------------------------------------- kernel


def _tiles(rows: int, tiles: tuple[int, int, int] = TILES) -> tuple[int, int, int]:
    """The rows must be whole tiles."""
    height = next(size for size in (tiles[0], 256, 128, 64, 32, 16, 8) if rows % size == 0)
    return height, *tiles[1:]


def _kernel(rows: Array, sizes: Array, banks: Banks, interpret: bool = False) -> Array:
    dot = functools.partial(gmm, group_sizes=sizes, tiling=_tiles(rows.shape[0]), interpret=interpret)
    gate, up, down = banks
    inside = jax.nn.silu(dot(rows, gate, preferred_element_type=jnp.float32))
    inside = (inside * dot(rows, up, preferred_element_type=jnp.float32)).astype(rows.dtype)
    return dot(inside, down, preferred_element_type=rows.dtype)


def _kernel_grads(
    rows: Array, scale: Array, sizes: Array, banks: Banks, grad: Array, totals: Banks, interpret: bool = False
) -> Grads:
    """With a = row gate, b = row up, h = silu(a): y = (h b) down; the scale's gradient is <h b, grad down^T>.

    The kernels sum where they can: over gate and up inside one product, over rounds onto the totals in place. They
    leave out rows beyond the last expert, which hold what memory held.
    """
    settings = {"group_sizes": sizes, "interpret": interpret}
    dot = functools.partial(gmm, tiling=_tiles(rows.shape[0]), **settings)
    dot32 = functools.partial(dot, preferred_element_type=jnp.float32)
    outer = functools.partial(tgmm, tiling=_tiles(rows.shape[0], OUTER_TILES), **settings)
    gate, up, down = banks
    a, b, dinside = dot32(rows, gate), dot32(rows, up), dot32(grad, down, transpose_rhs=True)
    inside, da, db, both, dscale = _inner_grads(a, b, dinside, scale, rows.dtype, interpret)
    weights = jnp.concatenate([gate, up], axis=2)
    drows = dot(both, weights, preferred_element_type=rows.dtype, transpose_rhs=True)
    pairs = (rows, da), (rows, db), (inside, grad)
    dbanks = (outer(x.T, d, existing_out=total) for (x, d), total in zip(pairs, totals, strict=True))
    return drows, dscale, tuple(dbanks)


def _inner_grads(
    a: Float[Array, "W F"], b: Float[Array, "W F"], dinside: Float[Array, "W F"], scale: Float[Array, " W"],
    dtype: DTypeLike, interpret: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """scale h b, gradients of a and b, the same side by side, and that of scale, in one pass over memory.

    Left to the compiler, putting them side by side is a pass of its own, at half the speed.
    """
    rows, width = a.shape
    block = next(size for size in (INNER_ROWS, 128, 64, 32, 16, 8) if rows % size == 0)
    matrix = pl.BlockSpec((block, width), lambda i: (i, 0))
    vector = pl.BlockSpec((None, 1, block), lambda i: (i, 0, 0))
    narrow = jax.ShapeDtypeStruct((rows, width), dtype)
    moved = 3 * a.nbytes + 5 * rows * width * jnp.dtype(dtype).itemsize
    *out, dscale = pl.pallas_call(
        _inner_kernel,
        out_shape=(
            *(narrow,) * 3, jax.ShapeDtypeStruct((rows, 2 * width), dtype),
            jax.ShapeDtypeStruct((rows // block, 1, block), jnp.float32),
        ),
        grid=(rows // block,),
        in_specs=[matrix, matrix, matrix, vector],
        out_specs=[*(matrix,) * 3, pl.BlockSpec((block, 2 * width), lambda i: (i, 0)), vector],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=2**26),
        cost_estimate=pl.CostEstimate(flops=16 * a.size, transcendentals=a.size, bytes_accessed=moved),
        interpret=interpret,
        name="swiglu_gradients",
    )(a, b, dinside, scale.reshape(-1, 1, block))  # fmt: skip
    return (*out, dscale.reshape(-1))


def _inner_kernel(
    a_ref: Any, b_ref: Any, grad: Any, scale_ref: Any, inside: Any, da: Any, db: Any, both: Any, dscale: Any
) -> None:
    a, b, dinside, scale = a_ref[...], b_ref[...], grad[...], scale_ref[0][:, None]
    s = jax.nn.sigmoid(a)
    h = a * s
    summed = jnp.sum(h * b * dinside, axis=1, keepdims=True)
    dscale[...] = jnp.broadcast_to(summed, (a.shape[0], 128)).T[:1]
    inside[...] = (h * b * scale).astype(inside.dtype)
    dinside *= scale
    da[...] = (dinside * b * (s + h * (1 - s))).astype(da.dtype)
    db[...] = (dinside * h).astype(db.dtype)
    both[:, : a.shape[1]], both[:, a.shape[1] :] = da[...], db[...]
