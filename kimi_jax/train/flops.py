"""Model FLOPs of a batch in closed form, for MFU.

Convention (model FLOPs, PaLM, arXiv:2204.02311, appendix B): a multiply and an add are two; forward + backward is three
times forward; the causal half of attention only, over the documents as they really are; no recomputation; the embedding
look-up costs nothing, the output head counts. MLA attention has queries and keys of 192 and values of 128. Padding is
not work.

D hidden, F dense MLP width, Fe expert width, H heads, V vocabulary; Dv, Fv vision widths; C values of a patch
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.packed_batch import PackedBatch

COUNTS = ("tokens", "token_pairs", "patches", "patch_pairs", "features")


def batch_counts(batch: PackedBatch) -> dict[str, Any]:
    """What a packed batch holds, as float32 scalars. Pure array arithmetic, so it also runs inside the step.

    tokens: real tokens; token_pairs: (query, key) pairs of causal attention, n(n+1)/2 a document of n tokens;
    patches: real patches; patch_pairs: n^2 an image or chunk of n patches; features: vision features placed in rows.
    """
    real = batch.segment_ids > 0
    out = {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        # the token at position p of its document sees p + 1 keys
        "token_pairs": jnp.sum(jnp.where(real, batch.positions + 1, 0).astype(jnp.float32)),
        "patches": jnp.zeros((), jnp.float32),
        "patch_pairs": jnp.zeros((), jnp.float32),
        "features": jnp.sum(batch.feature_index >= 0, dtype=jnp.float32),
    }
    for bins in batch.vision:
        real = bins.segment_ids > 0
        patches_of_item = jnp.prod(bins.grids, axis=-1)
        out["patches"] += jnp.sum(real, dtype=jnp.float32)
        out["patch_pairs"] += jnp.sum(jnp.where(real, patches_of_item, 0).astype(jnp.float32))
    return out


def text_matmul_params(model: ModelConfig) -> int:
    """Weights that one token is multiplied with: attention, dense MLP or router and active experts, output head."""
    attention = _attention_params(model) * model.num_hidden_layers
    dense = 3 * model.hidden_size * model.intermediate_size * model.num_dense_layers
    sparse = 0
    if model.moe:
        active = model.moe.num_experts_per_tok + model.moe.n_shared_experts
        one = model.hidden_size * model.moe.n_routed_experts
        one += 3 * model.hidden_size * model.moe.moe_intermediate_size * active
        sparse = one * model.num_moe_layers
    return attention + dense + sparse + model.hidden_size * model.vocab_size


def _attention_params(model: ModelConfig) -> int:
    queries = model.num_attention_heads * model.qk_head_dim
    if model.q_lora_rank is None:
        q = model.hidden_size * queries
    else:
        q = (model.hidden_size + queries) * model.q_lora_rank
    kv_a = model.hidden_size * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_b = model.kv_lora_rank * model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
    return q + kv_a + kv_b + model.num_attention_heads * model.v_head_dim * model.hidden_size


def vision_matmul_params(model: ModelConfig) -> int:
    """Weights that one patch is multiplied with; 0 for a text-only model."""
    v = model.vision
    if v is None:
        return 0
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    return 3 * v.patch_size**2 * v.hidden_size + v.num_hidden_layers * block


def projector_matmul_params(model: ModelConfig) -> int:
    """Weights that one merged feature is multiplied with; 0 for a text-only model."""
    v = model.vision
    if v is None:
        return 0
    merged = v.hidden_size * math.prod(v.merge_kernel_size)
    return merged * merged + merged * model.hidden_size


def train_flops(model: ModelConfig, counts: dict[str, Any]) -> float:
    """Floating-point operations of one training step (forward and backward) over a batch with these counts."""
    return 3.0 * forward_flops(model, counts)


def forward_flops(model: ModelConfig, counts: dict[str, Any]) -> float:
    """The same of the forward pass alone."""
    pair = model.num_hidden_layers * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    multiplies = counts["tokens"] * text_matmul_params(model) + counts["token_pairs"] * pair
    if model.vision is not None:
        pair = model.vision.num_hidden_layers * 2 * model.vision.hidden_size
        multiplies += counts["patches"] * vision_matmul_params(model) + counts["patch_pairs"] * pair
        multiplies += counts["features"] * projector_matmul_params(model)
    return 2.0 * float(multiplies)
