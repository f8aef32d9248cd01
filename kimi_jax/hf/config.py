"""The released config.json and ModelConfig.

Source: the released files of Kimi K2.5 (arXiv:2602.02276) and its relatives (`vt_*` and `mm_*` vision names). Every key
is read, known to be harmless (`config_keys`), or refused by name: settings that would change the numbers and that this
model does not have are never ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kimi_jax.config import ConfigError, ModelConfig, MoEConfig, VisionConfig, nearest
from kimi_jax.hf import rope
from kimi_jax.hf.config_keys import (
    COUNT,
    HARMLESS,
    NOT_NEGATIVE,
    OFF,
    POSITIVE,
    SIZE,
    TEXT_OFF,
    TOP,
    VISION_OFF,
    Number,
    check_fixed,
    check_known,
    flag,
    number,
    section,
)
from kimi_jax.hf.names import FAMILIES, family
from kimi_jax.untrusted import describe

TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "rope_theta",
    "max_position_embeddings",
)  # fmt: skip
MOE_FIELDS = (
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
# ours -> released; Kimi-VL (a plain MoonViT) has our names
VISION_FIELDS = {
    "patch_size": "patch_size",
    "init_pos_emb_height": "init_pos_emb_height",
    "init_pos_emb_width": "init_pos_emb_width",
    "init_pos_emb_time": "init_pos_emb_time",
    "hidden_size": "vt_hidden_size",
    "num_hidden_layers": "vt_num_hidden_layers",
    "num_attention_heads": "vt_num_attention_heads",
    "intermediate_size": "vt_intermediate_size",
    "projector_ln_eps": "projector_ln_eps",
}
# What the code does whatever the file says, so the file has to say it (or nothing).
FIXED_TEXT = {
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
FIXED_MOE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "moe_layer_freq": 1}
FIXED_VISION = {
    "pos_emb_type": "divided_fixed", "video_attn_type": "spatial_temporal", "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger", "projector_hidden_act": "gelu", "merge_kernel_size": [2, 2],
}  # fmt: skip
INT4_KEYS = frozenset(("quant_method", "format", "config_groups", "ignore", "version", "global_compression_ratio"))
INT4_FIXED = {"quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}}
FP8_KEYS = frozenset((
    "quant_method", "weight_block_size", "activation_scheme", "modules_to_not_convert", "ignored_layers",
))  # fmt: skip
TEXT_TYPES, FULL = ("kimi_k2", "deepseek_v3"), "full_attention"
DTYPES = ("float32", "bfloat16", "float16")
# Constants of the released code that no file names (docs/released_model.md sections 2 and 3).
UNNAMED = {"lora_norm_eps": 1e-6}
UNNAMED_VISION = {"rope_theta": 10000.0, "layer_norm_eps": 1e-5, "merge_kernel_size": (2, 2)}
PAD_OF_RELEASED_VOCABULARY = (163840, 163839)  # vocabulary size, id of [PAD]


@dataclass(frozen=True)
class Quantization:
    """How the checkpoint holds some of its matrices: "int4" in groups along the input, or "fp8" in blocks."""

    method: str
    group_size: int = 32
    block: tuple[int, int] = (128, 128)


def from_released(released: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed config.json; activations in the dtype that the file names.

    Raises ConfigError for an unknown model_type, missing fields, or settings that this model cannot follow.
    """
    names = family(_model_type(released))
    text = section(released, "text_config", "config.json") if names.projector else released
    if text is None:
        raise ConfigError("config.json has no text_config")
    where = "config.json: text_config" if names.projector else "config.json"
    _check_text_keys(text, where)
    if names.projector:  # some relatives repeat two sizes at the top
        repeated = {key: text.get(key) for key in ("vocab_size", "hidden_size")}
        check_known(released, HARMLESS | OFF.keys() | TOP | repeated.keys(), "config.json")
        check_fixed(released, OFF | repeated, "config.json")
    theta, yarn = rope.read(text, where)
    fields = _take(text, TEXT_FIELDS, where, optional=("q_lora_rank", "rope_theta"))
    eps = number(text, "rms_norm_eps", POSITIVE, where)
    fields = {key: number(fields, key, SIZE, where) for key in TEXT_FIELDS if key not in ("rms_norm_eps", "rope_theta")}
    if fields["qk_rope_head_dim"] % 2:
        raise ConfigError(f"{where}: qk_rope_head_dim = {fields['qk_rope_head_dim']} must be even: rotary turns pairs")
    fields |= {"rms_norm_eps": eps, "rope_theta": theta}
    _check_heads(text, fields, where)
    dtype = _dtype(released)
    vocab = fields["vocab_size"]
    eos = _token(text, released, "eos_token_id", 163585)
    pad = PAD_OF_RELEASED_VOCABULARY[1] if vocab == PAD_OF_RELEASED_VOCABULARY[0] else eos
    return ModelConfig(
        **fields,
        rope_scaling=yarn,
        moe=_moe(text, fields["num_hidden_layers"], where),
        vision=_vision(released, fields["hidden_size"]) if names.projector else None,
        media_placeholder_token_id=_token(released, text, "media_placeholder_token_id", 163605),
        bos_token_id=_token(text, released, "bos_token_id", 163584),
        eos_token_id=eos,
        pad_token_id=_token(text, released, "pad_token_id", pad),
        initializer_range=number(text, "initializer_range", NOT_NEGATIVE, where, 0.02),
        dtype=dtype,
        param_dtype=dtype,
    )


