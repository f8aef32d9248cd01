"""Whether files can hold the model that their settings describe, asked before anything of that size is built.

Even the list of a model's tensors takes memory, and tracing it builds small tables; so each size of the settings is
first compared with what the files really hold. The exact comparison, tensor by tensor, comes afterwards.
"""

from __future__ import annotations

from kimi_jax.config import ModelConfig
from kimi_jax.hf.files import CheckpointError

CODES_PER_WORD = 8  # INT4: the axis of a packed tensor is so much shorter than that of the weight
POSITIVE = (
    "vocab_size", "hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim",
)  # fmt: skip
VISION_WIDTHS = ("hidden_size", "intermediate_size", "patch_size", "init_pos_emb_height", "init_pos_emb_width")
MAX_FRAMES = 1 << 12  # of init_pos_emb_time, whose table is computed and stands in no file


def check(config: ModelConfig, longest: int, count: int | None, where: str) -> None:
    """Raises CheckpointError that names each setting that is too large for the files, or not positive.

    longest: an axis of a weight cannot be longer; count: number of stored tensors, at least one for each layer and
    expert; None if layers and experts have been compared already.
    """
    widths = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size if config.num_dense_layers else 0,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)": config.num_attention_heads * config.qk_head_dim,
        "num_attention_heads * v_head_dim": config.num_attention_heads * config.v_head_dim,
    }
    positive = {key: getattr(config, key) for key in POSITIVE}
    counts = {"num_hidden_layers": config.num_hidden_layers}
    if config.moe and config.num_moe_layers:
        shared = config.moe.n_shared_experts * config.moe.moe_intermediate_size
        widths["moe_intermediate_size"] = config.moe.moe_intermediate_size
        widths["n_shared_experts * moe_intermediate_size"] = shared
        counts["n_routed_experts * MoE layers"] = config.moe.n_routed_experts * config.num_moe_layers
    divisors = {"qk_rope_head_dim": (config.qk_rope_head_dim, 2)}
    if config.vision:
        vision = {f"vision {key}": getattr(config.vision, key) for key in VISION_WIDTHS}
        widths |= vision
        positive |= vision | {"vision num_attention_heads": config.vision.num_attention_heads}
        divisors["vision hidden_size"] = (config.vision.hidden_size, 4 * config.vision.num_attention_heads)
        counts["vision num_hidden_layers"] = config.vision.num_hidden_layers
    problems = [f"{key} = {size} must be positive" for key, size in positive.items() if size < 1]
    problems += [f"{key} = {n} is no multiple of {by}" for key, (n, by) in divisors.items() if by > 0 and n % by]
    problems += [f"{key} = {n}, no tensor is longer than {longest}" for key, n in widths.items() if n > longest]
    if count is not None:
        problems += [f"{key} = {n}, there are {count} tensors" for key, n in counts.items() if n > count]
    if config.vision and config.vision.init_pos_emb_time > MAX_FRAMES:
        problems.append(f"init_pos_emb_time = {config.vision.init_pos_emb_time}, at most {MAX_FRAMES} are supported")
    if problems:
        raise CheckpointError("\n  ".join([f"{where} cannot hold the model of its settings:", *problems]))
