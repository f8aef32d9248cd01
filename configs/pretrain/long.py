"""Long-context mid-training, the last of three stages: rows become longer step by step, positions are interpolated.

Run:     python -m kimi_jax.train --config=configs/pretrain/long.py:2x     (from configs/pretrain/joint.py)
         python -m kimi_jax.train --config=configs/pretrain/long.py:4x     (from the run of 2x)
         python -m kimi_jax.eval --workdir=runs/pretrain/long-4x --tasks=needle_text_1024,needle_video_1024
Pod:     --config=configs/pretrain/long.py:8x@v5p-1024, then :64x@v5p-1024: 32,768 and 262,144 tokens.
Names:   a factor over the length of joint training; YaRN's factor is the same one, so that 64x is the released setting.
Source:  Kimi K2.5 report (arXiv 2602.02276), Table 3: 500 B tokens at 32,768, then 200 B at 262,144; "sequentially
         extending context length via YaRN interpolation"; long text and long video beside the rest. How much of each is
         not said. Reading: a quarter of the text tokens is long, as in Kimi-VL (arXiv 2504.07491); the rest is replay
         of the joint stage.
Expect:  no result of ours on a pod; at demo scale docs/training.md says what was run.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c

JOINT = runpy.run_path(str(Path(__file__).with_name("joint.py")))
VIT = JOINT["VIT"]
# factor: (the run that comes before, steps) at demo scale; (the run that comes before, tokens) on a pod
DEMO = {2: ("joint", 100), 4: ("long-2x", 100)}
POD = {8: ("joint", 500e9), 64: ("long-8x", 200e9)}
TOKENS_A_DEVICE = 16384  # of a row that is longer the rest lies on other devices: context parallelism
EXPERT = 64  # devices that share the experts, unless those that share a row leave fewer
# draws of each source, for a vision ratio and a share of long text as above
LONG = {"long_documents": 1.0, "needle_text": 1.0}
RATIO = 0.06


def yarn(model: c.ModelConfig, factor: int, length: int) -> c.ModelConfig:
    """The model with rows of `factor` times `length` tokens, its rotary positions interpolated by the factor."""
    scaling = c.YarnConfig(factor=float(factor), original_max_position_embeddings=length)
    return dataclasses.replace(model, rope_scaling=scaling, max_position_embeddings=factor * length)


def get_config(name: str = "2x") -> ml_collections.ConfigDict:
    """Settings of FACTORx at demo scale, or of FACTORx@TOPOLOGY. Raises ConfigError for a name that does not work."""
    factor, _, topology = name.partition("@")
    known = {f"{each}x": each for each in (POD if topology else DEMO)}
    if factor not in known:
        raise c.ConfigError(f"{name}: write 2x or 4x, or 8x@TOPOLOGY or 64x@TOPOLOGY (topologies: configs/pods.py)")
    return c.thaw(_pod(known[factor], topology) if topology else _demo(known[factor]))


def _demo(factor: int) -> c.TrainConfig:
    config = c.freeze(JOINT["get_config"]())
    before, steps = DEMO[factor]
    length = factor * VIT["LENGTH"]
    source = VIT["demo_source"]
    sources = {
        **config.data.sources,
        "long_documents": source("long_documents", weight=LONG["long_documents"]),
        "needle_text": source(f"needle_text_{length}", weight=LONG["needle_text"]),
        "needle_video": source(f"needle_video_{length}", True),
    }
    data = dataclasses.replace(
        config.data, sources=sources, sequence_length=length, rows_per_pack=config.data.rows_per_pack // factor,
        vision_ratio=((0.0, RATIO),),
    )  # fmt: skip
    return dataclasses.replace(
        config,
        workdir=f"runs/pretrain/long-{factor}x",
        steps=steps,
        model=yarn(config.model, factor, VIT["LENGTH"]),
        data=data,
        init_from=c.InitFromConfig(path=f"runs/pretrain/{before}"),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=8e-4, final_lr=8e-5, warmup_steps=10),
        eval=c.EvalConfig(tasks=(f"needle_text_{length}", f"needle_video_{length}", "wiki_bpb"), final_limit=200),
    )


def _pod(factor: int, topology: str) -> c.TrainConfig:
    config = c.freeze(JOINT["get_config"](topology))
    before, tokens = POD[factor]
    length = factor * config.data.sequence_length
    devices, context = VIT["PODS"]["TOPOLOGIES"][topology][0], max(1, length // TOKENS_A_DEVICE)
    expert = min(EXPERT, devices // context)
    kind = c.SourceConfig(kind="array_record")
    sources = {
        **{name: dataclasses.replace(source, weight=3.0) for name, source in config.data.sources.items()},
        "long_text": dataclasses.replace(kind, path="data/long_text"),
        "long_video": dataclasses.replace(kind, path="data/long_video", vision=True),
    }
    data = dataclasses.replace(
        config.data, sources=sources, sequence_length=length, rows_per_pack=1, num_packs=devices // context,
        vision_bins=((4096, length // 8192),),
    )  # fmt: skip
    return dataclasses.replace(
        config,
        workdir=f"runs/pretrain-long-{factor}x",
        steps=VIT["steps_of"](tokens, data),
        model=yarn(config.model, factor, 4096),
        data=data,
        mesh=c.MeshConfig(expert=expert, context=context, fsdp=devices // context // expert),
        init_from=c.InitFromConfig(path=f"runs/pretrain-{before}"),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=2e-5, final_lr=2e-6),
    )
