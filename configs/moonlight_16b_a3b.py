"""Moonlight-16B-A3B: text only, 16 B parameters of which 3 B are active; the recipe that proved Muon at scale.

Run:     python -m kimi_jax.train --config=configs/moonlight_16b_a3b.py --config.workdir=gs://BUCKET/moonlight \
             --config.data.tokenizer=DIR/tiktoken.model --config.data.sources.text.path=gs://BUCKET/text.array_record
Expect:  shape and parameter count of the released model (asserted in the tests). Not trained by us.
"""

import dataclasses

import ml_collections

from kimi_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Settings; the paths of tokenizer and source are to be filled in."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/moonlight_16b_a3b",
            steps=100_000,
            model=dataclasses.replace(c.preset("moonlight_16b_a3b"), remat=True),
            data=c.DataConfig(
                sources={"text": c.SourceConfig(kind="array_record")},
                sequence_length=8192,
                num_packs=256,
                vision_bins=(),
                vision_ratio=((0.0, 0.0),),
                num_workers=8,
            ),
            optimizer=c.OptimizerConfig(peak_lr=4.2e-4, final_lr=4.2e-5, warmup_steps=2000),
        )
    )
