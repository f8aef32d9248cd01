"""The routed experts on rows that already lie in the order of their experts: what an expert device does in one round.

Source: design.md section 6. On TPU megablox' grouped matmul takes such rows as they are (`gmm` forward, `tgmm` for the
weights' gradients: XLA's own gradient of `ragged_dot` is dense on jax 0.10.2). Elsewhere, and in float32, they take
the blocks of `kernels.grouped_matmul`. Rows beyond the last expert are not computed; what they hold is unspecified.

W rows   E experts here   D, F widths
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks

# rows, inputs, outputs of a tile. A v5p kernel has 16 MB of VMEM; `tgmm` accumulates inputs x outputs in float32
TILES, OUTER_TILES = (512, 1024, 1024), (512, 1024, 512)
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

    The kernels sum where they can: over gate and up inside one product, over rounds onto the totals in place.
    """
    settings = {"group_sizes": sizes, "interpret": interpret}
    dot = functools.partial(gmm, tiling=_tiles(rows.shape[0]), **settings)
    dot32 = functools.partial(dot, preferred_element_type=jnp.float32)
    outer = functools.partial(tgmm, tiling=_tiles(rows.shape[0], OUTER_TILES), **settings)
    gate, up, down = banks
    # the kernel leaves rows beyond the last expert as memory was
    valid = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    a, b = dot32(rows, gate), dot32(rows, up)
    dinside = jnp.where(valid, dot32(grad, down, transpose_rhs=True), 0.0)
    s = jax.nn.sigmoid(a)
    h = a * s
    inside = jnp.where(valid, h * b, 0.0)
    dscale = jnp.sum(inside * dinside, axis=1)
    dinside = dinside * scale[:, None]
    da = jnp.where(valid, dinside * b * (s + h * (1 - s)), 0.0).astype(rows.dtype)
    db = jnp.where(valid, dinside * h, 0.0).astype(rows.dtype)
    both = jnp.concatenate([da, db], axis=1), jnp.concatenate([gate, up], axis=2)
    drows = dot(*both, preferred_element_type=rows.dtype, transpose_rhs=True)
    inside = (inside * scale[:, None]).astype(rows.dtype)
    pairs = (rows, da), (rows, db), (inside, grad)
    dbanks = (outer(x.T, d, existing_out=total) for (x, d), total in zip(pairs, totals, strict=True))
    return drows, dscale, tuple(dbanks)
