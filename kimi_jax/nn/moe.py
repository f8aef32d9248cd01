"""Mixture of experts: sigmoid router with a selection bias, dropless routed experts, shared experts.

Source: reference.md section 3 (router in float32, bias for selection only, combine in float32, then cast, then the
shared experts); paper.md section 1.5 (sequence-wise balance loss).

B rows   S tokens a row   N = B*S   D width   E experts   k choices   F inner width of an expert
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from kimi_jax.config import ModelConfig, MoEConfig
from kimi_jax.kernels.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks
from kimi_jax.nn.layers import SwiGLU
from kimi_jax.nn.param import Muon, RouterBias, declare


@struct.dataclass
class MoEAux:
    """What one MoE layer reports. expert_load [E] float32, balance_loss [] float32, dropped [] int32."""

    expert_load: Any  # tokens sent to each expert, padding excluded
    balance_loss: Any  # sequence-wise, without its weight alpha
    dropped: Any  # choices of real tokens that no expert computed: 0 by construction, counted from the plan


class Routing(NamedTuple):
    """The router's verdict on each token."""

    experts: Int[Array, "*b k"]  # best first by score + bias
    gates: Float[Array, "*b k"]  # float32 weights of the chosen, from the scores without bias
    scores: Float[Array, "*b E"]  # float32 sigmoid scores of all


def route(
    x: Float[Array, "*b D"],
    kernel: Float[Array, "D E"],
    bias: Float[Array, " E"],
    moe: MoEConfig,
    picks: Int[Array, "*b k"] | None = None,
) -> Routing:
    """Choose k experts a token, all in float32. `picks` pins the choice; the gates still come from these scores."""
    logits = jnp.matmul(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    if picks is None:
        _, experts = lax.top_k(lax.stop_gradient(scores + bias.astype(jnp.float32)), moe.num_experts_per_tok)
    else:
        experts = picks.astype(jnp.int32)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, gates * moe.routed_scaling_factor, scores)


def balance_loss(scores: Float[Array, "B S E"], segment_ids: Int[Array, "B S"], picks: int) -> Float[Array, ""]:
    """Sequence-wise balance loss sum_i f_i P_i (1 if perfectly balanced), mean over the rows that hold tokens.

    A sequence is a packed row: its real tokens, whatever document they belong to. f_i counts how often expert i is
    among the best `picks` scores (without bias, as the paper writes it) and has no gradient.
    """
    num_experts = scores.shape[-1]
    real = (segment_ids > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(axis=-1, keepdims=True), 1.0)
    smallest = lax.top_k(lax.stop_gradient(scores), picks)[0][..., -1:]
    chosen = (lax.stop_gradient(scores) >= smallest).astype(jnp.float32)
    frequency = (chosen * real[..., None]).sum(axis=1) * num_experts / (picks * count)
    share = scores / scores.sum(axis=-1, keepdims=True)
    probability = (share * real[..., None]).sum(axis=1) / count
    rows = jnp.maximum((real.sum(axis=-1) > 0).sum(), 1)
    return (frequency * probability).sum() / rows


class Router(nn.Module):
    """Owns the router's matrix and its selection bias (always float32, moved outside the gradient)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"], picks: Int[Array, "*b k"] | None = None) -> Routing:
        """See `route`."""
        c, moe = self.config, self.config.moe
        if moe is None:
            raise ValueError("a router needs config.moe; this model is dense")
        experts = moe.n_routed_experts
        normal = nn.initializers.normal(c.initializer_range)
        kernel_init = declare(normal, ("embed", "router"), Muon())
        kernel = self.param("kernel", kernel_init, (c.hidden_size, experts), c.param_dtype)
        bias = self.param("bias", declare(nn.initializers.zeros, ("router",), RouterBias()), (experts,), "float32")
        return route(x, kernel, bias, moe, picks)


class Experts(nn.Module):
    """The routed experts' three banks of matrices."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "N D"], experts: Int[Array, "N k"], gates: Float[Array, "N k"]
    ) -> tuple[Float[Array, "N D"], Int[Array, " E"], Int[Array, ""]]:
        """Sum of gate * expert(x) in float32, tokens of each expert, rows computed. Expert number E means nowhere."""
        c = self.config
        num, inner = c.moe.n_routed_experts, c.moe.moe_intermediate_size
        normal = nn.initializers.normal(c.initializer_range)
        into = declare(normal, ("expert", "embed", "expert_mlp"), Muon(batch=1))
        back = declare(normal, ("expert", "expert_mlp", "embed"), Muon(batch=1))
        gate = self.param("gate", into, (num, c.hidden_size, inner), c.param_dtype).astype(c.dtype)
        up = self.param("up", into, (num, c.hidden_size, inner), c.param_dtype).astype(c.dtype)
        down = self.param("down", back, (num, inner, c.hidden_size), c.param_dtype).astype(c.dtype)

        plan = plan_blocks(experts, num)
        rows = dispatch(x.astype(c.dtype), plan)
        rows = grouped_swiglu(rows, gate, up, down, plan)
        computed = (plan.source < experts.size).sum(dtype=jnp.int32)
        return combine(rows, gates, plan), plan.counts, computed


class MoE(nn.Module):
    """Routed experts plus shared experts; the MLP of every layer but the first dense ones."""

    config: ModelConfig

    def setup(self) -> None:
        """Parameters router, experts, shared."""
        moe = self.config.moe
        self.router = Router(self.config)
        self.experts = Experts(self.config)
        if moe.n_shared_experts:
            self.shared = SwiGLU(self.config, moe.moe_intermediate_size * moe.n_shared_experts)

    def __call__(
        self, x: Float[Array, "B S D"], segment_ids: Int[Array, "B S"], picks: Int[Array, "B S k"] | None = None
    ) -> tuple[Float[Array, "B S D"], MoEAux]:
        """Same shape, in the activations' dtype. Padding (segment 0) is routed nowhere. `picks` pins the experts."""
        moe = self.config.moe
        routing = self.router(x, picks)
        real = segment_ids > 0
        chosen = jnp.where(real[..., None], routing.experts, moe.n_routed_experts)
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, routing.gates))
        y, load, computed = self.experts(*flat)
        y = y.reshape(x.shape).astype(self.config.dtype)
        if moe.n_shared_experts:
            y = y + self.shared(x)
        dropped = real.sum(dtype=jnp.int32) * moe.num_experts_per_tok - computed
        loss = balance_loss(routing.scores, segment_ids, moe.num_experts_per_tok)
        return y, MoEAux(load.astype(jnp.float32), loss, dropped)
