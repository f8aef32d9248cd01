"""A K2.5-shaped model of 1.0 M parameters learns the form of an orchestrator's turns: the start of rl/orchestrate.py.

Run:     python -m kimi_jax.agents.orchestration --out=runs/orchestrator
         python -m kimi_jax.data tokenizer --config=configs/rl/orchestrate_sft.py
         python -m kimi_jax.train --config=configs/rl/orchestrate_sft.py
Needs:   pip install -e '.[demo]'; no network, no accelerator.
"""

import ml_collections

from kimi_jax import config as c

MODEL = c.ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.06, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    rope_scaling=None, max_position_embeddings=512,
    moe=c.MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, routed_scaling_factor=1.5),
    vision=None, media_placeholder_token_id=9, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
)  # fmt: skip
STEPS = 400


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/orchestrator_sft",
            steps=STEPS,
            model=MODEL,
            data=c.DataConfig(
                sources={
                    "conversations": c.SourceConfig(
                        kind="chat",
                        path="runs/orchestrator/conversations.jsonl",
                        chat=c.ChatConfig(train_on="all"),
                    )
                },
                tokenizer="runs/orchestrator_sft/tokenizer.json",
                sequence_length=512,
                num_packs=1,
                rows_per_pack=8,
                buffer_size=64,
            ),
            optimizer=c.OptimizerConfig(peak_lr=6e-3, final_lr=6e-4, warmup_steps=20, decay_fraction=0.5),
            checkpoint=c.CheckpointConfig(interval=0, keep=1),
        )
    )
