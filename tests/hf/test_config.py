"""config.json of every family both ways, and refusal of what would silently change the numbers."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kimi_jax as kimi
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


# ------------------------------------------------------------------------------------- keys that may change the numbers

YARN = K25_TEXT["rope_scaling"]
PARAMETERS = {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn", "rope_theta": 50000.0}
# What transformers writes beside the fields of the model.
DUMP = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": ["X"], "auto_map": {"a": "b"},
    "bad_words_ids": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "do_sample": False,
    "dtype": "bfloat16", "id2label": {"0": "LABEL_0"}, "is_decoder": False, "is_encoder_decoder": False,
    "max_length": 20, "num_beams": 1, "pretraining_tp": 1, "pruned_heads": {}, "temperature": 1.0, "top_k": 50,
    "top_p": 1.0, "transformers_version": "4.56.2", "typical_p": 1.0, "use_cache": True, "rope_interleave": True,
    "head_dim": 64, "qk_head_dim": 192, "layer_types": ["full_attention"] * 61,
    "mlp_layer_types": ["dense"] + ["sparse"] * 60,
    "sliding_window": None, "partial_rotary_factor": 1.0, "attn_logit_softcapping": None, "unheard_of": None,
}  # fmt: skip


def with_text(**changes):
    released = copy.deepcopy(K25)
    released["text_config"].update(changes)
    return released


def test_keys_that_leave_the_numbers_alone_are_accepted():
    assert hf_config.from_released(with_text(**DUMP)) == hf_config.from_released(K25)
    assert hf_config.from_released(K25 | {"vocab_size": 163840}) == hf_config.from_released(K25)
    with pytest.raises(ConfigError, match="vocab_size = 5"):
        hf_config.from_released(K25 | {"vocab_size": 5})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": PARAMETERS},
        {"rope_parameters": PARAMETERS, "rope_theta": None},
        {"rope_parameters": PARAMETERS, "rope_scaling": YARN},
        {"rope_scaling": PARAMETERS, "rope_theta": None},
        {"rope_scaling": YARN | {"rope_type": "yarn", "truncate": True, "attention_factor": 1.0}},
        {"rope_parameters": PARAMETERS | {"partial_rotary_factor": 1.0, "truncate": None}},
    ],
)
def test_rope_has_one_meaning_in_every_spelling(rope):
    assert hf_config.from_released(with_text(**{"rope_scaling": None} | rope)) == hf_config.from_released(K25)


@pytest.mark.parametrize("spelling", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
                                      {"rope_parameters": {"rope_theta": 5.0}}])  # fmt: skip
def test_default_rope_parameters_are_plain_rotary(spelling):
    config = hf_config.from_released(with_text(rope_scaling=None, rope_theta=None, **spelling))
    assert (config.rope_theta, config.rope_scaling) == (5.0, None)


def test_rope_parameters_give_the_same_logits(tmp_path):
    """The published fixture in both spellings, to the bit."""
    released = json.loads((FIXTURES / "tiny_fp32/config.json").read_text())
    text = released["text_config"]
    yarn = text.pop("rope_scaling")
    yarn.pop("type")
    text["rope_parameters"] = yarn | {"rope_type": "yarn", "rope_theta": text.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(released))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "tiny_fp32/model.safetensors").read_bytes())
    ids = np.random.default_rng(0).integers(10, 500, (1, 40))
    np.testing.assert_array_equal(kimi.load(tmp_path).logits(ids), kimi.load(FIXTURES / "tiny_fp32").logits(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": PARAMETERS | {"factor": 32.0}}, "rope_scaling and rope_parameters contradict"),
        ({"rope_parameters": PARAMETERS | {"rope_theta": 1e4}}, "rope_theta.*contradict"),
        ({"rope_parameters": {"rope_theta": 50000.0}}, "contradict"),
        ({"rope_parameters": {"full_attention": PARAMETERS}}, "full_attention"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"rope_scaling": YARN | {"rope_theta": 1e4}}, "rope_theta"),
        ({"rope_scaling": YARN | {"attention_factor": 1.4}}, "attention_factor = 1.4"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate = False"),
        ({"rope_scaling": YARN | {"rope_type": "linear"}}, "rope_type = 'linear' contradicts type = 'yarn'"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": YARN | {"factor": "64"}}, "factor must be a number.*'64'"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor must be a number from 1"),
        ({"rope_scaling": {"factor": 4.0}}, "of type null"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor = 4.0"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, "llama3"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"head_dim": 128}, "head_dim = 128"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["sliding_attention"] * 61}, "layer_types"),
        ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types"),
        ({"index_topk": 2048}, "index_topk = 2048"),
        ({"index_n_heads": 64}, "index_n_heads = 64"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"norm_type": "layernorm"}, "norm_type"),
        ({"residual_multiplier": 2.0}, "residual_multiplier"),
        ({"swiglu_limit": 7.0}, "swiglu_limit"),
        ({"model_type": "kimi_linear"}, "kimi_linear"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"hidden_size": "7168"}, "hidden_size must be a whole number.*'7168'"),
        ({"hidden_size": True}, "hidden_size must be a whole number.*True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 61.0}, "num_hidden_layers must be a whole number"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps must be a number"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim = 63 must be even"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok = 385"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": [[1]]}, "eos_token_id"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"quantization_config": []}, "quantization_config must be an object"),
    ],
)  # fmt: skip
def test_text_setting_that_changes_the_numbers_is_refused_by_name(changes, message):
    released = with_text(**changes)
    if "dtype" in changes:  # the one at the top goes first
        del released["dtype"]
    with pytest.raises(ConfigError, match=message):
        hf_config.from_released(released)
        hf_config.quantization(released)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rope_2d": True}, "use_rope_2d"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06"),
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"vt_hidden_size": 1150}, "1150"),
        ({"vt_num_hidden_layers": None}, "lacks: vt_num_hidden_layers"),
        ({"projector_ln_eps": "1e-5"}, "projector_ln_eps must be a number"),
        ({"patch_size": [14, 14]}, "patch_size must be a whole number"),
    ],
)
def test_vision_setting_that_changes_the_numbers_is_refused_by_name(changes, message):
    released = copy.deepcopy(K25)
    released["vision_config"].update(changes)
    with pytest.raises(ConfigError, match=f"vision_config.*{message}"):
        hf_config.from_released(released)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse"}}, "sparsity_config"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"quantization_status": "frozen"}, "quantization_status"),
        ({"config_groups": None}, "one group_size"),
        ({"config_groups": {"g": 1}}, "must be an object"),
        ({"config_groups": {"g": {"weights": {"group_size": 12}}}}, "multiple of 8"),
        ({"config_groups": {"g": {"weights": {"group_size": None}}}}, "multiple of 8"),
        ({"config_groups": {"g": {"weights": {"group_size": 32, "zp_dtype": "int8"}}}}, "zp_dtype"),
        ({"config_groups": {"g": {"weights": {"group_size": 32, "actorder": "group"}}}}, "actorder = 'group'"),
        ({"config_groups": {"g": {"weights": {"group_size": 32, "actorder": True}}}}, "weights: .*actorder = True"),
        ({"config_groups": {"g": {"weights": {"group_size": 32}, "input_activations": {"num_bits": 8}}}}, "input_act"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)  # fmt: skip
def test_quantization_that_cannot_be_followed_is_refused_by_name(changes, message):
    released = with_text(quantization_config=hf_config.int4_section() | changes)
    with pytest.raises(ConfigError, match=message):
        hf_config.quantization(released)


def test_int4_without_an_order_of_activations_is_read_in_both_spellings():
    """compressed-tensors takes `actorder: false` for null: columns are grouped as they lie."""
    for spelling in (None, False):
        section = hf_config.int4_section()
        section["config_groups"]["group_0"]["weights"]["actorder"] = spelling
        assert hf_config.quantization(with_text(quantization_config=section)).group_size == 32
