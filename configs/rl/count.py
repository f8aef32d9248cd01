"""Joint multimodal RL in small: a model that counts discs in images badly learns to do it by reward alone.

Run:     make rl-demo      (or, after configs/rl/count_sft.py)
         python -m kimi_jax.rl --config=configs/rl/count.py
Needs:   runs/rl_sft, which `make rl-demo` writes first.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c
from kimi_jax.config_rl import PolicyConfig, RLConfig

PROMPTS, SAMPLES = 64, 8
ANSWER = 3  # tokens: a space, the number, [EOS]


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run: model, tokenizer and weights of configs/rl/count_sft.py."""
    start = c.freeze(runpy.run_path(str(Path(__file__).parent / "count_sft.py"))["get_config"]())
    rollout = c.RolloutConfig(
        prompts=PROMPTS, samples=SAMPLES, max_new_tokens=ANSWER, slots=128, tokens_per_call=ANSWER, repeat_period=0
    )
    return c.thaw(
        dataclasses.replace(
            start,
            workdir="runs/rl_count",
            steps=90,
            log_interval=1,
            init_from=c.InitFromConfig(path=start.workdir),
            data=dataclasses.replace(
                start.data, sources={}, rows_per_pack=PROMPTS * SAMPLES, vision_bins=((64, PROMPTS // 4),)
            ),
            optimizer=c.OptimizerConfig(
                peak_lr=5e-4, final_lr=5e-4, warmup_steps=5, decay_fraction=0.0, weight_decay=0.0
            ),
            checkpoint=c.CheckpointConfig(interval=30, keep=2),
            eval=c.EvalConfig(tasks=("count",), interval=30, limit=256, final_limit=512),
            rl=RLConfig({"count": c.TaskConfig("count_exact")}, rollout, PolicyConfig()),
        )
    )
