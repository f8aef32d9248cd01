"""A grouped matmul by INT4 matrices for TPUs: a tile of words becomes floats where it is multiplied, in VMEM.

Source: the structure is megablox' (`jax.experimental.pallas.ops.tpu.megablox`: a grid over the pairs of a tile of rows
and an expert that has rows in it), whose table of such pairs is used as it is. What a word means is
`kernels.moe.expert_weights.dequantise`, to the bit: code * scale in float32, rounded once to the bfloat16 of the
scales.

A tile is made of floats anew for every tile of rows, so what is stored and what is read from HBM are 4.5 bits a weight.

W rows   E experts of the expert weights, of which n from `first` on have rows   C inputs, O outputs of a matrix
C8 = C / 8 words   G = C / group scales   m, c, o rows, inputs, outputs of a tile   t visits of a tile by an expert
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.moe.expert_weights import CODES, Int4

# Widest tile. Of 16 MB of VMEM: rows, words and results twice, their sum, a tile of floats.
ROWS, WIDTH = 512, 1024
LEAST_ROWS = 128  # fewer do not make the matrix unit faster


def supports(rows: Array, expert_weight: Int4) -> bool:
    """Whether `int4_gmm` can do it: bfloat16 rows and scales."""
    return rows.dtype == jnp.bfloat16 and expert_weight.scales.dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnames=("dtype", "transpose", "interpret", "width"))
def int4_gmm(
    rows: Float[Array, "W C"],
    expert_weight: Int4,
    sizes: Int[Array, " n"],
    first: Int[Array, ""] | int = 0,
    *,
    dtype: DTypeLike = jnp.float32,
    transpose: bool = False,
    interpret: bool = False,
    width: int = WIDTH,
) -> Float[Array, "W O"]:
    """rows @ matrix: the first sizes[0] rows by number `first` of the expert weight, the next sizes[1] by the one after
    it, ...

    rows: bfloat16 [W, C], or [W, O] for the product by the transposed matrices. Sums in float32, results in `dtype`
    ([W, O] or [W, C]). Rows beyond the last expert hold whatever memory held. width: most inputs and outputs of a tile.
    Raises ValueError for rows or scales that are not bfloat16, or widths that do not fit.
    """
    inputs, outputs = expert_weight.words.shape[1] * CODES, expert_weight.words.shape[2]
    group = inputs // expert_weight.scales.shape[1]
    given, made = (outputs, inputs) if transpose else (inputs, outputs)
    if not supports(rows, expert_weight):
        raise ValueError(f"int4_gmm takes bfloat16 rows and scales, not {rows.dtype} and {expert_weight.scales.dtype}")
    if rows.shape[1] != given or inputs % group or group % CODES or width % group:
        raise ValueError(
            f"rows {rows.shape} and INT4 matrices [{inputs}, {outputs}] in groups of {group} do not fit together"
            f"{' transposed' if transpose else ''}; groups must be whole words, tiles of {width} whole groups"
        )
    tile_m, tile_k, tile_n = row_tile(rows.shape[0], sizes.shape[0]), min(given, width), min(made, width)
    tile_c, tile_o = (tile_n, tile_k) if transpose else (tile_k, tile_n)
    padded = -(-rows.shape[0] // tile_m) * tile_m
    visits, num_visits = make_group_metadata(
        group_sizes=sizes, m=padded, tm=tile_m, start_group=jnp.int32(0), num_nonzero_groups=sizes.shape[0],
        visit_empty_groups=False,
    )  # fmt: skip
    steps = -(-given // tile_k)

    def matrix_index(n, t, k, visits, first):
        place = (n, k) if transpose else (k, n)
        return (visits[1][t] + first[0], *place)

    return pl.pallas_call(
        functools.partial(_kernel, given=given, transpose=transpose),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], made), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            in_specs=[
                pl.BlockSpec((tile_m, tile_k), lambda n, t, k, visits, first: (visits[2][t], k)),
                pl.BlockSpec((None, tile_c // CODES, tile_o), matrix_index),
                pl.BlockSpec((None, tile_c // group, tile_o), matrix_index),
            ],
            out_specs=pl.BlockSpec((tile_m, tile_n), lambda n, t, k, visits, first: (visits[2][t], n)),
            grid=(-(-made // tile_n), num_visits, steps),
            scratch_shapes=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(rows, expert_weight, sizes, dtype),
        interpret=interpret,
        name="int4_gmm",
    )(visits, jnp.asarray(first, jnp.int32).reshape(1), rows, *expert_weight)


def row_tile(rows: int, experts: int) -> int:
    """Rows of a tile: about those of an expert, as a tile is multiplied by every expert that has rows in it."""
    mean = max(rows // experts, 1)
    return min(ROWS, max(LEAST_ROWS, 1 << (mean.bit_length() - 1)))


def _cost(rows: Array, expert_weight: Int4, sizes: Array, dtype: DTypeLike) -> pl.CostEstimate:
    inputs, outputs = expert_weight.words.shape[1] * CODES, expert_weight.words.shape[2]
    read = (expert_weight.words[0].nbytes + expert_weight.scales[0].nbytes) * sizes.shape[0]
    made = rows.shape[0] * (inputs + outputs - rows.shape[1]) * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * rows.shape[0] * inputs * outputs, bytes_accessed=rows.nbytes + read + made, transcendentals=0
    )


def _kernel(visits, first, rows, words, scales, out, total, *, given: int, transpose: bool):
    """One tile of rows by one tile of one matrix, the inputs innermost."""
    offsets, experts, tiles = visits
    t, k, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    x, tile = rows[...], dequantised(words[...], scales[...])
    width = x.shape[1]
    if given % width:  # what lies beyond the edge is not zero, and may be NaN
        left = given - k * width
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, 0)
        tile = jnp.where(lax.broadcasted_iota(jnp.int32, tile.shape, int(transpose)) < left, tile, 0)
    product = lax.dot_general(x, tile, (((1,), (int(transpose),)), ((), ())), preferred_element_type=jnp.float32)
    total[...] = product + jnp.where(k == 0, 0.0, total[...])

    @pl.when(k == steps - 1)
    def _():
        row = lax.broadcasted_iota(jnp.int32, total.shape, 0) + tiles[t] * total.shape[0]
        mine = (row >= offsets[experts[t]]) & (row < offsets[experts[t] + 1])
        out[...] = jnp.where(mine, total[...], out[...].astype(jnp.float32)).astype(out.dtype)


def dequantised(words: Int[Array, "c8 o"], scales: Float[Array, "g o"]) -> Float[Array, "c o"]:
    """`expert_weights.dequantise` to the bfloat16 of the scales, in operations that the TPU compiler has for a
    kernel."""
    height, outputs = words.shape
    shifts = 4 * lax.broadcasted_iota(jnp.int32, (height, CODES, outputs), 1)
    codes = ((words[:, None] >> shifts) & 15) - 8  # the sign that the shift brings in is masked out
    wide = codes.reshape(scales.shape[0], -1, outputs).astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
    return wide.reshape(height * CODES, outputs).astype(scales.dtype)
