"""Tiny configurations of every released family, random weights for them, and comparison of trees."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kimi_jax.config import ModelConfig, MoEConfig, VisionConfig, YarnConfig
from kimi_jax.hf.files import DTYPES
from kimi_jax.hf.names import leaf_shapes
from kimi_jax.hf.stream import BIAS, set_leaf

VISUAL = ("kimi_k25", "kimi_vl")


def _settings(**values: Any) -> dict[str, Any]:
    return values


def config(model_type: str = "kimi_k25", **changes: Any) -> ModelConfig:
    """A tiny model of the family; Moonlight and Kimi-VL have neither q_lora nor YaRN, as released."""
    old = model_type in ("deepseek_v3", "kimi_vl")
    values = _settings(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        q_lora_rank=None if old else 12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        rope_scaling=None if old else YarnConfig(factor=4.0, original_max_position_embeddings=32),
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        moe=MoEConfig(n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1 + old),
        vision=None, dtype="float32", param_dtype="float32",
    )  # fmt: skip
    if model_type in VISUAL:
        values["vision"] = VisionConfig(
            patch_size=2, hidden_size=8, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2,
            init_pos_emb_height=3, init_pos_emb_width=4,
        )  # fmt: skip
        values["media_placeholder_token_id"] = 5
    return ModelConfig(**{**values, **changes})


@st.composite
def configs(draw: st.DrawFn, model_type: str, int4: bool = False) -> ModelConfig:
    """A random small model that the family can express; int4: with experts that can be packed."""
    small = st.integers(1, 4)
    routed = st.builds(
        MoEConfig, n_routed_experts=st.integers(2, 4), num_experts_per_tok=st.integers(1, 2),
        n_shared_experts=st.integers(0, 2), moe_intermediate_size=st.sampled_from((32, 64) if int4 else (3, 8)),
        first_k_dense_replace=st.integers(0, 1 if int4 else 2), norm_topk_prob=st.booleans(),
        routed_scaling_factor=st.sampled_from((1.0, 2.446)),
    )  # fmt: skip
    moe = draw(routed if int4 else st.one_of(st.none(), routed))
    yarn = st.builds(
        YarnConfig, factor=st.sampled_from((2.0, 64.0)), original_max_position_embeddings=st.sampled_from((16, 4096)),
        beta_fast=st.sampled_from((1.0, 32.0)), mscale_all_dim=st.sampled_from((0.0, 1.0)),
    )  # fmt: skip
    heads = draw(small)
    changes = _settings(
        vocab_size=draw(st.integers(8, 20)), hidden_size=draw(st.sampled_from((32, 96)) if int4 else st.integers(1, 9)),
        num_attention_heads=heads, num_hidden_layers=draw(st.integers(2, 4)), intermediate_size=draw(st.integers(1, 9)),
        q_lora_rank=draw(st.one_of(st.none(), small)), kv_lora_rank=draw(small), v_head_dim=draw(small),
        qk_nope_head_dim=draw(small), qk_rope_head_dim=2 * draw(small), moe=moe,
        rope_scaling=draw(st.one_of(st.none(), yarn)), rope_theta=draw(st.sampled_from((10000.0, 800000.0))),
        rms_norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
    )  # fmt: skip
    if model_type in VISUAL:
        heads = draw(st.integers(1, 3))
        changes["vision"] = VisionConfig(
            patch_size=draw(st.sampled_from((1, 2))), hidden_size=4 * heads, num_attention_heads=heads,
            intermediate_size=draw(small), num_hidden_layers=draw(st.integers(1, 3)),
            init_pos_emb_height=draw(small), init_pos_emb_width=draw(small),
        )  # fmt: skip
    return config(model_type, **changes)


def params(model: ModelConfig, dtype: str = "BF16", seed: int = 0) -> dict[str, Any]:
    """Random weights, router biases float32."""
    rng, tree = np.random.default_rng(seed), {}
    for leaf, shape in leaf_shapes(model).items():
        kind = np.dtype(np.float32) if leaf == BIAS else DTYPES[dtype]
        set_leaf(tree, leaf, rng.standard_normal(shape, np.float32).astype(kind))
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Leaves by their path."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: np.asarray(value)}
    return out


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Same leaves, dtypes and bytes."""
    got, want = flat(got), flat(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert got[path].dtype == array.dtype, path
        assert got[path].shape == array.shape, path
        assert got[path].tobytes() == array.tobytes(), path
