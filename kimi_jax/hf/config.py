"""The released config.json and ModelConfig.

Source: docs/released_model.md section 1 (fields of Kimi-K2.5 and its relatives; `vt_*` and `mm_*` vision names),
section 3 (what the fields mean). Settings of the file that would change the numbers and that this model does not have
are refused, not ignored. What has no meaning for the model (sampling defaults, transformers' own) is ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kimi_jax.config import ConfigError, ModelConfig, MoEConfig, VisionConfig, YarnConfig, nearest
from kimi_jax.hf.names import FAMILIES, family

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
    text = released.get("text_config") if names.projector else released
    if text is None:
        raise ConfigError("config.json has no text_config")
    fields: dict[str, Any] = _take(text, TEXT_FIELDS, "config.json", optional=("q_lora_rank",))
    fields |= {key: float(fields[key]) for key in ("rms_norm_eps", "rope_theta")}
    _check_fixed(text, {**FIXED_TEXT, "num_key_value_heads": fields["num_attention_heads"]}, "config.json")
    _check_fixed(released, {"tie_word_embeddings": False}, "config.json")
    dtype = _dtype(released)
    vocab = fields["vocab_size"]
    eos = _token(text, released, "eos_token_id", 163585)
    pad = PAD_OF_RELEASED_VOCABULARY[1] if vocab == PAD_OF_RELEASED_VOCABULARY[0] else eos
    return ModelConfig(
        **fields,
        rope_scaling=_yarn(text.get("rope_scaling")),
        moe=_moe(text, fields["num_hidden_layers"]),
        vision=_vision(released, fields["hidden_size"]) if names.projector else None,
        media_placeholder_token_id=_token(released, text, "media_placeholder_token_id", 163605),
        bos_token_id=_token(text, released, "bos_token_id", 163584),
        eos_token_id=eos,
        pad_token_id=_token(text, released, "pad_token_id", pad),
        initializer_range=float(text.get("initializer_range", 0.02)),
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
    found = released.get("quantization_config") or (released.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method")
    if method == "fp8":
        block = found.get("weight_block_size")
        if not block or len(block) != 2:
            raise ConfigError(f"FP8 weights need weight_block_size [rows, columns], not {block}")
        return Quantization("fp8", block=(int(block[0]), int(block[1])))
    if method != "compressed-tensors" or found.get("format") != "pack-quantized":
        raise ConfigError(
            f"quantization {method!r} in format {found.get('format')!r} is not supported; "
            "there are: compressed-tensors pack-quantized (INT4), fp8 with weight_block_size"
        )
    groups = list(found.get("config_groups", {}).values())
    sizes = {group["weights"].get("group_size") for group in groups}
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "actorder": None}
    for group in groups:
        _check_fixed(group["weights"], wanted, "quantization_config")
    size = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(size, int) or size < 8 or size % 8:
        raise ConfigError(f"quantization_config: needs one group_size for all, a multiple of 8, not {sizes or size}")
    return Quantization("int4", group_size=size)


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
    return model_type


def _dtype(released: dict[str, Any]) -> str:
    text = released.get("text_config") or {}
    for section in (released, text):
        for key in ("dtype", "torch_dtype"):
            if section.get(key):
                return str(section[key]).removeprefix("torch.")
    return "bfloat16"


def _token(first: dict[str, Any], second: dict[str, Any], key: str, default: int) -> int:
    """A token id that stands in the text section or at the top; the first of several."""
    for section in (first, second):
        value = section.get(key)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return default


def _take(section: dict[str, Any], keys: Any, where: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    missing = [key for key in keys if section.get(key) is None and key not in optional]
    if missing:
        hints = [f"{key}{nearest(key, section)}" for key in missing]
        raise ConfigError(f"{where} lacks: {', '.join(hints)}")
    return {key: section.get(key) for key in keys}


def _check_fixed(section: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises ConfigError for values of the file that the model does not follow."""
    wrong = [
        f"{key} = {section[key]!r} (only {value!r} is supported)"
        for key, value in wanted.items()
        if section.get(key) is not None and section[key] != value
    ]
    if wrong:
        raise ConfigError(f"{where}: this model cannot follow {'; '.join(wrong)}")


def _check_unnamed(section: Any, wanted: dict[str, Any], where: str) -> None:
    wrong = [f"{k} = {getattr(section, k)!r}" for k, value in wanted.items() if getattr(section, k) != value]
    if wrong:
        raise ConfigError(f"the released format has no field for {where}.{', '.join(wrong)}; it means {wanted}")


def _yarn(section: dict[str, Any] | None) -> YarnConfig | None:
    if not section:
        return None
    kind = section.get("type", section.get("rope_type"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} is not supported; there are: yarn, null")
    fields = {f.name: f.default for f in dataclasses.fields(YarnConfig)} | {
        "mscale_all_dim": 0.0
    }  # the released default
    del fields["factor"]
    given = _take(section, ("factor",), "rope_scaling")
    values = given | {key: default if section.get(key) is None else section[key] for key, default in fields.items()}
    numbers: dict[str, Any] = {k: int(v) if k.startswith("original") else float(v) for k, v in values.items()}
    return YarnConfig(**numbers)


def _moe(text: dict[str, Any], layers: int) -> MoEConfig | None:
    if text.get("n_routed_experts") is None:
        return None
    _check_fixed(text, FIXED_MOE, "config.json")
    fields = _take(text, MOE_FIELDS, "config.json", optional=("n_shared_experts",))
    if fields["first_k_dense_replace"] > layers:
        raise ConfigError(f"first_k_dense_replace = {fields['first_k_dense_replace']} of {layers} layers")
    fields["n_shared_experts"] = fields["n_shared_experts"] or 0
    fields["routed_scaling_factor"] = float(fields["routed_scaling_factor"])
    return MoEConfig(**fields)


def _vision(released: dict[str, Any], width: int) -> VisionConfig:
    section = released.get("vision_config")
    if section is None:
        raise ConfigError("config.json has no vision_config")
    plain = section.get("model_type") == "moonvit" or "vt_hidden_size" not in section  # Kimi-VL
    keys = {ours: ours if plain else theirs for ours, theirs in VISION_FIELDS.items()}
    values = _take(section, keys.values(), "vision_config", optional=("init_pos_emb_time", "projector_ln_eps"))
    wanted = {
        **FIXED_VISION, "text_hidden_size": width, "mm_hidden_size": values[keys["hidden_size"]],
    }  # fmt: skip
    _check_fixed(section, wanted, "vision_config")
    fields = {ours: values[key] for ours, key in keys.items() if values[key] is not None}
    return VisionConfig(**fields)


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
