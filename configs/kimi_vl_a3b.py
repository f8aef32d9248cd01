"""Kimi-VL-A3B: Moonlight's decoder with MoonViT and the projector; the predecessor of K2.5 at a tenth of a pod.

Run:     python -m kimi_jax.train --config=configs/kimi_vl_a3b.py --config.workdir=gs://BUCKET/kimi_vl \
             --config.data.tokenizer=DIR/tiktoken.model --config.data.sources.text.path=gs://BUCKET/text.array_record \
             --config.data.sources.vision.path=gs://BUCKET/vision.array_record
Expect:  shape and parameter count of the released model (asserted in the tests). Not trained by us.
"""

import dataclasses

import ml_collections

from kimi_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Settings; the paths of tokenizer and sources are to be filled in."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/kimi_vl_a3b",
            steps=100_000,
            model=dataclasses.replace(c.preset("kimi_vl_a3b"), remat=True),
            data=c.DataConfig(
                sources={
                    "text": c.SourceConfig(kind="array_record"),
                    "vision": c.SourceConfig(kind="array_record", vision=True),
                },
                sequence_length=8192,
                num_packs=256,
                vision_bins=((4096, 2),),
                vision_ratio=((0.0, 0.2),),
                num_workers=8,
            ),
            optimizer=c.OptimizerConfig(peak_lr=4.2e-4, final_lr=4.2e-5, warmup_steps=2000),
        )
    )
