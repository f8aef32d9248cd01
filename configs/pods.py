"""A model on a pod: the layout that fits it, chosen by model and topology; every choice can be overridden.

Run:     python -m kimi_jax.train --config=configs/pods.py:kimi_k2_5@v5p-1024 --config.workdir=gs://BUCKET/run ...
         ... --config.mesh.expert=8 --config.memory.microbatches=2   (the rest as in configs/MODEL.py)
Names:   MODEL is a file of this folder; topologies are below. A v5p-1024 has 512 chips (it is named by cores), a
         v6e-256 has 256, Ironwood shows two devices a chip.
Expect:  on paper, 12 bytes a parameter (weights, momentum and gradients in float32) fill at most three quarters of the
         memory; if they do not fit, an error names what does. `python -m kimi_jax.plan` says more.
"""

import dataclasses
import difflib
import functools
import runpy
from pathlib import Path

import ml_collections

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.nn.kimi import count_params

# name: (devices, GB of memory a device)
TOPOLOGIES = {
    "cpu-8": (8, 2),
    **{f"v5p-{cores}": (cores // 2, 95) for cores in (128, 256, 512, 1024, 2048, 4096)},
    "v6e-256": (256, 31),
    **{f"ironwood-{chips}": (2 * chips, 96) for chips in (128, 256, 512)},
}
# Devices that share the experts. Fewer: more weights to gather over `fsdp`; more: more devices to send a token to.
EXPERT = {"kimi_k2_5": 64, "kimi_vl_a3b": 8, "moonlight_16b_a3b": 8, "small": 2, "demo": 2}
BYTES_A_PARAMETER = 12
# Where these take more than so much of the memory, an expert's device has room for half as many arriving rows, and the
# usual load takes two rounds; elsewhere each layer keeps one array more, so that less is recomputed
TIGHT, HALF_ROOM = 0.4, 0.64
ROWS_A_DEVICE = 4
# a quarter more patches than the vision ratio asks of four rows: 6,554 (K2.5, a tenth), 26,214 (Kimi-VL, a fifth)
BINS_OF_FOUR_ROWS = {"kimi_k2_5": ((4096, 2),), "kimi_vl_a3b": ((1024, 4), (4096, 7))}


def get_config(name: str = "kimi_k2_5@v5p-1024") -> ml_collections.ConfigDict:
    """Settings of `MODEL@TOPOLOGY`. Raises ConfigError for an unknown name, or a model that does not fit."""
    model_name, _, topology = name.partition("@")
    for word, known, what in ((model_name, EXPERT, "model"), (topology, TOPOLOGIES, "topology")):
        if word not in known:
            near = difflib.get_close_matches(word, known, 1, 0.0)[0]
            raise c.ConfigError(f"{name}: no {what} {word!r} (did you mean {near!r}?); there are {', '.join(known)}")
    config = c.freeze(runpy.run_path(str(Path(__file__).with_name(f"{model_name}.py")))["get_config"]())
    devices = fitting(config.model, topology)
    mesh = c.MeshConfig(expert=EXPERT[model_name], fsdp=devices // EXPERT[model_name])
    sharding.mesh_sizes(mesh, devices)
    data = dataclasses.replace(config.data, num_packs=devices)
    if model_name not in ("demo", "small"):
        bins = BINS_OF_FOUR_ROWS.get(model_name, config.data.vision_bins)
        data = dataclasses.replace(data, rows_per_pack=ROWS_A_DEVICE, vision_bins=bins)
    memory, model = config.memory, config.model
    if _parameters(config.model) * BYTES_A_PARAMETER > TIGHT * devices * TOPOLOGIES[topology][1] * 1e9:
        memory = dataclasses.replace(memory, expert_capacity_factor=HALF_ROOM)
    elif model.remat:
        model = dataclasses.replace(model, remat_policy="attention_sum")
    workdir = f"runs/{model_name}-{topology}"
    return c.thaw(dataclasses.replace(config, model=model, mesh=mesh, data=data, memory=memory, workdir=workdir))


def fitting(model: c.ModelConfig, topology: str) -> int:
    """Devices of the topology. Raises ConfigError if weights, momentum and gradients alone are too much for them."""

    def room(name: str) -> float:
        devices, memory = TOPOLOGIES[name]
        return 0.75 * devices * memory * 1e9

    need = _parameters(model) * BYTES_A_PARAMETER
    if need > room(topology):
        enough = [name for name in TOPOLOGIES if need <= room(name)]
        raise c.ConfigError(
            f"{need / 1e12:.1f} TB of weights, momentum and gradients do not fit into three quarters of {topology} "
            f"({room(topology) / 1e12:.1f} TB); take {' or '.join(enough)}"
        )
    return TOPOLOGIES[topology][0]


@functools.cache
def _parameters(model: c.ModelConfig) -> int:
    return count_params(model)["total"]
