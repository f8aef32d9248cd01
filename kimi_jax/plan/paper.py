"""The plan on paper: bytes, FLOPs and traffic of a layout in closed form, without compiling anything.

It says what the layout has to cost whatever the compiler does, so that a compiled plan can be judged, and it ranks
layouts before any of them is compiled. A device and a step, T tokens, forward, its recomputation and backward:

    compute    model FLOPs (train.flops) times 4/3 if layers are recomputed, at the chip's peak
    gather     bfloat16 weights to every device of their axes, forward and again for the recomputation, a microbatch
    reduce     float32 gradients back, a microbatch; replicas add theirs up once a step
    tokens     k choices of each token travel to their expert and back (bfloat16), forward, recomputed and backward:
               6 T k D values a layer
    muon       every matrix is made whole somewhere and cut again, once a step
    memory     parameters and optimizer state read and written, gradients written and read, and each gathered weight
               written once and read once

Bytes are those that one device sends; time is as in `plan.network` for an axis that lies along whole sides of the
torus. T tokens a device   k choices a token   D width
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from kimi_jax import sharding
from kimi_jax.config import TrainConfig
from kimi_jax.nn.param import Muon
from kimi_jax.plan.chips import Topology
from kimi_jax.plan.program import scaled
from kimi_jax.plan.report import full_counts
from kimi_jax.train import flops
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import make_optimizer

EXPERT_AXES, ALL_AXES = ("fsdp", "context"), ("fsdp", "expert", "context")  # what a weight is gathered along


def estimate(config: TrainConfig, topology: Topology, rows: int | None = None) -> dict[str, Any]:
    """Seconds and bytes of one step, a device. rows: sequences a device, None for the global batch of `config`.

    Raises ConfigError if the mesh does not make the pod or the batch does not divide.
    """
    sizes = sharding.mesh_sizes(config.mesh, topology.devices)
    config = scaled(config, AbstractMesh(tuple(sizes.values()), tuple(sizes)), rows)
    chip, model = topology.chip, config.model
    counts = full_counts(config, topology.devices)
    weights, experts, matrices, state_bytes = _sizes(config, sizes)
    inner = math.prod(sizes[a] for a in ALL_AXES)
    per_expert = math.prod(sizes[a] for a in EXPERT_AXES)
    held = weights / sizes["tensor"], experts / (sizes["tensor"] * sizes["expert"])
    times = config.memory.microbatches
    passes = 2 if model.remat else 1
    gathered = sum(2.0 * h * (n - 1) / n for h, n in zip(held, (inner, per_expert), strict=True))
    sent = {
        "gather": passes * times * gathered,
        "reduce": times * 2 * gathered,
        "tokens": _token_bytes(config, counts["tokens"], sizes["expert"]),
        "muon": 2 * 2.0 * matrices / topology.devices * sizes["replica"],
    }
    across = 2 * 4.0 * (weights + experts) / (inner * sizes["tensor"]) * (1 - 1 / sizes["replica"])
    links = 2 * chip.torus_axes * chip.link_rate
    seconds = {
        "compute": flops.train_flops(model, counts) / chip.flops * (4 / 3 if model.remat else 1),
        "hbm": (2 * state_bytes + 4 * times * 2 * sum(held) + 2 * 4 * sum(held) / inner) / chip.hbm_rate,
        "ici": (sent["gather"] + sent["reduce"] + sent["muon"]) / links
        + sent["tokens"] * _detour(topology, sizes["expert"]),
        "dcn": across / (chip.dcn_rate if topology.slices > 1 else links),
    }
    regime = max(seconds, key=lambda name: seconds[name])
    rate = chip.devices_per_chip * counts["tokens"] / max(seconds.values())
    return {
        "mesh": sizes,
        "rows": config.data.num_groups * config.data.rows_per_group / topology.devices,
        "microbatches": config.memory.microbatches,
        "tokens": counts["tokens"],
        "parameters": weights + experts,
        "state_bytes": state_bytes,
        "model_flops": flops.train_flops(model, counts),
        "wire_bytes": {**sent, "replicas": across},
        "seconds": seconds,
        "regime": regime,
        "tokens_per_second_per_chip": rate,
        "mfu": flops.train_flops(model, counts) / chip.flops / max(seconds.values()),
        "chip_hours_per_trillion_tokens": 1e12 / rate / 3600,
    }


def _sizes(config: TrainConfig, sizes: dict[str, int]) -> tuple[int, int, int, int]:
    """(values outside and inside routed experts, values of Muon matrices, bytes of state a device)."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    state = state_lib.abstract(config.model, make_optimizer(config, "tpu"), mesh)  # type: ignore[arg-type]
    infos = jax.tree.leaves(state_lib.infos(config.model))
    weights = experts = matrices = 0
    for info, x in zip(infos, jax.tree.leaves(state.params), strict=True):
        if "expert" in info.axes:
            experts += math.prod(x.shape)
        else:
            weights += math.prod(x.shape)
        matrices += math.prod(x.shape) if isinstance(info.group, Muon) else 0
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return weights, experts, matrices, held


def _token_bytes(config: TrainConfig, tokens: float, expert_parallel: int) -> float:
    model = config.model
    if model.moe is None:
        return 0.0
    once = tokens * model.moe.num_experts_per_tok * model.hidden_size * 2.0 * model.num_moe_layers
    return (6 if model.remat else 4) * once * (1 - 1 / expert_parallel)


def _detour(topology: Topology, devices: int) -> float:
    """Seconds a byte of an all-to-all between so many neighbours: through the middle of the longest side they take."""
    side = max(topology.shape)
    longest = min(side, max(1, devices // topology.chip.devices_per_chip))
    ring = longest == side and side % topology.chip.wraps_at == 0
    return longest / ((8 if ring else 4) * topology.chip.link_rate)


def table(estimate_: dict[str, Any]) -> str:
    """The estimate as text."""
    e, gb = estimate_, 1e9
    mesh = " x ".join(f"{name} {size}" for name, size in e["mesh"].items() if size > 1) or "one device"
    sent = ", ".join(f"{name} {size / gb:,.0f}" for name, size in e["wire_bytes"].items() if size)
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in e["seconds"].items())
    return "\n".join([
        f"on paper: {mesh}; {e['parameters']:,} parameters, state {e['state_bytes'] / 2**30:.1f} GiB a device",
        f"  {e['tokens']:,.0f} tokens, {e['model_flops'] / 1e12:,.0f} model TFLOP a device; GB sent: {sent or 'none'}",
        f"  seconds: {seconds}; regime {e['regime']}",
        f"  at best {e['tokens_per_second_per_chip']:,.0f} tokens/s/chip, MFU {e['mfu']:.1%}, "
        f"{e['chip_hours_per_trillion_tokens']:,.0f} chip-hours a trillion tokens",
    ])  # fmt: skip
