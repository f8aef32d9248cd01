"""A tiny text model (a dense layer, then layers with experts) and a batch, for QK-clip and the router bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import ModelConfig, MoEConfig
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import metadata, unbox
from kimi_jax.packed_batch import PackedBatch

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=16,
    kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, rope_scaling=None, vision=None,
    moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.0),
    media_placeholder_token_id=3, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
)  # fmt: skip


def build(config: ModelConfig, std: float = 0.1):
    """(plain parameters, infos). Filled by NumPy from the shapes alone: nothing to compile."""
    boxed = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fixed = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
        values = rng.normal(0.0, std, leaf.shape) if fixed is None else np.full(leaf.shape, fixed)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, unbox(boxed)), metadata(boxed)


def text_batch(rows: int, length: int, vocab: int, seed: int = 0) -> PackedBatch:
    """Random tokens, one document a row."""
    tokens = np.random.default_rng(seed).integers(4, vocab, (rows, length)).astype(np.int32)
    return PackedBatch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(np.roll(tokens, -1, axis=1)),
        loss_weights=jnp.ones((rows, length), jnp.float32).at[:, -1].set(0.0),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        modality=jnp.zeros((rows, length), jnp.int32),
        feature_index=jnp.full((rows, length), -1, jnp.int32),
        rows_per_pack=rows,
    )


def max_logits(config: ModelConfig, params, batch):
    """[L,H] of one forward pass."""
    _, aux = KimiK25(config).apply({"params": params}, batch, method="hidden")
    return aux.max_logits
