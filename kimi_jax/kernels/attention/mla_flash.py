"""MLA's attention on TPU, in the form in which its projections lie: no transposition, no padding, no copied rotary key.

Source: flash attention (Dao et al. 2022, Algorithms 1 and 2) for the naive form of MLA (docs/released_model.md section
3). A head is a block of columns: queries [nope | rotary | swapped], keys and values [nope | value] as `kv_b` makes
them, and one rotary key for all heads. A rotated query is rotary * cos + swapped * sin (`kernels.attention.mla` makes
the swapped columns); both summands meet the same key, so that nothing is moved between lanes.

Scores are held keys by queries, so that a query's statistics are a row. Forward has one head's keys and values of a row
of the batch in VMEM, backward its queries: five products for all gradients, where two kernels need seven. Blocks above
the diagonal are skipped, segments masked inside blocks.

B rows   T, K positions of queries and keys   H heads   n, v widths without rotary and of values   R twice the rotary
w = n + R of queries   u = n + v of keys and values
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

BLOCKS = (512, 256, 128)  # positions a block: the largest that divides
LANES = 128
NOTHING = -1e30  # log-sum-exp of a query that sees no key, and its largest logit
LONGEST = 8192  # positions of which a head's queries, or keys and values, fit into VMEM
VMEM = 64 * 2**20


class Shape(NamedTuple):
    """Sizes of one call, all static."""

    heads: int
    nope: int
    rotary: int  # R
    value: int
    queries: int
    keys: int
    scale: float
    causal: bool

    @property
    def wide(self) -> int:
        """Columns of a head's queries."""
        return self.nope + self.rotary

    @property
    def both(self) -> int:
        """Columns of a head's keys and values."""
        return self.nope + self.value

    @property
    def q_block(self) -> int:
        """Queries a block."""
        return next(size for size in BLOCKS if self.queries % size == 0)

    @property
    def k_block(self) -> int:
        """Keys a block."""
        return next(size for size in BLOCKS if self.keys % size == 0)

    def pairs(self) -> int:
        """Blocks of queries times blocks of keys that are computed, in pairs of positions."""
        q, k = self.q_block, self.k_block
        seen = [
            min(self.keys, -(-(i + 1) * q // k) * k) if self.causal else self.keys for i in range(self.queries // q)
        ]
        return q * sum(seen)


def supports(shape: Shape, dtype: Any) -> bool:
    """Whether the kernels take these sizes: whole vectors, bfloat16, rows that fit into VMEM."""
    widths = shape.nope, shape.rotary, shape.value, shape.queries, shape.keys
    longest = max(shape.queries, shape.keys)
    return dtype == jnp.bfloat16 and all(width % LANES == 0 for width in widths) and longest <= LONGEST


def forward(
    shape: Shape,
    q: Float[Array, "B T Hw"],
    turn: Float[Array, "B T R"],
    kv: Float[Array, "B K Hu"],
    rope: Float[Array, "B K R"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    interpret: bool = False,
) -> tuple[Float[Array, "B T Hv"], Float[Array, "B H T"], Float[Array, "B H T"]]:
    """Output (0 for a query that sees nothing), log-sum-exp and largest logit of each query (then NOTHING), float32.

    turn: what the rotary and the swapped columns are multiplied by, scale included, float32; rope: the rotated key,
    twice. Causal: T = K, and no query sees a later key.
    """
    rows, block, count = q.shape[0], shape.q_block, shape.queries // shape.q_block
    statistic = jax.ShapeDtypeStruct((rows, shape.heads, count, 1, block), jnp.float32)
    spec = pl.BlockSpec((None, None, None, 1, block), lambda b, h, i: (b, h, i, 0, 0))
    out, lse, top = pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        out_shape=(jax.ShapeDtypeStruct((rows, shape.queries, shape.heads * shape.value), q.dtype), *(statistic,) * 2),
        grid=(rows, shape.heads, count),
        in_specs=[
            pl.BlockSpec((None, block, shape.wide), lambda b, h, i: (b, i, h)),
            pl.BlockSpec((None, block, shape.rotary), lambda b, h, i: (b, i, 0)),
            pl.BlockSpec((None, shape.keys, shape.both), lambda b, h, i: (b, 0, h)),
            pl.BlockSpec((None, shape.keys, shape.rotary), lambda b, h, i: (b, 0, 0)),
            pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, i, 0, 0)),
            pl.BlockSpec((None, shape.keys // shape.k_block, 1, shape.k_block), lambda b, h, i: (b, 0, 0, 0)),
        ],
        out_specs=[pl.BlockSpec((None, block, shape.value), lambda b, h, i: (b, i, h)), spec, spec],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM),
        cost_estimate=_cost(shape, 2 * (shape.wide + shape.value), rows, q, turn, kv, rope),
        interpret=interpret,
        name="mla_flash_forward",
    )(q, turn, kv, rope, _blocks(_told_apart(query_ids, -1), block), _blocks(key_ids, shape.k_block))
    return out, lse.reshape(rows, shape.heads, -1), top.reshape(rows, shape.heads, -1)


def backward(
    shape: Shape,
    q: Float[Array, "B T Hw"],
    turn: Float[Array, "B T R"],
    kv: Float[Array, "B K Hu"],
    rope: Float[Array, "B K R"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B K"],
    out: Float[Array, "B T Hv"],
    lse: Float[Array, "B H T"],
    grad: Float[Array, "B T Hv"],
    interpret: bool = False,
) -> tuple[Float[Array, "B T Hw"], Float[Array, "B K Hu"], Float[Array, "B K R"]]:
    """Gradients of q, kv and rope (float32: a sum over heads).

    out and lse may be those over more keys than these (the rest of a longer row).
    """
    rows, block, count = q.shape[0], shape.q_block, shape.queries // shape.q_block
    lse = jnp.where(lse > NOTHING / 2, lse, 0.0)  # a query without keys: exp(NOTHING - 0) = 0
    delta = grad.astype(jnp.float32) * out.astype(jnp.float32)
    delta = delta.reshape(*delta.shape[:2], shape.heads, -1).sum(axis=-1).swapaxes(1, 2)
    whole = lambda width: pl.BlockSpec((None, shape.queries, width), lambda b, h, j: (b, 0, h))  # noqa: E731
    statistic = pl.BlockSpec((None, None, count, 1, block), lambda b, h, j: (b, h, 0, 0, 0))
    part = pl.BlockSpec((None, shape.k_block, shape.both), lambda b, h, j: (b, j, h))
    shared = lambda length: pl.BlockSpec((None, length, shape.rotary), lambda b, h, j: (b, 0, 0))  # noqa: E731
    products = 2 * (3 * shape.wide + 2 * shape.value)
    return pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(kv.shape, kv.dtype),
            jax.ShapeDtypeStruct(rope.shape, jnp.float32),
        ),
        grid=(rows, shape.heads, shape.keys // shape.k_block),
        in_specs=[
            whole(shape.wide), shared(shape.queries), part,
            pl.BlockSpec((None, shape.k_block, shape.rotary), lambda b, h, j: (b, j, 0)),
            pl.BlockSpec((None, count, 1, block), lambda b, h, j: (b, 0, 0, 0)),
            pl.BlockSpec((None, None, 1, shape.k_block), lambda b, h, j: (b, j, 0, 0)),
            statistic, statistic, whole(shape.value),
        ],
        out_specs=[whole(shape.wide), part, shared(shape.keys)],
        scratch_shapes=[pltpu.VMEM((shape.queries, shape.wide), dtype) for dtype in (q.dtype, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_cost(shape, products, rows, q, turn, kv, rope, q, kv, rope, grad),
        interpret=interpret,
        name="mla_flash_backward",
    )(
        q, turn, kv, rope, _blocks(_told_apart(query_ids, -1), block), _blocks(key_ids, shape.k_block),
        lse.reshape(rows, shape.heads, count, 1, block), delta.reshape(rows, shape.heads, count, 1, block), grad,
    )  # fmt: skip


def _told_apart(ids: Array, other: int) -> Array:
    """Padding (0) looks at nothing: the kernel only compares."""
    return jnp.where(ids > 0, ids, other)


def _blocks(ids: Array, block: int) -> Array:
    return ids.reshape(ids.shape[0], -1, 1, block)


def _cost(shape: Shape, products: int, rows: int, *moved: Array) -> pl.CostEstimate:
    """What is computed, blocks on the diagonal whole."""
    pairs = rows * shape.heads * shape.pairs()
    return pl.CostEstimate(
        flops=pairs * products, transcendentals=pairs, bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved)
    )


# -------------------------------------------------------------------------------------------------------------- kernels


def _rotated(shape: Shape, q: Array, turn: Array) -> Array:
    """Queries as they meet the keys, or gradients of these back to gradients of queries; float32."""
    q, nope = q.astype(jnp.float32), shape.nope
    return jnp.concatenate([q[:, :nope] * shape.scale, q[:, nope:] * turn], axis=1)


def _scores(shape: Shape, q: Array, k: Array, rope: Array, query_ids: Array, key_ids: Array, i: Any, j: Any) -> Array:
    """[keys, queries] of block i of queries and j of keys, float32; NOTHING where a query may not look.

    query_ids, key_ids: [1, block].
    """
    nope = shape.nope
    scores = _dot(k[:, :nope], q[:, :nope], 1, 1) + _dot(rope, q[:, nope:], 1, 1)
    mask = key_ids[0][:, None] == query_ids
    if shape.causal:
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + j * shape.k_block
        query = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + i * shape.q_block
        mask &= key <= query
    return jnp.where(mask, scores, NOTHING)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(
    shape: Shape, q_ref: Any, turn: Any, kv_ref: Any, rope_ref: Any, query_ids: Any, key_ids: Any,
    out: Any, lse: Any, top: Any,
) -> None:  # fmt: skip
    """One block of queries of a head against all keys that it may see. Sums are held values by queries."""
    i, size = pl.program_id(2), shape.k_block
    q, ids = _rotated(shape, q_ref[...], turn[...]).astype(q_ref.dtype), query_ids[...]

    def block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, acc = carry
        here = pl.ds(pl.multiple_of(j * size, size), size)
        kv = kv_ref[here, :]
        scores = _scores(shape, q, kv, rope_ref[here, :], ids, key_ids[j], i, j)
        new = jnp.maximum(largest, scores.max(axis=0, keepdims=True))
        safe = jnp.maximum(new, NOTHING / 2)  # a query without keys: exp(NOTHING - NOTHING/2) = 0
        weights = jnp.exp(scores - safe)
        old = jnp.exp(largest - safe)
        acc = acc * old + _dot(kv[:, shape.nope :], weights.astype(kv.dtype), 0, 0)
        return new, total * old + weights.sum(axis=0, keepdims=True), acc

    start = jnp.full((1, shape.q_block), NOTHING, jnp.float32)
    zeros = jnp.zeros((shape.value, shape.q_block), jnp.float32)
    blocks = lax.div((i + 1) * shape.q_block + size - 1, size) if shape.causal else shape.keys // size
    largest, total, acc = lax.fori_loop(0, blocks, block, (start, jnp.zeros_like(start), zeros))
    out[...] = (acc / jnp.maximum(total, 1e-30)).T.astype(out.dtype)
    seen = total > 0
    lse[...] = jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), NOTHING)
    top[...] = largest


