"""SFT of the demo model: it learns to answer in conversations, with the release's chat template.

Run:     make sft-demo      (after make demo; or)
         python -m kimi_jax.train --config=configs/sft/demo.py
         python -m kimi_jax.eval.conversations --before=runs/demo --after=runs/sft_demo
Needs:   runs/demo, which `make demo` writes.
Expect:  the second command prints the numbers, before and after, beside a white image as the control. This run has not
         been made at full length yet, so there are none to compare with.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c

STEPS = 200


def get_config() -> ml_collections.ConfigDict:
    """Settings of the run: the model of configs/demo.py, its weights, and conversations."""
    demo = c.freeze(runpy.run_path(str(Path(__file__).parents[1] / "demo.py"))["get_config"]())
    sources = {
        "chat_vqa": c.SourceConfig(kind="demo", path="chat_vqa", vision=True),
        "chat_sums": c.SourceConfig(kind="demo", path="chat_sums"),
    }
    return c.thaw(
        dataclasses.replace(
            demo,
            workdir="runs/sft_demo",
            steps=STEPS,
            init_from=c.InitFromConfig(path="runs/demo"),
            # conversations of 75 to 120 tokens, of which images are 9 %, fill rows of 512 better than rows of 256
            data=dataclasses.replace(
                demo.data, sources=sources, vision_ratio=((0.0, 0.06),), sequence_length=512, rows_per_pack=6
            ),
            optimizer=c.OptimizerConfig(peak_lr=2e-3, final_lr=1e-4, warmup_steps=10, decay_fraction=0.8),
            checkpoint=c.CheckpointConfig(interval=100, keep=2),
            eval=c.EvalConfig(),
        )
    )
