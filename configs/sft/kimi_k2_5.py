"""SFT of Kimi K2.5 on a pod: all weights, or LoRA beside the released INT4 experts.

Run:     python -m kimi_jax.train --config=configs/sft/kimi_k2_5.py:full@v5p-1024 --config.workdir=gs://BUCKET/sft \
             --config.init_from.path=DIR --config.data.tokenizer=DIR/tiktoken.model \
             --config.data.sources.chat.path=gs://BUCKET/train-*.parquet
         python -m kimi_jax.train --config=configs/sft/kimi_k2_5.py:lora@v5p-128 --config.lora.base=DIR ...
Names:   full or lora, and a topology of configs/pods.py. In zero-vision SFT (docs/paper_notes.md section 4) the
         conversations are text: --config.data.sources.chat.vision=False --config.data.vision_ratio="((0.0, 0.0),)".
Expect:  no result of ours; rates are those of the Kimi-VL report (arXiv 2504.07491), because that of K2.5 gives none.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c
from kimi_jax import sharding

PODS = runpy.run_path(str(Path(__file__).parents[1] / "pods.py"))
# Bytes of the frozen model of a LoRA run: INT4 experts with their scales, all else in bfloat16.
INT4_BYTES = 6e11
LORA_EXPERT = 16  # devices that share the experts: the fewest that hold them with room for activations


def get_config(name: str = "full@v5p-1024") -> ml_collections.ConfigDict:
    """Settings of `full@TOPOLOGY` or `lora@TOPOLOGY`. Raises ConfigError for a name or topology that does not work."""
    kind, _, topology = name.partition("@")
    if kind not in ("full", "lora") or topology not in PODS["TOPOLOGIES"]:
        raise c.ConfigError(
            f"{name}: write full@TOPOLOGY or lora@TOPOLOGY, with one of {', '.join(PODS['TOPOLOGIES'])}"
        )
    if kind == "full":
        config = c.freeze(PODS["get_config"](f"kimi_k2_5@{topology}"))
        config = dataclasses.replace(config, init_from=c.InitFromConfig(path="weights/kimi_k2_5"))
    else:
        config = _lora(topology)
    devices = PODS["TOPOLOGIES"][topology][0]
    data = dataclasses.replace(
        config.data,
        sources={"chat": c.SourceConfig(kind="chat", path="data/train-*.parquet", vision=True)},
        sequence_length=16384,
        rows_per_pack=1,
        num_packs=devices,
        vision_bins=((1024, 2), (4096, 3)),
    )
    return c.thaw(
        dataclasses.replace(
            config,
            workdir=f"runs/sft_kimi_k2_5-{kind}-{topology}",
            steps=2000,
            data=data,
            optimizer=c.OptimizerConfig(
                peak_lr=2e-4 if kind == "lora" else 2e-5, final_lr=2e-6, warmup_steps=50, decay_fraction=0.95
            ),
            checkpoint=c.CheckpointConfig(interval=200),
        )
    )


def _lora(topology: str) -> c.TrainConfig:
    devices, memory = PODS["TOPOLOGIES"][topology]
    if devices * memory * 1e9 < 2 * INT4_BYTES:
        raise c.ConfigError(f"{INT4_BYTES / 1e12:.1f} TB of frozen weights are more than half of {topology}")
    base = c.freeze(runpy.run_path(str(Path(__file__).parents[1] / "kimi_k2_5.py"))["get_config"]())
    mesh = c.MeshConfig(expert=LORA_EXPERT, fsdp=devices // LORA_EXPERT)
    sharding.mesh_sizes(mesh, devices)
    lora = c.LoRAConfig(base="weights/kimi_k2_5", experts="int4", rank=16)
    return dataclasses.replace(base, mesh=mesh, lora=lora)