def _backward_kernel(
    shape: Shape, q_ref: Any, turn: Any, kv_ref: Any, rope_ref: Any, query_ids: Any, key_ids: Any, lse: Any, delta: Any,
    grad: Any, dq: Any, dkv: Any, drope: Any, rotated: Any, total: Any,
) -> None:  # fmt: skip
    """One block of keys of a head against all queries that may see it.

    dq is summed over the blocks of keys, drope over all heads too. With P the probabilities and dS = P * (grad v^T -
    rowsum(grad * out)): dv = P grad, dk = dS q, dq = dS k.
    """
    h, j, nope = pl.program_id(1), pl.program_id(2), shape.nope
    size, keys = shape.q_block, shape.k_block

    @pl.when(j == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        rotated[...] = _rotated(shape, q_ref[...], turn[...]).astype(rotated.dtype)

    @pl.when((j == 0) & (h == 0))
    def _() -> None:
        drope[...] = jnp.zeros_like(drope)

    kv, rope, ids = kv_ref[...], rope_ref[...], key_ids[...]
    k = jnp.concatenate([kv[:, :nope], rope], axis=1)

    def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        here = pl.ds(pl.multiple_of(i * size, size), size)
        q, dout = rotated[here, :], grad[here, :]
        probs = jnp.exp(_scores(shape, q, kv, rope, query_ids[i], ids, i, j) - lse[i])
        dv += _dot(probs.astype(dout.dtype), dout, 1, 0)
        dscores = (probs * (_dot(kv[:, nope:], dout, 1, 1) - delta[i])).astype(q.dtype)
        total[here, :] += _dot(dscores, k, 0, 0)
        return dk + _dot(dscores, q, 1, 0), dv

    first = lax.div(j * keys, size) if shape.causal else 0
    zeros = [jnp.zeros((keys, width), jnp.float32) for width in (nope + shape.rotary, shape.value)]
    dk, dv = lax.fori_loop(first, shape.queries // size, block, tuple(zeros))
    dkv[:, :nope], dkv[:, nope:] = dk[:, :nope].astype(dkv.dtype), dv.astype(dkv.dtype)
    drope[pl.ds(pl.multiple_of(j * keys, keys), keys), :] += dk[:, nope:]

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        dq[...] = _rotated(shape, total[...], turn[...]).astype(dq.dtype)
