"""A K2.5-shaped model of 0.36 M parameters sees how discs in images are counted, a little: the start of rl/count.py.

Run:     make rl-demo      (or)
         python -m kimi_jax.data tokenizer --config=configs/rl/count_sft.py
         python -m kimi_jax.train --config=configs/rl/count_sft.py
Needs:   pip install -e '.[demo]'; no network, no accelerator.
"""

import ml_collections

from kimi_jax import config as c

MODEL = c.ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.08, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    rope_scaling=None, max_position_embeddings=64,
    moe=c.MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, routed_scaling_factor=1.5),
    vision=c.VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          init_pos_emb_height=4, init_pos_emb_width=4),
    media_placeholder_token_id=9, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
)  # fmt: skip
STEPS = 47


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/rl_sft",
            steps=STEPS,
            model=MODEL,
            data=c.DataConfig(
                sources={"count": c.SourceConfig(kind="demo", path="count", vision=True)},
                tokenizer="runs/rl_sft/tokenizer.json",
                sequence_length=21,
                num_packs=1,
                rows_per_pack=64,
                vision_bins=((64, 16),),
                vision_ratio=((0.0, 0.2),),
                buffer_size=128,
            ),
            optimizer=c.OptimizerConfig(peak_lr=3e-3, final_lr=3e-4, warmup_steps=10, decay_fraction=0.5),
            checkpoint=c.CheckpointConfig(interval=0, keep=1),
        )
    )
