"""config.json of every family both ways, and refusal of what would silently change the numbers."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, preset
from kimi_jax.hf import config as hf_config
from kimi_jax.hf.names import FAMILIES
from tests.environment import FIXTURES
from tests.hf import tiny

# docs/released_model.md sections 1.1 and 1.3, typed in from there
K25_TEXT = {
    "model_type": "kimi_k2", "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840,
    "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-05, "rope_theta": 50000.0,
    "max_position_embeddings": 262144, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "num_nextn_predict_layers": 0, "tie_word_embeddings": False,
    "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839, "initializer_range": 0.02,
    "rope_scaling": {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                     "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
K25_VISION = {
    "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed", "vt_hidden_size": 1152, "vt_num_hidden_layers": 27, "vt_num_attention_heads": 16,
    "vt_intermediate_size": 4304, "merge_kernel_size": [2, 2], "video_attn_type": "spatial_temporal",
    "merge_type": "sd2_tpool", "mm_projector_type": "patchmerger", "mm_hidden_size": 1152,
    "projector_hidden_act": "gelu", "projector_ln_eps": 1e-05, "text_hidden_size": 7168,
}  # fmt: skip
K25 = {
    "model_type": "kimi_k25", "dtype": "bfloat16", "media_placeholder_token_id": 163605, "tie_word_embeddings": False,
    "text_config": K25_TEXT, "vision_config": K25_VISION,
}  # fmt: skip


def moonlight() -> dict:
    out = K25_TEXT | {
        "model_type": "deepseek_v3", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "q_lora_rank": None, "routed_scaling_factor": 2.446,
        "rope_scaling": None, "max_position_embeddings": 8192, "eos_token_id": 163586, "torch_dtype": "bfloat16",
    }  # fmt: skip
    del out["pad_token_id"]
    return out


def kimi_vl() -> dict:
    vision = {
        "model_type": "moonvit", "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 27,
        "hidden_size": 1152, "intermediate_size": 4304, "merge_kernel_size": [2, 2], "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
    }  # fmt: skip
    text = moonlight() | {"rope_theta": 800000.0, "max_position_embeddings": 131072}
    return {
        "model_type": "kimi_vl", "media_placeholder_token_id": 163605, "torch_dtype": "bfloat16", "text_config": text,
        "vision_config": vision,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("released", "name"), [(K25, "kimi_k2_5"), (moonlight(), "moonlight_16b_a3b"), (kimi_vl(), "kimi_vl_a3b")]
)
def test_released_files_are_the_presets(released, name):
    ours = hf_config.from_released(released)
    assert dataclasses.replace(ours, param_dtype="float32") == preset(name)


def test_k2_instruct():
    """Text only, FP8, its own YaRN and eps (docs/released_model.md section 1.3)."""
    yarn = K25_TEXT["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0}
    released = K25_TEXT | {"rms_norm_eps": 1e-6, "rope_scaling": yarn, "max_position_embeddings": 131072}
    released["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    ours = hf_config.from_released(released)
    assert ours.vision is None
    assert (ours.rms_norm_eps, ours.lora_norm_eps, ours.rope_scaling.factor) == (1e-6, 1e-6, 32.0)
    assert hf_config.quantization(released) == hf_config.Quantization("fp8")


def test_fixture_says_int4_and_ours_says_the_same():
    released = json.loads((FIXTURES / "tiny_int4/config.json").read_text())
    assert hf_config.quantization(released) == hf_config.Quantization("int4", 32)
    plain = hf_config.with_quantization(released, None)
    assert hf_config.quantization(plain) is None
    again = hf_config.with_quantization(plain, hf_config.int4_section())
    theirs = released["text_config"]["quantization_config"]
    section = again["text_config"]["quantization_config"]
    assert {**section, "ignore": section["ignore"][:4]} == theirs


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_any_model_comes_back(model_type, data):
    model = data.draw(tiny.configs(model_type))
    released = json.loads(json.dumps(hf_config.to_released(model, model_type, "float32")))
    if model_type not in tiny.VISUAL:
        assert "text_config" not in released
    assert hf_config.from_released(released) == model


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("", {"model_type": "kimi_k26x"}, "kimi_k26x.*did you mean 'kimi_k2'.*kimi_vl"),
        ("", {"model_type": None}, "no model_type"),
        ("", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("text_config", {"n_group": 8}, "n_group = 8"),
        ("text_config", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("text_config", {"topk_method": "greedy"}, "greedy"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_config", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"num_key_value_heads": 8}, "num_key_value_heads = 8"),
        ("text_config", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("text_config", {"hidden_size": None, "v_head_dim": None}, "lacks: hidden_size.*v_head_dim"),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ("text_config", {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ("vision_config", {"merge_kernel_size": [4, 4]}, "merge_kernel_size"),
        ("vision_config", {"text_hidden_size": 1}, "text_hidden_size = 1"),
        ("vision_config", {"pos_emb_type": "learned"}, "learned"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(where, change, message):
    released = copy.deepcopy(K25)
    (released[where] if where else released).update(change)
    with pytest.raises(ConfigError, match=message):
        hf_config.from_released(released)
        hf_config.quantization(released)


def test_what_the_released_format_cannot_say_is_refused():
    with pytest.raises(ConfigError, match="lora_norm_eps"):
        hf_config.to_released(tiny.config(lora_norm_eps=1e-5), "kimi_k25")
    with pytest.raises(ConfigError, match="without a vision tower"):
        hf_config.to_released(tiny.config("kimi_k2"), "kimi_k25")


def test_silent_yarn_has_the_released_defaults():
    """mscale_all_dim 0 means that the softmax scale is left alone."""
    released = copy.deepcopy(K25)
    released["text_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 2}
    assert hf_config.from_released(released).rope_scaling.mscale_all_dim == 0.0
