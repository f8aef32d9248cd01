"""PARL in small: reward for assigning tasks at the same time where that helps; see experiments/agent_swarm.

Run:     python -m kimi_jax.rl --config=configs/rl/orchestrate.py, after the commands of configs/rl/orchestrate_sft.py
Needs:   runs/orchestrator and runs/orchestrator_sft.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c
from kimi_jax.config_rl import OrchestratorConfig, PolicyConfig, RLConfig

PROMPTS, SAMPLES = 8, 8
TURN = 160  # tokens: four tasks


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run: model, tokenizer and weights of configs/rl/orchestrate_sft.py."""
    start = c.freeze(runpy.run_path(str(Path(__file__).parent / "orchestrate_sft.py"))["get_config"]())
    tasks = {
        "wide": c.TaskConfig("orchestrate", path="wide/4"),
        "chain": c.TaskConfig("orchestrate", path="chain/2"),
        "mixed": c.TaskConfig("orchestrate", path="mixed/4"),
    }
    rollout = c.RolloutConfig(
        prompts=PROMPTS, samples=SAMPLES, max_new_tokens=TURN, slots=64, tokens_per_call=16, repeat_period=0,
        drop_uninformative=False,
    )  # fmt: skip
    return c.thaw(
        dataclasses.replace(
            start,
            workdir="runs/orchestrator_rl",
            steps=40,
            log_interval=1,
            init_from=c.InitFromConfig(path=start.workdir),
            data=dataclasses.replace(start.data, sources={}, rows_per_pack=PROMPTS * SAMPLES),
            optimizer=c.OptimizerConfig(
                peak_lr=5e-4, final_lr=5e-4, warmup_steps=3, decay_fraction=0.0, weight_decay=0.0
            ),
            checkpoint=c.CheckpointConfig(interval=20, keep=2),
            eval=c.EvalConfig(tasks=("wide", "chain", "mixed"), interval=20, limit=32, final_limit=64),
            rl=RLConfig(tasks, rollout, PolicyConfig(), orchestrator=OrchestratorConfig(width=4)),
        )
    )
