"""The routed experts on rows sorted by expert: dropless, every row is multiplied by its own expert only.

Source: the routed experts of docs/paper_notes.md section 1.5; the blocked CPU form of docs/architecture.md section 6
(XLA:CPU computes every group of `ragged_dot` densely, 20 to 60 times slower). Sorting and padding are planned once for
a layer:

    plan = plan_blocks(experts, num_experts)          # which row goes where
    rows = dispatch(x, plan)                          # gather; each expert's rows padded to whole blocks
    rows = grouped_swiglu(rows, gate, up, down, plan)
    y    = combine(rows, gates, plan)                 # gather and weighted sum

Dispatch and combine are permutations, so both directions of both are gathers (`custom_vjp`); no scatter-add anywhere.

N tokens          k choices a token     M = N*k assignments     E experts
b block           R = nb*b padded rows  nb = M // b + E blocks, the most that any routing can need
D, F widths
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.moe import megablox
from kimi_jax.kernels.moe.expert_weights import (
    ExpertWeight,
    Int4,
    LoRAWeights,
    add_gradient,
    finish_gradient,
    matrix,
    zero_gradient,
)

MAX_BLOCK = 256  # measured on 2 cores: 256 is the fastest of 64, 128, 256 for 1024 and for 512 rows an expert
MIN_BLOCK = 8


class BlockPlan(NamedTuple):
    """Where every assignment goes. All integer; made by `plan_blocks`."""

    source: Int[Array, " R"]  # assignment that fills each row; M for padding rows
    row: Int[Array, "N k"]  # row of each assignment; R for assignments that go nowhere
    expert: Int[Array, " nb"]  # expert of each block, its number in the expert weights
    used: Int[Array, ""]  # blocks that hold at least one row; the others are not computed
    counts: Int[Array, " E"]  # rows of each expert without padding
    first: Int[Array, ""]  # number of expert 0 in the expert weights, which may hold more than these experts


def block_size(assignments: int, num_experts: int) -> int:
    """A power of two near the mean rows an expert, at most MAX_BLOCK: large blocks are fast, small ones pad less."""
    mean = max(assignments // num_experts, 1)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (mean.bit_length() - 1)))


def plan_blocks(
    experts: Int[Array, "N k"], num_experts: int, block: int | None = None, first: Int[Array, ""] | int = 0
) -> BlockPlan:
    """Sort assignments by expert and pad each expert to whole blocks.

    experts: expert of each assignment; a value of `num_experts` or more sends it nowhere (padding tokens).
    """
    ids = jnp.minimum(experts.reshape(-1), num_experts)
    total = ids.shape[0]
    block = block or block_size(total, num_experts)
    num_blocks = total // block + num_experts
    num_rows = num_blocks * block
    order = jnp.argsort(ids)
    edges = jnp.searchsorted(ids[order], jnp.arange(num_experts + 1, dtype=ids.dtype)).astype(jnp.int32)
    counts = jnp.diff(edges)
    block_ends = jnp.cumsum(-(-counts // block))
    expert = jnp.searchsorted(block_ends, jnp.arange(num_blocks, dtype=block_ends.dtype), side="right")
    expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), block_ends]) * block  # first row of each expert

    row_expert = jnp.repeat(expert, block, total_repeat_length=num_rows)
    offset = jnp.arange(num_rows, dtype=jnp.int32) - starts[row_expert]
    filled = offset < counts[row_expert]
    source = jnp.where(filled, order[jnp.minimum(edges[row_expert] + offset, total - 1)], total).astype(jnp.int32)

    rank = jnp.zeros(total, jnp.int32).at[order].set(jnp.arange(total, dtype=jnp.int32), unique_indices=True)
    row = jnp.where(ids < num_experts, starts[ids] + rank - edges[ids], num_rows)
    first = jnp.asarray(first, jnp.int32)
    return BlockPlan(source, row.reshape(experts.shape), expert + first, block_ends[-1], counts, first)


def _take(x: Array, index: Array) -> Array:
    """Rows of x; zero where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x: Float[Array, "N D"], plan: BlockPlan) -> Float[Array, "R D"]:
    """Copy each token to the rows of its experts; padding rows are zero."""
    return _take(x, plan.source // plan.row.shape[1])


def _dispatch_fwd(x: Array, plan: BlockPlan) -> tuple[Array, BlockPlan]:
    return dispatch(x, plan), plan


def _dispatch_bwd(plan: BlockPlan, grad: Array) -> tuple[Array, None]:
    return _take(grad, plan.row).astype(jnp.float32).sum(axis=1).astype(grad.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows: Float[Array, "R D"], gates: Float[Array, "N k"], plan: BlockPlan) -> Float[Array, "N D"]:
    """Sum over a token's choices of gate * row, in float32 (docs/released_model.md section 3: the cast comes after)."""
    return jnp.einsum("nkd,nk->nd", _take(rows, plan.row).astype(jnp.float32), gates.astype(jnp.float32))


def _combine_fwd(rows: Array, gates: Array, plan: BlockPlan) -> tuple[Array, tuple]:
    return combine(rows, gates, plan), (rows, gates, plan)


def _combine_bwd(residuals: tuple, grad: Array) -> tuple[Array, Array, None]:
    rows, gates, plan = residuals
    choices = gates.shape[1]
    gate_rows = _take(gates.reshape(-1), plan.source)[:, None].astype(jnp.float32)
    grad_rows = gate_rows * _take(grad, plan.source // choices)
    grad_gates = jnp.einsum("nkd,nd->nk", _take(rows, plan.row).astype(jnp.float32), grad)
    return grad_rows.astype(rows.dtype), grad_gates.astype(gates.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


# ------------------------------------------------------------------------------------------------- the experts


@jax.custom_vjp
def grouped_swiglu(
    rows: Float[Array, "R D"],
    gate: Float[Array, "E D F"] | Int4 | LoRAWeights,
    up: Float[Array, "E D F"] | Int4 | LoRAWeights,
    down: Float[Array, "E F D"] | Int4 | LoRAWeights,
    plan: BlockPlan,
) -> Float[Array, "R D"]:
    """(silu(row @ gate[e]) * (row @ up[e])) @ down[e], e the row's expert. Float32 is true float32.

    The expert weights may be INT4 or adapted (`kernels.moe.expert_weights`); what is frozen gets no gradient.

    CPU: one loop over the used blocks does all three products of a block while it is in cache, and the backward pass
    makes the inner values again (a third less time than one loop a product, and nothing [R, F] is stored). Other
    platforms: three `ragged_dot`, the seam for megablox. Rows of unused blocks are zeros on CPU, unspecified elsewhere.
    INT4 and adapted expert weights, of which `ragged_dot` would need floats: the kernels of `megablox` on TPU in
    bfloat16, else the loop, which makes floats of one expert's matrix at a time, forward and backward.
    """
    return _run(_Ways(_blocked, _ragged, _kernel), rows, (gate, up, down), plan)


def _swiglu_fwd(
    rows: Array, gate: ExpertWeight, up: ExpertWeight, down: ExpertWeight, plan: BlockPlan
) -> tuple[Array, tuple]:
    return grouped_swiglu(rows, gate, up, down, plan), (rows, gate, up, down, plan)


def _swiglu_bwd(residuals: tuple, grad: Array) -> tuple[Any, ...]:
    rows, *expert_weights, plan = residuals
    return *_run(_Ways(_blocked_grads, _ragged_grads, _kernel_grads), rows, tuple(expert_weights), plan, grad), None


grouped_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


class _Ways(NamedTuple):
    """Three functions of rows, gate, up, down, plan, ... that do the same."""

    blocked: Callable[..., Any]
    ragged: Callable[..., Any]
    kernel: Callable[..., Any]


def _run(ways: _Ways, rows: Array, expert_weights: tuple[ExpertWeight, ...], *rest: Any) -> Any:
    if all(isinstance(expert_weight, jax.Array) for expert_weight in expert_weights):
        return lax.platform_dependent(rows, *expert_weights, *rest, cpu=ways.blocked, default=ways.ragged)
    if megablox.supports(rows, expert_weights):
        return lax.platform_dependent(rows, *expert_weights, *rest, tpu=ways.kernel, default=ways.blocked)
    return ways.blocked(rows, *expert_weights, *rest)


_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _blocks(x: Array, plan: BlockPlan) -> Array:
    return x.reshape(plan.expert.shape[0], -1, x.shape[-1])


def _blocked(rows: Array, gate: ExpertWeight, up: ExpertWeight, down: ExpertWeight, plan: BlockPlan) -> Array:
    x = _blocks(rows, plan)

    def step(i: Array, out: Array) -> Array:
        e = plan.expert[i]
        inside = jax.nn.silu(_dot(x[i], matrix(gate, e, x.dtype))) * _dot(x[i], matrix(up, e, x.dtype))
        return out.at[i].set(_dot(inside, matrix(down, e, x.dtype)))

    return lax.fori_loop(0, plan.used, step, jnp.zeros_like(x)).reshape(rows.shape)


def _blocked_grads(
    rows: Array, gate: ExpertWeight, up: ExpertWeight, down: ExpertWeight, plan: BlockPlan, grad: Array
) -> tuple[Any, ...]:
    """With a = x gate, b = x up, h = silu(a): y = (h b) down. Weight gradients are summed in float32."""
    x, dy = _blocks(rows, plan), _blocks(grad, plan)

    def step(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        dx, dgate, dup, ddown = carry
        e = plan.expert[i]
        gate_e, up_e = matrix(gate, e, x.dtype), matrix(up, e, x.dtype)
        a, b = _dot(x[i], gate_e), _dot(x[i], up_e)
        s = jax.nn.sigmoid(a)
        h = a * s
        dinside = _dot(dy[i], matrix(down, e, x.dtype).T)
        da, db = dinside * b * (s + h * (1 - s)), dinside * h
        dx = dx.at[i].set(_dot(da, gate_e.T) + _dot(db, up_e.T))
        dgate = add_gradient(dgate, gate, e, x[i], da)
        dup = add_gradient(dup, up, e, x[i], db)
        return dx, dgate, dup, add_gradient(ddown, down, e, h * b, dy[i])

    expert_weights = gate, up, down
    dx, *totals = lax.fori_loop(0, plan.used, step, (jnp.zeros_like(x), *map(zero_gradient, expert_weights)))
    return dx.reshape(rows.shape), *map(finish_gradient, totals, expert_weights)


def _sizes(rows: Array, plan: BlockPlan) -> Array:
    """Rows of each expert with its padding, [E]."""
    block = rows.shape[0] // plan.expert.shape[0]
    return -(-plan.counts // block) * block


def _ragged(rows: Array, gate: Array, up: Array, down: Array, plan: BlockPlan) -> Array:
    sizes = _sizes(rows, plan)
    if gate.shape[0] != sizes.shape[0]:
        sizes = lax.dynamic_update_slice(jnp.zeros(gate.shape[0], sizes.dtype), sizes, (plan.first,))
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    dot = functools.partial(lax.ragged_dot, group_sizes=sizes, precision=precision)
    return dot(jax.nn.silu(dot(rows, gate)) * dot(rows, up), down)


def _ragged_grads(rows: Array, gate: Array, up: Array, down: Array, plan: BlockPlan, grad: Array) -> tuple[Array, ...]:
    _, pullback = jax.vjp(lambda x, g, u, d: _ragged(x, g, u, d, plan), rows, gate, up, down)
    return pullback(grad)


def _kernel(rows: Array, gate: ExpertWeight, up: ExpertWeight, down: ExpertWeight, plan: BlockPlan) -> Array:
    return megablox.swiglu(rows, _sizes(rows, plan), (gate, up, down), plan.first)


def _kernel_grads(
    rows: Array, gate: ExpertWeight, up: ExpertWeight, down: ExpertWeight, plan: BlockPlan, grad: Array
) -> tuple[Any, ...]:
    expert_weights, ones = (gate, up, down), jnp.ones(rows.shape[0], jnp.float32)
    totals = tuple(map(zero_gradient, expert_weights))
    dx, _, totals = megablox.swiglu_grads(rows, ones, _sizes(rows, plan), expert_weights, grad, totals, plan.first)
    return dx, *map(finish_gradient, totals, expert_weights)
