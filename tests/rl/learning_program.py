"""One process of the learning gates: a run of reinforcement learning on one device, killed for real if it is asked.

argv: JSON with workdir, tokenizer, kind of the task, steps, and optionally seed, peak_lr, init_from, vision, blank,
policy, toggle and rollout (settings by name), kill (SIGKILL just before this call of the sampler, counted from 1).
Prints `RESULT` and JSON: status, rewards of all iterations, final (the held-out row), digest of the parameters.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from kimi_jax import config as c
from kimi_jax.config_rl import PolicyConfig, RLConfig, TaskConfig, ToggleConfig
from kimi_jax.rl.run import run
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.train import checkpoint
from tests.rl.tiny_run import OPTIMIZER, TEXT, settings

# wide enough to copy: 0.15 M parameters
MODEL = dataclasses.replace(
    TEXT, hidden_size=64, intermediate_size=128, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, initializer_range=0.08,
    moe=dataclasses.replace(TEXT.moe, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
)  # fmt: skip
VISION = c.VisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, init_pos_emb_height=4,
    init_pos_emb_width=4,
)  # fmt: skip
ROLLOUT = {"prompts": 32, "samples": 8, "max_new_tokens": 2, "tokens_per_call": 2, "slots": 128, "max_draws": 3.0,
           "drop_uninformative": True, "repeat_period": 0}  # fmt: skip
PROMPT = 18  # tokens of the longest prompt of the toy tasks


def configure(wanted: dict) -> c.TrainConfig:
    chosen = ROLLOUT | wanted.get("rollout", {})
    model = dataclasses.replace(MODEL, vision=VISION) if wanted.get("vision") else MODEL
    config = settings(Path(wanted["tokenizer"]).parent, wanted["workdir"], wanted["kind"], model, **chosen)
    groups = chosen["prompts"] // chosen.get("updates", 1)
    data = dataclasses.replace(
        config.data, sequence_length=PROMPT + chosen["max_new_tokens"], rows_per_pack=groups * chosen["samples"],
        vision_bins=((64, groups // 4),) if wanted.get("vision") else (),
    )  # fmt: skip
    lr = wanted.get("peak_lr", 1e-2)
    optimizer = dataclasses.replace(
        OPTIMIZER, peak_lr=lr, final_lr=lr / 10, warmup_steps=5, decay_fraction=0.3, newton_schulz_steps=5
    )
    rl = RLConfig(
        {"toy": TaskConfig(wanted["kind"], blank=wanted.get("blank", False))}, config.rl.rollout,
        PolicyConfig(**wanted.get("policy", {})), ToggleConfig(**wanted["toggle"]) if "toggle" in wanted else None,
    )  # fmt: skip
    return dataclasses.replace(
        config, steps=wanted["steps"], seed=wanted.get("seed", 0), optimizer=optimizer, data=data, rl=rl,
        init_from=c.InitFromConfig(path=wanted.get("init_from", "")),
        checkpoint=c.CheckpointConfig(interval=wanted.get("checkpoint", 0)),
        eval=c.EvalConfig(tasks=("toy",), final_limit=256),
    )  # fmt: skip


def kill_at(call: int) -> None:
    """Kills this process in the middle of a rollout: after the sampler's engine has drawn, before anybody knows."""
    draw, count = RolloutWorker.draw, 0

    def counted(self, groups, most=0, greedy=False):
        nonlocal count
        count += 1
        draw(self, groups, most, greedy)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)

    RolloutWorker.draw = counted  # type: ignore[method-assign]


def digest_of(folder: Path) -> str:
    """Of all bits of the trained parameters."""
    params = jax.tree.leaves(jax.device_get(checkpoint.load(str(folder))[1]))
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in params)).hexdigest()


def main() -> None:
    wanted = json.loads(sys.argv[1])
    if wanted.get("kill"):
        kill_at(wanted["kill"])
    status = run(configure(wanted))
    folder = Path(wanted["workdir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (final,) = json.loads((folder / "results.json").read_text())
    found = {
        "status": status, "rewards": [row["data"]["reward_mean"] for row in rows], "final": final,
        "digest": digest_of(folder),
        "mismatch": max(row["mismatch_kl"] for row in rows),
    }  # fmt: skip
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
