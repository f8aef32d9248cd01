"""A whole model in miniature and packed batches for it, for the tests of training.

8 groups of one row of 32 tokens; beside each row one bin of 16 patches with one 4x4 image (4 features).
"""

import dataclasses

import numpy as np

from kimi_jax import config as c
from kimi_jax.data.patches import item_layout
from kimi_jax.packed_batch import PackedBatch, VisionBins

G, S, P, C = 8, 32, 16, 588
GRID = (1, 4, 4)

MODEL = c.ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, rope_scaling=None,
    max_position_embeddings=64,
    moe=c.MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.5),
    vision=c.VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          init_pos_emb_height=4, init_pos_emb_width=4),
    media_placeholder_token_id=9, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
)  # fmt: skip

CONFIG = c.TrainConfig(
    steps=20,
    log_interval=5,
    model=MODEL,
    data=c.DataConfig(sequence_length=S, num_packs=G, vision_bins=((P, 1),), num_workers=0),
    optimizer=c.OptimizerConfig(peak_lr=1e-2, final_lr=1e-3, warmup_steps=2, decay_fraction=0.2),
)


def with_optimizer(config: c.TrainConfig = CONFIG, **changes) -> c.TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def with_model(config: c.TrainConfig = CONFIG, **changes) -> c.TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def make_batch(seed: int, groups: int = G) -> PackedBatch:
    """A packed batch: in each row a document with an image (tokens 0..15), one of text (16..27), padding (28..31).

    Text counts upwards in steps that are the same over a document, so that it can be learnt.
    """
    rng = np.random.default_rng(seed)
    start, stride = rng.integers(0, 48, (2, groups, 2))
    tokens = np.full((groups, S), 2, np.int32)
    at = np.arange(S)
    for row in range(groups):
        for document, place in enumerate((slice(0, 16), slice(16, 28))):
            run = start[row, document] + (1 + stride[row, document] % 3) * at[place]
            tokens[row, place] = 16 + run % 48
    media = (at >= 2) & (at < 6)
    tokens[:, media] = 9
    segments = np.broadcast_to(np.where(at < 16, 1, np.where(at < 28, 2, 0)), (groups, S)).astype(np.int32)
    last = (at == 15) | (at >= 27)
    targets = np.where(last, 2, np.roll(tokens, -1, 1)).astype(np.int32)
    weights = np.broadcast_to(~last & (targets != 9), (groups, S)).astype(np.float32)
    positions = np.broadcast_to(np.where(at < 16, at, np.where(at < 28, at - 16, 0)), (groups, S)).astype(np.int32)
    features = np.broadcast_to(np.where(media, at - 2, -1), (groups, S)).astype(np.int32)
    _, coords, slots = item_layout(GRID)
    vision = VisionBins(
        patches=rng.integers(0, 256, (groups, P, C), dtype=np.uint8),
        segment_ids=np.ones((groups, P), np.int32),
        coords=np.broadcast_to(coords, (groups, P, 3)).copy(),
        grids=np.broadcast_to(np.asarray(GRID, np.int32), (groups, P, 3)).copy(),
        feature_slots=np.broadcast_to(slots, (groups, P // 4)).copy(),
    )
    return PackedBatch(
        tokens=tokens, targets=targets, loss_weights=weights, segment_ids=segments.copy(), positions=positions.copy(),
        modality=np.where(segments == 1, 1, 0).astype(np.int32), feature_index=features.copy(), rows_per_pack=1,
        vision=(vision,),
    )  # fmt: skip


def make_text_batch(seed: int, groups: int = G) -> PackedBatch:
    """The same without images: the media pads stay, as tokens like others."""
    batch = make_batch(seed, groups)
    return dataclasses.replace(batch, vision=(), feature_index=np.full_like(batch.feature_index, -1))
