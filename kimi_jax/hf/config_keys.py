"""Every key of a released config.json: read, harmless, or followed only with the value that this model has.

Source: the released files of Kimi K2.5 (arXiv:2602.02276) and its relatives, the keys of transformers' DeepseekV3Config
and PretrainedConfig. A key that is in none of the tables is refused, because nobody can say that it leaves the numbers
alone; null counts as absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kimi_jax.config import ConfigError, nearest
from kimi_jax.untrusted import describe

MAX_SIZE = 1 << 31  # of a dimension: indices are int32
# Sampling, training and bookkeeping: nothing that a forward pass of the weights depends on.
HARMLESS = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "aux_loss_alpha", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "ep_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "ignore_index", "initializer_range", "label2id", "length_penalty",
    "max_length", "media_placeholder_token_id", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "sep_token_id", "seq_aux", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "unk_token_id", "use_bfloat16", "use_cache",
))  # fmt: skip
TOP = frozenset(("text_config", "vision_config", "quantization_config", "use_unified_vision_chunk", "video_placeholder",
                 "text_config_dict", "vision_config_dict"))  # fmt: skip
# Of every section: switches of other models that have to be off.
OFF: dict[str, Any] = {
    "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False, "is_encoder_decoder": False,
    "pruned_heads": {}, "tie_word_embeddings": False,
}  # fmt: skip
# Of the text section, beside what config.py writes itself: what other relatives of DeepSeek-V3 may switch on.
TEXT_OFF: dict[str, Any] = {
    "attention_chunk_size": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "index_head_dim": None, "index_n_heads": None, "index_topk": None, "mlp_bias": False, "partial_rotary_factor": 1.0,
    "rope_interleave": True, "sliding_window": None, "use_qk_norm": False, "qk_layernorm": False,
    "use_sliding_window": False,
}  # fmt: skip
VISION_OFF: dict[str, Any] = {
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "layer_norm_eps": 1e-5,
    "num_channels": 3, "rope_theta": 10000.0, "spatial_merge_size": 2,
}  # fmt: skip


class Number(NamedTuple):
    """The range of a number in config.json."""

    low: float
    high: float
    whole: bool


SIZE, COUNT, POSITIVE = Number(1, MAX_SIZE, True), Number(0, MAX_SIZE, True), Number(1e-30, 1e30, False)
NOT_NEGATIVE = Number(0, 1e30, False)


def section(parent: dict[str, Any], key: str, where: str) -> dict[str, Any] | None:
    """An object inside an object, None if it is absent or null. Raises ConfigError for another type."""
    found = parent.get(key)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{where}: {key} must be an object, not {describe(found)}")
    return found


def number(found: dict[str, Any], key: str, allowed: Number, where: str, default: Any = None) -> Any:
    """A number in its range, an int if it must be whole. Raises ConfigError for another type or value."""
    value = found.get(key)
    if value is None:
        return default
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and allowed.low <= value <= allowed.high
    if good and allowed.whole:
        good = isinstance(value, int)
    if not good:
        kind = "a whole number" if allowed.whole else "a number"
        raise ConfigError(
            f"{where}: {key} must be {kind} from {allowed.low:g} to {allowed.high:g}, not {describe(value)}"
        )
    return value if allowed.whole else float(value)


def flag(found: dict[str, Any], key: str, where: str) -> bool:
    """true or false. Raises ConfigError for anything else."""
    if not isinstance(found.get(key), bool):
        raise ConfigError(f"{where}: {key} must be true or false, not {describe(found.get(key))}")
    return found[key]


def check_known(found: dict[str, Any], known: Any, where: str) -> None:
    """Raises ConfigError that names every key with a value that is not in `known`."""
    unknown = [key for key, value in found.items() if value is not None and key not in known]
    if unknown:
        named = [f"{describe(key)} = {describe(found[key])}{nearest(key[:64], known)}" for key in unknown[:10]]
        raise ConfigError(f"{where}: this model does not know {', '.join(named)}; it may change the numbers")


def check_fixed(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises ConfigError for values of the file that the model does not follow."""
    wrong = [
        f"{key} = {describe(found[key])} (only {value!r} is supported)"
        for key, value in wanted.items()
        if found.get(key) is not None and found[key] != value
    ]
    if wrong:
        raise ConfigError(f"{where}: this model cannot follow {'; '.join(wrong)}")
