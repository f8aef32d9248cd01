"""A model for one machine (about 60 M parameters, 25 M active): the size at which ablations are run.

Run:     python -m kimi_jax.train --config=configs/small.py --config.data.tokenizer=DIR/tiktoken.model \
             --config.data.sources.text.path=text.array_record --config.data.sources.vision.path=vision.array_record
Data:    your own JSONL with media, made with `python -m kimi_jax.data build SRC.jsonl DST`; the tokenizer needs a
         vocabulary of at most 32,768 with our special tokens (`kimi_jax.data.tokenizer`).
Expect:  on one 8-chip host the log shows MFU and tokens a second from the first interval on; no result is claimed yet.
"""

import ml_collections

from kimi_jax import config as c


def get_config() -> ml_collections.ConfigDict:
    """Settings; the paths of tokenizer and sources are to be filled in."""
    return c.thaw(
        c.TrainConfig(
            workdir="runs/small",
            steps=5_000,
            model=c.preset("small"),
            data=c.DataConfig(
                sources={
                    "text": c.SourceConfig(kind="array_record"),
                    "vision": c.SourceConfig(kind="array_record", vision=True),
                },
                sequence_length=2048,
                num_packs=32,
                rows_per_pack=4,
                vision_bins=((1024, 5),),
                vision_ratio=((0.0, 0.1),),
            ),
            optimizer=c.OptimizerConfig(peak_lr=1e-3, final_lr=1e-4),
        )
    )
