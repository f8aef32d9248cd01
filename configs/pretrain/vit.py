"""ViT training, the first of three stages: the language model is frozen, the caption loss is the only one.

Run:     python -m kimi_jax.data tokenizer --config=configs/pretrain/joint.py     (once, for all stages)
         python -m kimi_jax.train --config=configs/pretrain/vit.py:language       (the demo's stand-in for Moonlight)
         python -m kimi_jax.train --config=configs/pretrain/vit.py:tower          tower and projector learn
         python -m kimi_jax.train --config=configs/pretrain/vit.py:projector      the projector alone learns
         ... and then configs/pretrain/joint.py and configs/pretrain/long.py, each from the checkpoint of the last one
Pod:     --config=configs/pretrain/vit.py:tower@v5p-1024 and :projector@v5p-1024, topologies as in configs/pods.py.
Source:  Kimi K2.5 report (arXiv 2602.02276), Table 3 and the section on ViT training: captions of images and video as
         the only target, 1 T tokens of 4,096 against Moonlight-16B-A3B; then, very shortly, the projector alone against
         the large language model. Whether the projector learns in the first part is not said. Reading: it does, as in
         the alignment of Kimi-VL (arXiv 2504.07491), because a tower is not seen through random weights.
Expect:  no result of ours on a pod; at demo scale docs/training.md says what was run.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c

PODS = runpy.run_path(str(Path(__file__).parents[1] / "pods.py"))
LENGTH = 256  # tokens of a row at demo scale, 4,096 on a pod
PHASES = {"language": 400, "tower": 200, "projector": 30}  # steps at demo scale
POD_TOKENS = {"tower": 1e12, "projector": 5e9}  # the second is "very short" in the report: a guess
CAPTION_BINS = ((1024, 8), (4096, 10))  # of four rows of captions with 0.6 of vision tokens, a quarter to spare


def plain(model: c.ModelConfig, length: int) -> c.ModelConfig:
    """The model before its context is extended: rotary positions as they are, up to `length`."""
    return dataclasses.replace(model, rope_scaling=None, max_position_embeddings=length)


def demo_source(path: str, vision: bool = False, weight: float = 1.0) -> c.SourceConfig:
    """A set of the demo."""
    return c.SourceConfig(kind="demo", path=path, vision=vision, weight=weight)


TEXT = {"wiki": demo_source("wiki", weight=8.0), "factbook": demo_source("factbook"), "python": demo_source("python")}
CAPTIONS = {"scenes": demo_source("scenes", True, 2.0), "scene_clips": demo_source("scene_clips", True)}


def steps_of(tokens: float, data: c.DataConfig) -> int:
    """Steps that take so many tokens."""
    return round(tokens / (data.num_packs * data.rows_per_pack * data.sequence_length))


def get_config(name: str = "tower") -> ml_collections.ConfigDict:
    """Settings of PHASE at demo scale, or of PHASE@TOPOLOGY. Raises ConfigError for a name that does not work."""
    phase, _, topology = name.partition("@")
    known = POD_TOKENS if topology else PHASES
    if phase not in known or (topology and topology not in PODS["TOPOLOGIES"]):
        raise c.ConfigError(
            f"{name}: write one of {', '.join(PHASES)}, or {' or '.join(POD_TOKENS)} with @TOPOLOGY, one of "
            f"{', '.join(PODS['TOPOLOGIES'])}"
        )
    return c.thaw(_pod(phase, topology) if topology else _demo(phase))


def _demo(phase: str) -> c.TrainConfig:
    model = plain(c.preset("demo"), LENGTH)
    data = c.DataConfig(
        sources=CAPTIONS, tokenizer="runs/pretrain/tokenizer.json", sequence_length=LENGTH, num_packs=1,
        rows_per_pack=4, vision_bins=((144, 24),), buffer_size=128,
    )  # fmt: skip
    start, freeze = {
        "language": (c.InitFromConfig(), ()),
        "tower": (c.InitFromConfig(language="runs/pretrain/language"), ("language",)),
        "projector": (c.InitFromConfig(path="runs/pretrain/tower"), ("language", "vision")),
    }[phase]
    if phase == "language":
        model = dataclasses.replace(model, vision=None)
        data = dataclasses.replace(data, sources=TEXT, rows_per_pack=12, vision_ratio=((0.0, 0.0),))
    return c.TrainConfig(
        workdir=f"runs/pretrain/{phase}",
        steps=PHASES[phase],
        model=model,
        data=data,
        init_from=start,
        freeze=freeze,
        optimizer=c.OptimizerConfig(
            peak_lr=8e-3, final_lr=8e-4, warmup_steps=min(25, PHASES[phase] // 4), decay_fraction=0.3
        ),
        checkpoint=c.CheckpointConfig(interval=100, keep=1),
    )


def _pod(phase: str, topology: str) -> c.TrainConfig:
    """The tower against Moonlight's decoder; the projector, fresh, against that of K2."""
    config = c.freeze(PODS["get_config"](f"{'kimi_vl_a3b' if phase == 'tower' else 'kimi_k2_5'}@{topology}"))
    if phase == "tower":
        small = dataclasses.replace(c.preset("moonlight_16b_a3b"), vision=c.VisionConfig(), remat=True)
        model = dataclasses.replace(plain(small, 4096), remat_policy=config.model.remat_policy)
        start = c.InitFromConfig(language="weights/moonlight_16b_a3b", vision="weights/moonvit")
    else:
        model = plain(config.model, 4096)
        start = c.InitFromConfig(language="weights/kimi_k2", vision="runs/pretrain-tower")
    data = dataclasses.replace(
        config.data,
        sources={
            "captions": c.SourceConfig(kind="array_record", path="data/captions", vision=True, weight=2.0),
            "videos": c.SourceConfig(kind="array_record", path="data/captioned_videos", vision=True),
        },
        sequence_length=4096,
        vision_bins=CAPTION_BINS,
    )
    steps = steps_of(POD_TOKENS[phase], data)
    return dataclasses.replace(
        config,
        workdir=f"runs/pretrain-{phase}",
        steps=steps,
        model=model,
        data=data,
        init_from=start,
        freeze=("language",) if phase == "tower" else ("language", "vision"),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(500, steps // 5)),
    )
