"""Which experts a model's routers choose, layer by layer and without a scan, for the tests of routing replay."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.nn.decoder import DecoderLayer
from kimi_jax.nn.kimi import Embedding
from kimi_jax.packed_batch import PackedBatch
from tests.nn.tiny import QUICK


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _choices(config: ModelConfig, params: dict[str, Any], batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
    k, found = config.moe.num_experts_per_tok, []
    x = Embedding(config).apply({"params": params["embed"]}, batch.tokens)
    where = batch.positions, batch.segment_ids
    stacks = [("dense_layers", False)] * config.num_dense_layers + [("moe_layers", True)] * config.num_moe_layers
    for i, (name, routed) in enumerate(stacks):
        at = i - config.num_dense_layers if routed else i
        weights = jax.tree.map(lambda a, at=at: a[at], params[name])
        layer = DecoderLayer(config, routed).bind({"params": weights})
        if routed:
            attended = x + layer.attention(layer.input_norm(x), *where)[0]
            scores = layer.mlp.router(layer.post_attention_norm(attended)).scores + weights["mlp"]["router"]["bias"]
            best, experts = jax.lax.top_k(scores, k + 1)
            found.append((experts[..., :k], jnp.min(best[..., :-1] - best[..., 1:], axis=-1)))
        x = layer(x, *where)[0]
    experts, margins = zip(*found, strict=True)
    return jnp.stack(experts, axis=1), jnp.stack(margins, axis=1)


def router_choices(config: ModelConfig, params: dict[str, Any], batch: PackedBatch, margin: float) -> np.ndarray:
    """int32 [B, L, S, k], the experts that another program chooses too: -1 where two of the k + 1 best scores are
    nearer to each other than `margin`, so that rounding decides."""
    experts, margins = jax.device_get(_choices(config, params, batch))
    return np.where(margins[..., None] > margin, experts, -1).astype(np.int32)
