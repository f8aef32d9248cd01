"""The routed experts on rows that already lie in the order of their experts: what an expert device does in one round.

Source: docs/architecture.md section 6. On TPU and in bfloat16 the kernels of `kernels.moe.megablox` take such rows as
they are. Elsewhere, and in float32, they take the blocks of `kernels.moe.grouped_matmul`. Rows beyond the last expert
are not computed; what they hold is unspecified.

W rows   E experts here, number `first` of the expert weights and those after it   D, F widths
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.moe import megablox
from kimi_jax.kernels.moe.expert_weights import ExpertWeight, learned
from kimi_jax.kernels.moe.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks

ExpertWeights = tuple[ExpertWeight, ExpertWeight, ExpertWeight]  # of gate and up [*, D, F], of down [*, F, D]
Totals = tuple[Any, Any, Any]  # float32, in the form of `expert_weights.learned`
Grads = tuple[Float[Array, "W D"], Float[Array, " W"], Totals]


def sorted_swiglu(
    rows: Float[Array, "W D"], sizes: Int[Array, " E"], expert_weights: ExpertWeights, first: Int[Array, ""] | int = 0
) -> Float[Array, "W D"]:
    """(silu(row @ gate[e]) * (row @ up[e])) @ down[e]; the first sizes[0] rows are of expert 0, and so on."""
    tpu = megablox.swiglu if megablox.supports(rows, expert_weights) else _blocks
    return lax.platform_dependent(rows, sizes, expert_weights, jnp.asarray(first, jnp.int32), tpu=tpu, default=_blocks)


def sorted_swiglu_grads(
    rows: Float[Array, "W D"],
    scale: Float[Array, " W"],
    sizes: Int[Array, " E"],
    expert_weights: ExpertWeights,
    grad: Float[Array, "W D"],
    totals: Totals,
) -> Grads:
    """Gradients of scale * sorted_swiglu(rows) by rows, scale (float32) and expert weights; the forward pass is
    recomputed.

    Those of the expert weights are added to the totals; what is frozen has none.
    """
    tpu = megablox.swiglu_grads if megablox.supports(rows, expert_weights) else _blocks_grads
    return lax.platform_dependent(rows, scale, sizes, expert_weights, grad, totals, tpu=tpu, default=_blocks_grads)


def _scaled(rows: Array, scale: Array, sizes: Array, expert_weights: ExpertWeights, first: Array | int) -> Array:
    ends = jnp.cumsum(sizes)
    expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0], dtype=ends.dtype), side="right")
    plan = plan_blocks(expert[:, None].astype(jnp.int32), sizes.shape[0], first=first)
    return combine(grouped_swiglu(dispatch(rows, plan), *expert_weights, plan), scale[:, None], plan)


def _blocks(rows: Array, sizes: Array, expert_weights: ExpertWeights, first: Array | int) -> Array:
    return _scaled(rows, jnp.ones(rows.shape[0], jnp.float32), sizes, expert_weights, first).astype(rows.dtype)


def _blocks_grads(
    rows: Array, scale: Array, sizes: Array, expert_weights: ExpertWeights, grad: Array, totals: Totals
) -> Grads:
    _, pullback = jax.vjp(lambda r, s, b: _scaled(r, s, sizes, b, 0), rows, scale, expert_weights)
    drows, dscale, dbanks = pullback(grad.astype(jnp.float32))
    found = tuple(map(learned, dbanks))
    return drows, dscale, jax.tree.map(lambda total, d: total + d.astype(jnp.float32), totals, found)
