"""The routed experts when there are fewer rows than experts, on a CPU: decoding.

Source: profile in benchmarks/README.md, "Prefill and decoding". Then nothing counts but the weights that are read. So
rows are taken in the order of their experts: an expert's matrices are sliced out of the expert weights once, which
XLA:CPU does by a copy into its cache, and multiplied by one row after the other. A product of one row is read off the
matrix as it lies; for a few rows together XLA:CPU first packs the matrix, which costs more than the product.

N tokens   k choices a token   M = N*k assignments   E experts   D, F widths
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.moe.expert_weights import ExpertWeight, matrix


def single_rows_swiglu(
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    expert_weights: tuple[ExpertWeight, ExpertWeight, ExpertWeight],
    num_experts: int,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "N D"]:
    """Sum over a token's choices of gate * expert(token), float32. Expert e is number first + e of the expert weights
    [*, C, O] of gate, up and down; a number of `num_experts` or more means nowhere. Every product is in the dtype of x,
    as in `grouped_swiglu`. Not differentiable.
    """
    ids, weights = experts.reshape(-1), gates.reshape(-1).astype(jnp.float32)
    order = jnp.argsort(ids)
    used = (ids < num_experts).sum()
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def one_expert(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        begin, out = carry
        expert = ids[order[begin]]
        end = begin + (ids == expert).sum()
        gate, up, down = (matrix(expert_weight, first + expert, x.dtype) for expert_weight in expert_weights)

        def one_row(i: Array, out: Array) -> Array:
            token = order[i] // experts.shape[1]
            inside = jax.nn.silu(dot(x[token], gate)) * dot(x[token], up)
            return out.at[token].add(weights[order[i]] * dot(inside, down).astype(jnp.float32))

        return end, lax.fori_loop(begin, end, one_row, out)

    start = jnp.zeros_like(used), jnp.zeros(x.shape, jnp.float32)
    return lax.while_loop(lambda carry: carry[0] < used, one_expert, start)[1]
