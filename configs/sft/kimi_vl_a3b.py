"""SFT of Kimi-VL-A3B from its released weights, on conversations with images and video.

Run:     python -m kimi_jax.train --config=configs/sft/kimi_vl_a3b.py --config.workdir=gs://BUCKET/sft \
             --config.init_from.path=DIR --config.data.tokenizer=DIR/tiktoken.model \
             --config.data.sources.chat.path=gs://BUCKET/train-*.parquet
Source:  Kimi-VL report (arXiv 2504.07491), joint supervised fine-tuning: one epoch at 32,768 tokens from 2e-5 down to
         2e-6; the loss is on answers only. A second epoch is at 131,072 tokens from 1e-5 to 1e-6, after a new warm-up:
         --config.data.sequence_length=131072 --config.optimizer.peak_lr=1e-5 --config.optimizer.final_lr=1e-6
Expect:  no result of ours. `steps` is to be one epoch: `python -m kimi_jax.data inspect` says how many steps that is.
"""

import dataclasses

import ml_collections

from kimi_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Settings; the paths of weights, tokenizer and data are to be filled in."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/sft_kimi_vl_a3b",
            steps=2000,
            model=dataclasses.replace(c.preset("kimi_vl_a3b"), remat=True),
            init_from=c.InitFromConfig(path="weights/kimi_vl_a3b"),
            data=c.DataConfig(
                sources={"chat": c.SourceConfig(kind="chat", path="data/train-*.parquet", vision=True)},
                sequence_length=32768,
                num_packs=64,
                vision_bins=((1024, 8), (4096, 4), (16384, 2)),
                num_workers=8,
            ),
            optimizer=c.OptimizerConfig(peak_lr=2e-5, final_lr=2e-6, warmup_steps=50, decay_fraction=0.95),
            checkpoint=c.CheckpointConfig(interval=200),
        )
    )
