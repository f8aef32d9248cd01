"""The routed experts by TPU kernels, on rows in the order of their experts; bfloat16 only.

Source: docs/architecture.md section 6. Floats: megablox' grouped matmul (`gmm` forward, `tgmm` for the weights'
gradients: XLA's own gradient of `ragged_dot` is dense on jax 0.10.2). INT4: `kernels.moe.int4_matmul`; its matrices
have no gradient. Adapters: rows @ a @ b beside the product by their base, so that no matrix of the sum is made. Expert
weights may hold more experts than there are groups of rows; what rows beyond the last group hold is unspecified.

W rows   n groups of rows   E experts of the expert weights, of which group 0 belongs to number `first`   D, F widths
r rank
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.moe import int4_matmul
from kimi_jax.kernels.moe.expert_weights import ExpertWeight, Int4, LoRAWeights

# rows, inputs, outputs of a tile. A v5p kernel has 16 MB of VMEM; `tgmm` accumulates inputs x outputs in float32
TILES, OUTER_TILES = (512, 1024, 1024), (512, 1024, 512)
INNER_ROWS = 256


def supports(rows: Array, expert_weights: tuple[ExpertWeight, ...]) -> bool:
    """Whether the kernels can do it: they would multiply float32 as bfloat16, which float32 is not chosen for."""
    bases = [
        expert_weight.base if isinstance(expert_weight, LoRAWeights) else expert_weight
        for expert_weight in expert_weights
    ]
    return rows.dtype == jnp.bfloat16 and all(
        int4_matmul.supports(rows, base) if isinstance(base, Int4) else base.dtype == jnp.bfloat16 for base in bases
    )


def swiglu(
    rows: Float[Array, "W D"],
    sizes: Int[Array, " n"],
    expert_weights: tuple[ExpertWeight, ExpertWeight, ExpertWeight],
    first: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> Float[Array, "W D"]:
    """(silu(row @ gate[e]) * (row @ up[e])) @ down[e]; the first sizes[0] rows are of group 0, and so on."""
    groups = _Groups(sizes, jnp.asarray(first, jnp.int32), interpret)
    gate, up, down = expert_weights
    inside = jax.nn.silu(_product(groups, rows, gate))
    inside = (inside * _product(groups, rows, up)).astype(rows.dtype)
    return _product(groups, inside, down, rows.dtype)


def swiglu_grads(
    rows: Float[Array, "W D"],
    scale: Float[Array, " W"],
    sizes: Int[Array, " n"],
    expert_weights: tuple[ExpertWeight, ExpertWeight, ExpertWeight],
    grad: Float[Array, "W D"],
    totals: tuple[Any, Any, Any],
    first: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "W D"], Float[Array, " W"], tuple[Any, Any, Any]]:
    """Gradients of scale * swiglu(rows) by rows, scale (float32) and expert weights; those are added to the totals
    (float32, in the form of `expert_weights.learned`).

    With a = row gate, b = row up, h = silu(a): y = (h b) down; the scale's gradient is <h b, grad down^T>.
    The kernels sum where they can: over gate and up inside one product, over rounds onto the totals in place. They
    leave out rows beyond the last expert, which hold what memory held.
    """
    groups = _Groups(sizes, jnp.asarray(first, jnp.int32), interpret)
    gate, up, down = expert_weights
    a, b, dinside = (
        _product(groups, rows, gate),
        _product(groups, rows, up),
        _product(groups, grad, down, transpose=True),
    )
    inside, da, db, both, dscale = _inner_grads(a, b, dinside, scale, rows.dtype, interpret)
    pairs = (rows, da), (rows, db), (inside, grad)
    dbanks = tuple(_outer(groups, *each) for each in zip(totals, expert_weights, pairs, strict=True))
    return _back(groups, da, db, both, gate, up), dscale, dbanks


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


# ------------------------------------------------------------------------------------------- a product for each weight


class _Groups(NamedTuple):
    sizes: Int[Array, " n"]
    first: Int[Array, ""]
    interpret: bool


def _tiles(rows: int, width: int, height: int, tiles: tuple[int, int, int] = TILES) -> tuple[int, int, int]:
    """The rows must be whole tiles."""
    tall = next(size for size in (tiles[0], 256, 128, 64, 32, 16, 8) if rows % size == 0)
    return tall, min(tiles[1], width), min(tiles[2], height)


def _product(
    groups: _Groups, rows: Array, expert_weight: ExpertWeight, dtype: DTypeLike = jnp.float32, transpose: bool = False
) -> Float[Array, "W _"]:
    """Each row by its expert's matrix, or the transpose of it."""
    sizes, first, interpret = groups
    if isinstance(expert_weight, Int4):
        return int4_matmul.int4_gmm(
            rows, expert_weight, sizes, first, dtype=dtype, transpose=transpose, interpret=interpret
        )  # fmt: skip
    if isinstance(expert_weight, LoRAWeights):
        a, b = expert_weight.a.astype(rows.dtype), expert_weight.b.astype(rows.dtype)
        one, other = (b, a) if transpose else (a, b)
        low = _product(groups, _product(groups, rows, one, rows.dtype, transpose), other, transpose=transpose)
        return (_product(groups, rows, expert_weight.base, transpose=transpose) + low).astype(dtype)
    made = expert_weight.shape[1 if transpose else 2]
    tiling = _tiles(rows.shape[0], rows.shape[1], made)
    # group g of the rows belongs to matrix g - group_offset
    return gmm(rows, expert_weight, sizes, dtype, tiling, -first, transpose_rhs=transpose, interpret=interpret)


def _back(
    groups: _Groups, da: Array, db: Array, both: Array, gate: ExpertWeight, up: ExpertWeight
) -> Float[Array, "W D"]:
    """da gate^T + db up^T in their dtype: of floats as one product, of `both`, which sums in its accumulator."""
    if isinstance(gate, jax.Array) and isinstance(up, jax.Array):
        return _product(groups, both, jnp.concatenate([gate, up], axis=2), both.dtype, transpose=True)
    return (_product(groups, da, gate, transpose=True) + _product(groups, db, up, transpose=True)).astype(da.dtype)


def _outer(groups: _Groups, total: Any, expert_weight: ExpertWeight, pair: tuple[Array, Array]) -> Any:
    """The total plus the gradient by the expert weight: inputs x and gradients of the outputs dy in `pair`."""
    x, dy = pair
    if isinstance(expert_weight, Int4):
        return None
    if isinstance(expert_weight, LoRAWeights):
        a, b = expert_weight.a.astype(x.dtype), expert_weight.b.astype(x.dtype)
        back, there = _product(groups, dy, b, x.dtype, transpose=True), _product(groups, x, a, x.dtype)
        return _sum_outer(groups, total[0], x, back), _sum_outer(groups, total[1], there, dy)
    return _sum_outer(groups, total, x, dy)


def _sum_outer(groups: _Groups, total: Float[Array, "E C O"], x: Array, dy: Array) -> Float[Array, "E C O"]:
    tiling = _tiles(x.shape[0], x.shape[1], dy.shape[1], OUTER_TILES)
    outer = functools.partial(tgmm, tiling=tiling, num_actual_groups=total.shape[0], interpret=groups.interpret)
    return outer(x.T, dy, groups.sizes, group_offset=-groups.first, existing_out=total)
