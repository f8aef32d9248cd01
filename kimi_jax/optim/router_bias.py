"""Load balancing without a loss: the selection bias of every router, moved against its load.

Source: docs/paper_notes.md section 1.5 (DeepSeek-V3's rule with Moonlight's centring). The bias decides which experts
are picked, not how much they weigh, and takes no gradient.

Shape letters: M layers with experts, E routed experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from kimi_jax.nn.decoder import map_router_bias


def step(bias: Float[Array, "*M E"], load: Float[Array, "*M E"], rate: float) -> Float[Array, "*M E"]:
    """The next bias: b + rate * (sign(e) - mean(sign(e))), e = mean load - load; its mean over experts stays.

    `load` counts tokens routed to each expert in the global batch. Source: docs/paper_notes.md section 1.5 (Moonlight,
    arXiv:2502.16982).
    """
    direction = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    return bias + rate * (direction - jnp.mean(direction, axis=-1, keepdims=True)).astype(bias.dtype)


def apply(params: PyTree, expert_load: Float[Array, "M E"], rate: float) -> PyTree:
    """Parameters with every router's bias moved once; unchanged for a model without experts or a rate of 0.

    Raises KeyError if a router is not where the decoder puts it.
    """
    if rate == 0 or expert_load.shape[0] == 0:
        return params
    return map_router_bias(params, lambda bias, load: step(bias, load, rate), expert_load)
