"""A tiny model, its tokenizer and the settings of a run on the toy tasks, for the tests of rollouts."""

import dataclasses
from pathlib import Path

from kimi_jax import config as c
from kimi_jax.config_rl import PolicyConfig, RLConfig, RolloutConfig, TaskConfig
from kimi_jax.data.example import Text
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.rl.tasks import LADDER
from tests.train.tiny import MODEL

TEXT = dataclasses.replace(
    MODEL, vocab_size=320, num_hidden_layers=2, vision=None, initializer_range=0.1,
    moe=dataclasses.replace(MODEL.moe, n_routed_experts=2, num_experts_per_tok=1),
)  # fmt: skip
VISION = dataclasses.replace(TEXT, vision=dataclasses.replace(MODEL.vision, num_hidden_layers=1))
OPTIMIZER = c.OptimizerConfig(
    peak_lr=3e-3, final_lr=3e-3, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, newton_schulz_steps=1
)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer that has a token for each word of the toy tasks."""
    texts = []
    for name, task in LADDER.items():
        for i in range(0 if name == "product" else 40):  # any digits: its words would be those of no other task
            problem = task[i]
            question = "".join(part.text for part in problem.parts if isinstance(part, Text))
            texts += [f"{question} {problem.truth}"] * 3
    train_tokenizer(texts, 320, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def settings(folder: Path, workdir: Path | str = "", kind: str = "copy", model=TEXT, **rollout) -> c.TrainConfig:
    """A run on one task with small batches; `rollout` changes its rollout settings."""
    chosen = {"prompts": 4, "samples": 2, "max_new_tokens": 4, "slots": 8, "tokens_per_call": 2, "max_draws": 1.0,
              "drop_uninformative": False} | rollout  # fmt: skip
    bins = ((16, 8 * (1 + chosen.get("max_staleness", 0))),) if model.vision else ()
    data = c.DataConfig(
        tokenizer=str(folder / "tokenizer.json"), sequence_length=32, num_packs=1, rows_per_pack=8, vision_bins=bins,
        vision_ratio=((0.0, 0.5),),
    )  # fmt: skip
    return c.TrainConfig(
        workdir=str(workdir), steps=6, log_interval=1, model=model, data=data, optimizer=OPTIMIZER,
        checkpoint=c.CheckpointConfig(interval=0), mesh=c.MeshConfig(1),
        rl=RLConfig({"toy": TaskConfig(kind)}, RolloutConfig(**chosen), PolicyConfig()),
    )  # fmt: skip
