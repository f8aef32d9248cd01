"""Kimi K2.5: 1.03 T text parameters (32.9 B active), MoonViT-3D, joint text-vision pre-training from the first step.

Run:     python -m kimi_jax.train --config=configs/kimi_k2_5.py --config.workdir=gs://BUCKET/kimi_k2_5 \
             --config.data.tokenizer=DIR/tiktoken.model --config.data.sources.text.path=gs://BUCKET/text.array_record \
             --config.data.sources.vision.path=gs://BUCKET/vision.array_record
Paper:   vision tokens are a constant tenth of all from the start (Table 1, early fusion); MuonClip with tau 100, weight
         decay 0.1 and WSD from 2e-4 (section 2.4, 2.5).
Expect:  shape and parameter count of the released model (asserted in the tests). A pod; not trained by us.
"""

import dataclasses

import ml_collections

from kimi_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Settings; the paths of tokenizer and sources are to be filled in."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/kimi_k2_5",
            steps=500_000,
            model=dataclasses.replace(c.preset("kimi_k2_5"), remat=True),
            data=c.DataConfig(
                sources={
                    "text": c.SourceConfig(kind="array_record"),
                    "vision": c.SourceConfig(kind="array_record", vision=True),
                },
                sequence_length=4096,
                num_packs=512,
                rows_per_pack=32,
                vision_bins=((1024, 8), (4096, 14)),
                vision_ratio=((0.0, 0.1),),
                num_workers=16,
            ),
            checkpoint=c.CheckpointConfig(interval=1000),
        )
    )
