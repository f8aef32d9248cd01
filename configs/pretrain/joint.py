"""Joint pre-training, the second of three stages: text and vision together, at a constant vision ratio from step 0.

Run:     python -m kimi_jax.train --config=configs/pretrain/joint.py     (after configs/pretrain/vit.py:projector)
Pod:     --config=configs/pretrain/joint.py:v5p-1024, topologies as in configs/pods.py.
Source:  Kimi K2.5 report (arXiv 2602.02276), Table 3: 15 T tokens at 4,096 from a near-end checkpoint of Kimi K2, tower
         and language model learn; Table 1: a tenth of all tokens is vision (`configs/kimi_k2_5.py` says more). K2 has
         positions up to 4,096 without interpolation here.
Expect:  no result of ours on a pod; at demo scale docs/training.md says what was run.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c

VIT = runpy.run_path(str(Path(__file__).with_name("vit.py")))
RATIO = 0.1
POD_TOKENS = 15e12
STEPS = 500


def _sources() -> dict[str, c.SourceConfig]:
    """Text, captions, questions about images and video, and facts to be found again within a row of this stage."""
    source, length = VIT["demo_source"], VIT["LENGTH"]
    return {
        **VIT["TEXT"],
        **VIT["CAPTIONS"],
        "needle_text": source(f"needle_text_{length}", weight=4.0),
        "needle_video": source(f"needle_video_{length}", True),
        "easyvqa": source("easyvqa", True, 2.0),
        "digits": source("digits", True),
    }


def get_config(topology: str = "demo") -> ml_collections.ConfigDict:
    """Settings at demo scale, or on a topology. Raises ConfigError for a topology that does not work."""
    if topology == "demo":
        return c.thaw(_demo())
    config = c.freeze(VIT["PODS"]["get_config"](f"kimi_k2_5@{topology}"))
    return c.thaw(
        dataclasses.replace(
            config,
            workdir="runs/pretrain-joint",
            steps=VIT["steps_of"](POD_TOKENS, config.data),
            model=VIT["plain"](config.model, config.data.sequence_length),
            init_from=c.InitFromConfig(path="runs/pretrain-projector"),
        )
    )


def _demo() -> c.TrainConfig:
    config = c.freeze(VIT["get_config"]("projector"))
    data = dataclasses.replace(
        config.data, sources=_sources(), rows_per_pack=12, vision_bins=((144, 14),), vision_ratio=((0.0, RATIO),)
    )
    return dataclasses.replace(
        config,
        workdir="runs/pretrain/joint",
        steps=STEPS,
        data=data,
        init_from=c.InitFromConfig(path="runs/pretrain/projector"),
        freeze=(),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=25),
        eval=c.EvalConfig(tasks=("all",), final_limit=200),
    )