def to_released(config: ModelConfig, model_type: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json for this model in the released field names.

    dtype: of the tensors. Raises ConfigError if the released format cannot say what the model is.
    """
    names = family(model_type)
    _check_unnamed(config, UNNAMED, "model")
    text: dict[str, Any] = {key: getattr(config, key) for key in TEXT_FIELDS}
    text |= FIXED_TEXT | {"num_key_value_heads": config.num_attention_heads}
    text["initializer_range"] = config.initializer_range
    yarn = config.rope_scaling
    text["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(yarn)} if yarn else None
    if config.moe:
        text |= {key: getattr(config.moe, key) for key in MOE_FIELDS} | FIXED_MOE
    else:
        text["n_routed_experts"] = None
    tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common = {"model_type": model_type, "dtype": dtype, "tie_word_embeddings": False, **tokens}
    if not names.projector:
        return {"architectures": ["DeepseekV3ForCausalLM"], **text, **common}
    inner = "kimi_k2" if model_type == "kimi_k25" else "deepseek_v3"
    architecture = "KimiK25ForConditionalGeneration" if model_type == "kimi_k25" else "KimiVLForConditionalGeneration"
    return {
        "architectures": [architecture],
        **common,
        "ignore_index": -100,
        "media_placeholder_token_id": config.media_placeholder_token_id,
        "text_config": {"architectures": ["DeepseekV3ForCausalLM"], **text, **tokens, "model_type": inner},
        "vision_config": _released_vision(config, model_type),
    }


def quantization(released: dict[str, Any]) -> Quantization | None:
    """How the tensors are quantised, None for a plain checkpoint. Raises ConfigError for another format."""
    text = section(released, "text_config", "config.json") or {}
    given = [section(part, "quantization_config", "config.json") for part in (released, text)]
    present = [found for found in given if found]
    if not present:
        return None
    found, where = present[0], "quantization_config"
    if found != present[-1]:
        raise ConfigError("config.json has two quantization_configs that differ, at the top and in text_config")
    method = found.get("quant_method")
    if method == "fp8":
        return _fp8(found, where)
    if method != "compressed-tensors" or found.get("format") != "pack-quantized":
        raise ConfigError(
            f"quantization {describe(method)} in format {describe(found.get('format'))} is not supported; "
            "there are: compressed-tensors pack-quantized (INT4), fp8 with weight_block_size"
        )
    check_known(found, INT4_KEYS | INT4_FIXED.keys(), where)
    check_fixed(found, INT4_FIXED, where)
    groups = section(found, "config_groups", where) or {}
    sizes = [_int4_group(groups, name) for name in groups]
    if not sizes or len(set(sizes)) > 1 or not sizes[0] or sizes[0] % 8:
        raise ConfigError(f"{where}: needs one group_size for all, a multiple of 8, not {sizes}")
    return Quantization("int4", group_size=sizes[0])


def _fp8(found: dict[str, Any], where: str) -> Quantization:
    check_known(found, FP8_KEYS | {"fmt"}, where)
    check_fixed(found, {"fmt": "e4m3"}, where)
    block = found.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        raise ConfigError(f"FP8 weights need weight_block_size [rows, columns], not {describe(block)}")
    rows, columns = (number({"weight_block_size": side}, "weight_block_size", SIZE, where) for side in block)
    if rows is None or columns is None:
        raise ConfigError(f"FP8 weights need weight_block_size [rows, columns], not {describe(block)}")
    return Quantization("fp8", block=(rows, columns))


def _int4_group(groups: dict[str, Any], name: str) -> int:
    """The group size of one entry of config_groups."""
    where = f"quantization_config: config_groups.{name}"
    group = section(groups, name, "quantization_config: config_groups") or {}
    check_known(group, {"targets", "weights", "format"}, where)
    check_fixed(group, {"format": "pack-quantized"}, where)
    weights = section(group, "weights", where) or {}
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    wanted |= {"actorder": False}  # false is null; an order of the activations would come with indices of the groups
    check_known(weights, {*wanted, "group_size", "observer", "observer_kwargs"}, f"{where}.weights")
    check_fixed(weights, wanted, f"{where}.weights")
    return number(weights, "group_size", Number(8, 1 << 16, True), where, 0)


def int4_section(group_size: int = 32) -> dict[str, Any]:
    """The released quantization_config of INT4 routed experts, with the vision entries that loaders of transformers
    5 need and the released file lacks (docs/released_model.md section 7)."""
    weights: dict[str, Any] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group_size, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            "re:.*vision_tower.*", "re:.*mm_projector.*", "re:.*multi_modal_projector.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }  # fmt: skip


def with_quantization(released: dict[str, Any], section: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of config.json with this quantization_config where its family keeps it, or without any."""
    out = {key: value for key, value in released.items() if key != "quantization_config"}
    if "text_config" in out:
        inner = {key: value for key, value in out["text_config"].items() if key != "quantization_config"}
        out["text_config"] = inner if section is None else {**inner, "quantization_config": section}
    elif section is not None:
        out["quantization_config"] = section
    return out


# ---------------------------------------------------------------------------------------------------------------- parts


def _model_type(released: dict[str, Any]) -> str:
    model_type = released.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json names no model_type; supported are: {', '.join(FAMILIES)}")
    return model_type[:64]  # no supported one is so long


def _dtype(released: dict[str, Any]) -> str:
    text = section(released, "text_config", "config.json") or {}
    for part in (released, text):
        for key in ("dtype", "torch_dtype"):
            value = part.get(key)
            if value is not None:
                name = value.removeprefix("torch.") if isinstance(value, str) else value
                if name not in DTYPES:
                    raise ConfigError(f"config.json: {key} = {describe(value)} is not one of {', '.join(DTYPES)}")
                return name
    return "bfloat16"


def _token(first: dict[str, Any], second: dict[str, Any], key: str, default: int) -> int:
    """A token id that stands in the text section or at the top; the first of several."""
    for part in (first, second):
        value = part.get(key)
        if isinstance(value, list) and value and all(type(each) is int for each in value):
            value = value[0]
        if value is not None:
            return number({key: value}, key, COUNT, "config.json")
    return default


def _check_text_keys(text: dict[str, Any], where: str) -> None:
    read = {*TEXT_FIELDS, *MOE_FIELDS, *FIXED_TEXT, *FIXED_MOE, *TEXT_OFF, *OFF}
    read |= {"num_key_value_heads", "rope_scaling", "rope_parameters", "quantization_config", "head_dim", "qk_head_dim"}
    check_known(text, HARMLESS | read | {"layer_types", "mlp_layer_types", "use_unified_vision_chunk"}, where)
    check_fixed(text, OFF | TEXT_OFF | FIXED_TEXT, where)
    inner = text.get("model_type")
    if inner is not None and inner not in TEXT_TYPES:
        raise ConfigError(f"{where}: model_type = {describe(inner)} is not one of {', '.join(TEXT_TYPES)}")


def _check_heads(text: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    """Raises ConfigError if what follows from other fields is given and differs."""
    layers, rotary = fields["num_hidden_layers"], fields["qk_rope_head_dim"]
    derived = {
        "num_key_value_heads": fields["num_attention_heads"],
        "head_dim": rotary,
        "qk_head_dim": fields["qk_nope_head_dim"] + rotary,
    }
    check_fixed(text, derived, where)
    kinds = text.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers or {*map(str, kinds)} != {FULL}):
        raise ConfigError(f"{where}: layer_types must be {FULL!r} for every layer, not {describe(kinds)}")
    mlps = text.get("mlp_layer_types")
    dense = text.get("first_k_dense_replace") if text.get("n_routed_experts") is not None else layers
    if mlps is not None and not (
        isinstance(mlps, list) and len(mlps) == layers and isinstance(dense, int)
        and all(kind == ("dense" if i < dense else "sparse") for i, kind in enumerate(mlps))
    ):  # fmt: skip
        raise ConfigError(f"{where}: mlp_layer_types {describe(mlps)} contradicts first_k_dense_replace = {dense}")


def _take(section: dict[str, Any], keys: Any, where: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    missing = [key for key in keys if section.get(key) is None and key not in optional]
    if missing:
        hints = [f"{key}{nearest(key, section)}" for key in missing]
        raise ConfigError(f"{where} lacks: {', '.join(hints)}")
    return {key: section.get(key) for key in keys}


def _check_unnamed(section: Any, wanted: dict[str, Any], where: str) -> None:
    wrong = [f"{k} = {getattr(section, k)!r}" for k, value in wanted.items() if getattr(section, k) != value]
    if wrong:
        raise ConfigError(f"the released format has no field for {where}.{', '.join(wrong)}; it means {wanted}")


def _moe(text: dict[str, Any], layers: int, where: str) -> MoEConfig | None:
    if text.get("n_routed_experts") is None:
        return None
    check_fixed(text, FIXED_MOE, where)
    _take(text, MOE_FIELDS, where, optional=("n_shared_experts",))
    sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    fields = {key: number(text, key, SIZE, where) for key in sizes}
    fields |= {key: number(text, key, COUNT, where, 0) for key in ("n_shared_experts", "first_k_dense_replace")}
    if fields["first_k_dense_replace"] > layers:
        raise ConfigError(f"{where}: first_k_dense_replace = {fields['first_k_dense_replace']} of {layers} layers")
    if fields["num_experts_per_tok"] > fields["n_routed_experts"]:
        experts, chosen = fields["n_routed_experts"], fields["num_experts_per_tok"]
        raise ConfigError(f"{where}: num_experts_per_tok = {chosen} of n_routed_experts = {experts}")
    return MoEConfig(
        **fields,
        norm_topk_prob=flag(text, "norm_topk_prob", where),
        routed_scaling_factor=number(text, "routed_scaling_factor", POSITIVE, where),
    )


def _vision(released: dict[str, Any], width: int) -> VisionConfig:
    where = "config.json: vision_config"
    found = section(released, "vision_config", "config.json")
    if found is None:
        raise ConfigError("config.json has no vision_config")
    plain = found.get("model_type") == "moonvit" or "vt_hidden_size" not in found  # Kimi-VL
    keys = {ours: ours if plain else theirs for ours, theirs in VISION_FIELDS.items()}
    known = {*keys.values(), *FIXED_VISION, *VISION_OFF, "text_hidden_size", "mm_hidden_size"}
    check_known(found, HARMLESS | OFF.keys() | known, where)
    _take(found, keys.values(), where, optional=("init_pos_emb_time", "projector_ln_eps"))
    fields = {ours: number(found, key, SIZE, where) for ours, key in keys.items() if ours != "projector_ln_eps"}
    fields["projector_ln_eps"] = number(found, keys["projector_ln_eps"], POSITIVE, where)
    derived = {"text_hidden_size": width, "mm_hidden_size": fields["hidden_size"]}
    check_fixed(found, OFF | VISION_OFF | FIXED_VISION | derived, where)
    if fields["hidden_size"] % (4 * fields["num_attention_heads"]):
        heads = fields["num_attention_heads"]
        raise ConfigError(f"{where}: width {fields['hidden_size']} is no multiple of 4 * {heads} attention heads")
    return VisionConfig(**{key: value for key, value in fields.items() if value is not None})


def _released_vision(config: ModelConfig, model_type: str) -> dict[str, Any]:
    v = config.vision
    if v is None:
        raise ConfigError(f"a model without a vision tower cannot be written as model_type {model_type!r}")
    _check_unnamed(v, UNNAMED_VISION, "model.vision")
    if model_type == "kimi_k25":
        fields = {theirs: getattr(v, ours) for ours, theirs in VISION_FIELDS.items()}
        return {**fields, **FIXED_VISION, "mm_hidden_size": v.hidden_size, "text_hidden_size": config.hidden_size}
    absent = {"init_pos_emb_time": VisionConfig.init_pos_emb_time, "projector_ln_eps": VisionConfig.projector_ln_eps}
    _check_unnamed(v, absent, "model.vision")
    fields = {ours: getattr(v, ours) for ours in VISION_FIELDS if ours not in absent}
    return {"model_type": "moonvit", **fields, "merge_kernel_size": [2, 2]}
