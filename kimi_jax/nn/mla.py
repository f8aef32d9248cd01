"""Multi-head latent attention, and QK-clip's change of its weights.

Source: docs/released_model.md section 3 (MLA, naive form); docs/paper_notes.md sections 1.5 and 2.4 (QK-clip: what gets
which factor).

B rows   S tokens   D width   H heads   n, r, v: widths of the part without rotary, the rotary part, the values
d = n + r   I width of what the queries' matrix takes   C = kv_lora_rank + r   p = r / 2
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from kimi_jax.config import ModelConfig
from kimi_jax.kernels.attention.mla import AttentionSharding, join_heads, latent_attention
from kimi_jax.kernels.attention.segment import segment_attention
from kimi_jax.nn.layers import RMSNorm, text_linear
from kimi_jax.nn.layout import Layout, ShardingError
from kimi_jax.nn.rope import apply_rope, softmax_scale, text_rotary


class MLA(nn.Module):
    """Low-rank queries (direct if `q_lora_rank` is None); keys and values from one latent; one rotary key."""

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters q_a, q_a_norm, q_b (or q), kv_a, kv_a_norm, kv_b, o."""
        c = self.config
        linear = functools.partial(text_linear, c, "attention", layout=self.layout)
        norm = functools.partial(RMSNorm, c.lora_norm_eps, c.param_dtype, ("language", "attention", "norm"))
        width, heads = {"embed": c.hidden_size}, {"heads": c.num_attention_heads}
        query = {**heads, "head_dim": c.qk_head_dim}
        if c.q_lora_rank is None:
            self.q = linear(width, query)
        else:
            self.q_a = linear(width, {"q_lora": c.q_lora_rank})
            self.q_a_norm = norm()
            self.q_b = linear({"q_lora": c.q_lora_rank}, query)
        self.kv_a = linear(width, {"kv_lora": c.kv_lora_rank + c.qk_rope_head_dim})
        self.kv_a_norm = norm()
        self.kv_b = linear({"kv_lora": c.kv_lora_rank}, {**heads, "head_dim": c.qk_nope_head_dim + c.v_head_dim})
        self.o = linear({**heads, "head_dim": c.v_head_dim}, width)

    def inputs(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S I"], Float[Array, "B S p"], Float[Array, "B S p"], Float[Array, "B S C"]]:
        """What the queries' matrix takes, cos and sin, and the latent: all that a token is as a key.

        The latent is kv_lora_rank normalised numbers, then the rotated key that all heads share.
        """
        c = self.config
        cos, sin = text_rotary(c, positions)
        if c.q_lora_rank is not None:
            query_input = self.q_a_norm(self.q_a(x))
        latent, k_rope = jnp.split(self.kv_a(x), [c.kv_lora_rank], axis=-1)
        k_rope = apply_rope(k_rope[:, :, None], cos, sin)[:, :, 0]
        latent = jnp.concatenate([self.kv_a_norm(latent), k_rope], axis=-1)
        return x if c.q_lora_rank is None else query_input, cos, sin, latent

    def project(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S H n"], Float[Array, "B S H r"], Float[Array, "B S C"]]:
        """Queries without and with rotary, and the latent."""
        query_input, cos, sin, latent = self.inputs(x, positions)
        q = (self.q if self.config.q_lora_rank is None else self.q_b)(query_input)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, apply_rope(q_rope, cos, sin), latent

    def expand(self, latent: Float[Array, "B S C"]) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H v"]]:
        """Keys (part without rotary, then the rotary part) and values of every head."""
        c = self.config
        latent, k_rope = jnp.split(latent, [c.kv_lora_rank], axis=-1)
        return join_heads(self.kv_b(latent), k_rope, c.qk_nope_head_dim)

    def __call__(
        self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], Float[Array, " H"]]:
        """Causal attention inside documents.

        positions: 0.. in each document; segment_ids: 0 padding, 1.. documents.
        Returns the output and each head's largest scaled logit (float32, no gradient).
        """
        c = self.config
        scale = softmax_scale(c)
        if self.layout is None:
            q_nope, q_rope, latent = self.project(x, positions)
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            out, max_logits = segment_attention(q, *self.expand(latent), segment_ids, causal=True, scale=scale)
        else:
            query, kernel = (self.q if c.q_lora_rank is None else self.q_b).matrix(), self.kv_b.matrix()
            sharding = shard_attention(self.layout, x.shape, query.shape, kernel.shape, scale, c.q_lora_rank is None)
            query_input, cos, sin, latent = self.inputs(x, positions)
            args = query_input.astype(c.dtype), query, cos, sin, latent, kernel, segment_ids
            out, max_logits = latent_attention(sharding, *args)
        return self.o(out), max_logits


def shard_attention(
    layout: Layout,
    shape: tuple[int, ...],
    query: tuple[int, ...],
    kernel: tuple[int, ...],
    scale: float,
    direct: bool = False,
) -> AttentionSharding:
    """How x [B, S, .], the queries' matrix [I, H, d] and that of keys and values lie over the mesh, from their shapes.

    Heads that do not divide are whole on every device; direct: I is the model's width.
    Raises ShardingError if the mesh shards rows or their tokens into parts of different size.
    """
    for name, size in zip(("batch", "sequence"), shape[:2], strict=True):
        if size % layout.parts(name):
            raise ShardingError(f"{name} of {size} cannot be sharded into {layout.parts(name)} equal parts by the mesh")
    context = next(iter(layout.axes("sequence")), None)
    tensor = layout.mesh.shape["tensor"]
    heads = "tensor" if tensor > 1 and query[1] % tensor == 0 else None
    specs = (
        layout.spec(("embed" if direct else "q_lora", "heads", "head_dim"), query),
        layout.spec(("kv_lora", "heads", "head_dim"), kernel),
    )
    return AttentionSharding(
        layout.mesh, layout.axes("batch"), context, heads, *specs, scale, layout.exact_above, layout.reduce_dtype
    )


def clip_attention(attention_params: dict[str, Any], gamma: Float[Array, " H"]) -> dict[str, Any]:
    """Multiply head h's logits by gamma[h], exactly (QK-clip, docs/paper_notes.md section 2.4).

    Queries and keys without rotary get sqrt(gamma), rotary queries gamma; the rotary key is shared by all heads and
    stays. `attention_params` is one layer's plain dict, and so is the result; raises KeyError if a weight is missing.
    """
    query = "q_b" if "q_b" in attention_params else "q"
    q, kv = attention_params[query]["kernel"], attention_params["kv_b"]["kernel"]
    v_head_dim = attention_params["o"]["kernel"].shape[-2]
    nope = kv.shape[-1] - v_head_dim
    root = jnp.sqrt(gamma)

    def scaled(kernel: Array, first: Array, rest: Array) -> Array:
        """The first `nope` columns of each head times `first`, the others times `rest`."""
        columns = jnp.arange(kernel.shape[-1]) < nope
        factor = jnp.where(columns, first[:, None], rest[:, None])
        return (kernel.astype(jnp.float32) * factor).astype(kernel.dtype)

    return {
        **attention_params,
        query: {**attention_params[query], "kernel": scaled(q, root, gamma)},
        "kv_b": {**attention_params["kv_b"], "kernel": scaled(kv, root, jnp.ones_like(gamma))},
    }
