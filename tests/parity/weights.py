"""Released parameter names to our tree, for the tiny fixture checkpoint. A test helper; conversion is another room.

torch linears are [out, in]; ours are [*inputs, *outputs].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_jax.config import ModelConfig, MoEConfig, VisionConfig, YarnConfig

TEXT = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]
EXPERTS = [
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
]


def model_config(released: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a released config.json, float32."""
    text, vision = released["text_config"], released["vision_config"]
    yarn = {k: v for k, v in text["rope_scaling"].items() if k != "type"}
    return ModelConfig(
        **{k: text[k] for k in TEXT},
        rope_scaling=YarnConfig(**yarn),
        moe=MoEConfig(**{k: text[k] for k in EXPERTS}),
        vision=VisionConfig(
            patch_size=vision["patch_size"],
            hidden_size=vision["vt_hidden_size"],
            intermediate_size=vision["vt_intermediate_size"],
            num_hidden_layers=vision["vt_num_hidden_layers"],
            num_attention_heads=vision["vt_num_attention_heads"],
            init_pos_emb_height=vision["init_pos_emb_height"],
            init_pos_emb_width=vision["init_pos_emb_width"],
            init_pos_emb_time=vision["init_pos_emb_time"],
        ),
        media_placeholder_token_id=released["media_placeholder_token_id"],
        dtype="float32",
    )


def _stack(trees: list[dict]) -> dict:
    first = trees[0]
    if isinstance(first, dict):
        return {k: _stack([t[k] for t in trees]) for k in first}
    return np.stack(trees)


def to_params(weights: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Our plain tree. Every released tensor is used exactly once (checked)."""
    left = dict(weights)

    def kernel(name: str, *shape: int) -> np.ndarray:
        matrix = left.pop(name + ".weight").T
        return matrix.reshape(shape) if shape else matrix

    def biased(name: str) -> dict:
        return {"kernel": kernel(name), "bias": left.pop(name + ".bias")}

    def scale(name: str) -> dict:
        return {"scale": left.pop(name + ".weight")}

    def norm(name: str) -> dict:
        return {**scale(name), "bias": left.pop(name + ".bias")}

    def mlp(name: str) -> dict:
        return {part: {"kernel": kernel(f"{name}.{part}_proj")} for part in ("gate", "up", "down")}

    def attention(name: str) -> dict:
        heads = config.num_attention_heads
        return {
            "q_a": {"kernel": kernel(name + ".q_a_proj")},
            "q_a_norm": scale(name + ".q_a_layernorm"),
            "q_b": {"kernel": kernel(name + ".q_b_proj", config.q_lora_rank, heads, config.qk_head_dim)},
            "kv_a": {"kernel": kernel(name + ".kv_a_proj_with_mqa")},
            "kv_a_norm": scale(name + ".kv_a_layernorm"),
            "kv_b": {"kernel": kernel(name + ".kv_b_proj", config.kv_lora_rank, heads, -1)},
            "o": {"kernel": kernel(name + ".o_proj", heads, config.v_head_dim, config.hidden_size)},
        }

    def layer(number: int) -> dict:
        name = f"language_model.model.layers.{number}"
        if number < config.num_dense_layers:
            inside = mlp(name + ".mlp")
        else:
            banks = [mlp(f"{name}.mlp.experts.{e}") for e in range(config.moe.n_routed_experts)]
            bias = left.pop(name + ".mlp.gate.e_score_correction_bias")
            inside = {
                "router": {"kernel": kernel(name + ".mlp.gate"), "bias": bias},
                "experts": {p: np.stack([b[p]["kernel"] for b in banks]) for p in ("gate", "up", "down")},
                "shared": mlp(name + ".mlp.shared_experts"),
            }
        return {
            "input_norm": scale(name + ".input_layernorm"),
            "attention": attention(name + ".self_attn"),
            "post_attention_norm": scale(name + ".post_attention_layernorm"),
            "mlp": inside,
        }

    def block(number: int) -> dict:
        name, v = f"vision_tower.encoder.blocks.{number}", config.vision
        heads = (v.num_attention_heads, v.hidden_size // v.num_attention_heads)
        return {
            "norm0": norm(name + ".norm0"),
            "qkv": {
                "kernel": kernel(name + ".wqkv", v.hidden_size, 3, *heads),
                "bias": left.pop(name + ".wqkv.bias").reshape(3, *heads),
            },
            "o": {"kernel": kernel(name + ".wo", *heads, v.hidden_size), "bias": left.pop(name + ".wo.bias")},
            "norm1": norm(name + ".norm1"),
            "fc0": biased(name + ".mlp.fc0"),
            "fc1": biased(name + ".mlp.fc1"),
        }

    layers = [layer(i) for i in range(config.num_hidden_layers)]
    embed = "vision_tower.patch_embed"
    patch = left.pop(embed + ".proj.weight")
    params = {
        "embed": {"embedding": left.pop("language_model.model.embed_tokens.weight")},
        "dense_layers": _stack(layers[: config.num_dense_layers]),
        "moe_layers": _stack(layers[config.num_dense_layers :]),
        "final_norm": scale("language_model.model.norm"),
        "lm_head": {"kernel": kernel("language_model.lm_head")},
        "vision": {
            "patch_embed": {
                "kernel": patch.reshape(patch.shape[0], -1).T,
                "bias": left.pop(embed + ".proj.bias"),
            },
            "pos_emb": {"table": left.pop(embed + ".pos_emb.weight")},
            "blocks": _stack([block(i) for i in range(config.vision.num_hidden_layers)]),
            "final_norm": norm("vision_tower.encoder.final_layernorm"),
        },
        "projector": {
            "pre_norm": norm("mm_projector.pre_norm"),
            "fc0": biased("mm_projector.proj.0"),
            "fc1": biased("mm_projector.proj.2"),
        },
    }
    if left:
        raise ValueError(f"released tensors without a place: {sorted(left)}")
    return params
