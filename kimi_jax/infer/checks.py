"""What a request must be like before the engine takes it: tokens, media, the pads that stand for them.

n tokens of a prompt   p patch size
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import num_features
from kimi_jax.infer.request import Sampling


def check_tokens(config: ModelConfig, token_ids: Any, longest: int) -> np.ndarray:
    """The prompt as int32 [n]. longest: most tokens of it. Raises ValueError for what is no prompt of this model."""
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"token_ids must be ints [n] with at least one token, not {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token_ids holds {tokens.min()}..{tokens.max()}, the vocabulary has 0..{config.vocab_size - 1}"
        )
    if len(tokens) >= longest:
        raise ValueError(f"the prompt has {len(tokens)} tokens; prompt and answer together have at most {longest}")
    return tokens.astype(np.int32)


def check_sampling(config: ModelConfig, sampling: Sampling, prompt: int) -> None:
    """Raises ValueError for settings out of range, or that this model or prompt cannot have."""
    problem = sampling.problem()
    if problem:
        raise ValueError(problem)
    if sampling.score_from is not None and sampling.score_from >= prompt:
        raise ValueError(f"score_from is {sampling.score_from}, but the prompt has {prompt} tokens")
    if sampling.routed_experts and not config.num_moe_layers:
        raise ValueError("routed_experts: this model has none")


def check_media(config: ModelConfig, tokens: np.ndarray, media: tuple[MediaItem, ...]) -> np.ndarray:
    """int32 [n]: which item each pad belongs to, -1 elsewhere. Raises ValueError for media that fit neither the model
    nor the pads."""
    vision, pad = config.vision, config.media_placeholder_token_id
    owners = np.full(len(tokens), -1, np.int32)
    if vision is None:
        if media:
            raise ValueError("this model is text-only; it cannot take media")
        return owners
    for item in media:
        (t, h, w), patches = item.grid, item.patches
        if not 1 <= t <= vision.init_pos_emb_time or h < 2 or w < 2 or h % 2 or w % 2:
            raise ValueError(f"media grid {item.grid}: needs 1..{vision.init_pos_emb_time} frames, even h, w >= 2")
        if patches.shape != (t * h * w, 3 * vision.patch_size**2):
            raise ValueError(f"media patches must be {(t * h * w, 3 * vision.patch_size**2)}, not {patches.shape}")
    wanted = [num_features(item.grid) for item in media]
    pads = tokens == pad
    if pads.sum() != sum(wanted):
        raise ValueError(
            f"{pads.sum()} media pads (id {pad}) in token_ids, but the {len(media)} media items have {sum(wanted)} "
            "features: each item needs h*w/4 pads"
        )
    owners[pads] = np.repeat(np.arange(len(media)), wanted)
    return owners
