"""Answers that may run Python: products of two numbers of six digits, beyond the demo's model and one line of code.

Run:     python -m kimi_jax.rl --config=configs/rl/tool.py
Needs:   runs/sft_demo, which `make sft-demo` writes, and Linux for the sandbox (docs/sandbox.md).
Expect:  nothing yet: this run has not been made at length. Its start answers in conversations but has never seen a
         call, and a reward reinforces only what is sampled; give it a start that has, --config.init_from.path=DIR.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c
from kimi_jax.config_rl import PolicyConfig, RLConfig, ToolConfig

PROMPTS, SAMPLES = 8, 8


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run: model, tokenizer and weights of configs/sft/demo.py."""
    start = c.freeze(runpy.run_path(str(Path(__file__).parents[1] / "sft" / "demo.py"))["get_config"]())
    rollout = c.RolloutConfig(prompts=PROMPTS, samples=SAMPLES, max_new_tokens=96, slots=64, tokens_per_call=8)
    return c.thaw(
        dataclasses.replace(
            start,
            workdir="runs/rl_tool",
            steps=90,
            log_interval=1,
            init_from=c.InitFromConfig(path=start.workdir),
            # the declaration of the tool takes most of a prompt
            data=dataclasses.replace(
                start.data,
                sources={},
                sequence_length=768,
                rows_per_pack=PROMPTS * SAMPLES,
                vision_bins=(),
                vision_ratio=((0.0, 0.0),),
            ),
            optimizer=c.OptimizerConfig(peak_lr=5e-4, final_lr=5e-4, warmup_steps=5, decay_fraction=0.0),
            checkpoint=c.CheckpointConfig(interval=30, keep=2),
            eval=c.EvalConfig(tasks=("product",), interval=30, limit=64, final_limit=256),
            rl=RLConfig(
                {"product": c.TaskConfig("product", tools=("ipython",))},
                rollout,
                PolicyConfig(),
                tools=ToolConfig(turns=3, calls=2, characters=200),
            ),
        )
    )
