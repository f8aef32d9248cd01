"""The plan on paper: bytes, FLOPs and traffic of a layout in closed form, without compiling anything.

It says what the layout has to cost whatever the compiler does, so that a compiled plan can be judged, and it ranks
layouts before any of them is compiled. A device and a step, T tokens, forward, its recomputation and backward:

    compute    model FLOPs (train.flops) times 4/3 if layers are recomputed, at the chip's peak
    gather     bfloat16 weights to every device of their axes, forward and again for the recomputation, a microbatch
    reduce     gradients back in `memory.reduce_dtype`, a microbatch; replicas add theirs up once a step
    tokens     k copies of each token, to their expert and back (bfloat16), forward, recomputed and backward:
               6 T k D values a layer
    tensor     the block edges of all tokens that a tensor axis shares, summed twice a layer and pass in `reduce_dtype`
    muon       every matrix is gathered somewhere and sharded again, once a step
    memory     parameters and optimizer state read and written, gradients written and read, and each gathered weight
               written once and read once

The least memory is the state, the float32 gradients, the input of every layer of one microbatch and one layer's
gathered weights; what the compiler needs beside that is for it to say. The step takes the longest of these if they
overlap perfectly, compute and traffic together if they do not overlap at all.

Bytes are those that one device sends; time is as in `plan.network`: weights go over all links, tokens and block
edges over those between the neighbours that share them.

T tokens a device   k choices a token   D width
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kimi_jax import sharding
from kimi_jax.config import ModelConfig, TrainConfig
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import AdamW, Muon, ParamInfo, metadata, unbox
from kimi_jax.plan.chips import Topology
from kimi_jax.plan.program import scaled
from kimi_jax.plan.report import full_counts
from kimi_jax.train import flops

EXPERT_AXES, ALL_AXES = ("fsdp", "context"), ("fsdp", "expert", "context")  # what a weight is gathered along


def estimate(config: TrainConfig, topology: Topology, rows: int | None = None) -> dict[str, Any]:
    """Seconds and bytes of one step, a device. rows: sequences a device, None for the global batch of `config`.

    Raises ConfigError if the mesh does not make the pod or the batch does not divide.
    """
    sizes = sharding.mesh_sizes(config.mesh, topology.devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    config = scaled(config, mesh, rows)
    chip, model = topology.chip, config.model
    counts = full_counts(config, topology.devices)
    weights, experts, matrices, state_bytes = _sizes(config, mesh)
    inner = math.prod(sizes[a] for a in ALL_AXES)
    per_expert = math.prod(sizes[a] for a in EXPERT_AXES)
    held = weights / sizes["tensor"], experts / (sizes["tensor"] * sizes["expert"])
    times = config.memory.microbatches
    passes = 2 if model.remat else 1
    summed = jnp.dtype(config.memory.reduce_dtype).itemsize
    gathered = sum(2.0 * h * (n - 1) / n for h, n in zip(held, (inner, per_expert), strict=True))
    sent = {
        "gather": passes * times * gathered,
        "reduce": times * summed / 2 * gathered,
        "tokens": _token_bytes(config, counts["tokens"], sizes["expert"]),
        "tensor": _tensor_bytes(config, counts["tokens"], sizes["tensor"], summed),
        "muon": 2 * 2.0 * matrices / (inner * sizes["tensor"]) * (inner - 1) / inner,
    }
    across = 2.0 * summed * (weights + experts) / (inner * sizes["tensor"]) * (1 - 1 / sizes["replica"])
    links = _links(topology, topology.devices)
    seconds = {
        "compute": flops.train_flops(model, counts) / chip.flops * (4 / 3 if model.remat else 1),
        "hbm": (2 * state_bytes + 4 * times * 2 * sum(held) + 2 * 4 * sum(held) / inner) / chip.hbm_rate,
        "ici": (sent["gather"] + sent["reduce"] + sent["muon"]) / links
        + sent["tokens"] * _detour(topology, sizes["expert"])
        + sent["tensor"] / _links(topology, sizes["tensor"]),
        "dcn": across / (chip.dcn_rate if topology.slices > 1 else links),
    }
    saved = counts["tokens"] / times * model.hidden_size * 2 * model.num_hidden_layers
    least = state_bytes + 4 * sum(held) / inner + saved + 2 * sum(held) / model.num_hidden_layers
    regime = max(seconds, key=lambda name: seconds[name])
    low, high = max(seconds.values()), seconds["compute"] + seconds["ici"] + seconds["dcn"]
    slow, fast = (chip.devices_per_chip * counts["tokens"] / t for t in (high, low))
    ideal = flops.train_flops(model, counts) / chip.flops
    return {
        "mesh": sizes,
        "rows": config.data.num_packs * config.data.rows_per_pack / topology.devices,
        "microbatches": config.memory.microbatches,
        "tokens": counts["tokens"],
        "parameters": weights + experts,
        "state_bytes": state_bytes,
        "least_bytes": least,
        "available": chip.hbm,
        "model_flops": flops.train_flops(model, counts),
        "wire_bytes": {**sent, "replicas": across},
        "seconds": seconds,
        "regime": regime,
        "tokens_per_second_per_chip": [slow, fast],
        "mfu": [ideal / high, ideal / low],
        "chip_hours_per_trillion_tokens": [1e12 / slow / 3600, 1e12 / fast / 3600],
    }


@functools.cache
def _parameters(model: ModelConfig) -> list[tuple[ParamInfo, jax.ShapeDtypeStruct]]:
    """What each parameter says of itself, and its shape. Kept: tracing the model is slow and a search asks often."""
    boxed = abstract_params(model)
    return list(zip(jax.tree.leaves(metadata(boxed)), jax.tree.leaves(unbox(boxed)), strict=True))


def _sizes(config: TrainConfig, mesh: AbstractMesh) -> tuple[int, int, int, float]:
    """(values outside and inside routed experts, values of Muon matrices, bytes of state a device)."""
    layout = sharding.layout(mesh)
    narrow = jnp.dtype(config.optimizer.momentum_dtype).itemsize
    weights = experts = matrices = 0
    held = 0.0
    for info, x in _parameters(config.model):
        size = math.prod(x.shape)
        if "expert" in info.axes:
            experts += size
        else:
            weights += size
        parts = [part if isinstance(part, tuple) else (part,) for part in layout.spec(info.axes, x.shape) if part]
        parts_of = math.prod(mesh.shape[axis] for part in parts for axis in part)
        moments = {Muon: narrow, AdamW: narrow + 4}.get(type(info.group), 0)
        held += size / parts_of * (x.dtype.itemsize + moments)
        matrices += size if isinstance(info.group, Muon) else 0
    return weights, experts, matrices, held


def _token_bytes(config: TrainConfig, tokens: float, expert_parallel: int) -> float:
    model = config.model
    if model.moe is None:
        return 0.0
    once = tokens * model.moe.num_experts_per_tok * model.hidden_size * 2.0 * model.num_moe_layers
    return (6 if model.remat else 4) * once * (1 - 1 / expert_parallel)


def _tensor_bytes(config: TrainConfig, tokens: float, parts: int, itemsize: int) -> float:
    """Two sums over the tensor axis a layer and pass, of the block edges of all tokens that its devices share."""
    edges = tokens * parts * config.model.hidden_size * float(itemsize) * config.model.num_hidden_layers
    return (3 if config.model.remat else 2) * 2 * 2 * edges * (parts - 1) / parts


def _links(topology: Topology, devices: int) -> float:
    """Bytes a second that one of so many neighbours sends over all links between them.

    They fill whole sides of the torus, the last side first; a whole side is a ring of two links a chip, a part of one
    or a side that does not wrap is a line of one.
    """
    chip, left, links = topology.chip, devices // topology.chip.devices_per_chip, 0
    for side in reversed(topology.shape):
        if left > 1 and side > 1:
            links += 2 if left >= side and side % chip.wraps_at == 0 else 1
            left = -(-left // side)
    return max(links, 1) * chip.link_rate / chip.devices_per_chip


def _detour(topology: Topology, devices: int) -> float:
    """Seconds a byte of an all-to-all between so many neighbours: through the middle of the longest side they take."""
    side = max(topology.shape)
    longest = min(side, max(1, devices // topology.chip.devices_per_chip))
    ring = longest == side and side % topology.chip.wraps_at == 0
    return longest / ((8 if ring else 4) * topology.chip.link_rate)


def table(estimate_: dict[str, Any]) -> str:
    """The estimate as text."""
    e, gb, gib = estimate_, 1e9, 2**30
    mesh = " x ".join(f"{name} {size}" for name, size in e["mesh"].items() if size > 1) or "one device"
    sent = ", ".join(f"{name} {size / gb:,.0f}" for name, size in e["wire_bytes"].items() if size) or "none"
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in e["seconds"].items())
    (slow, fast), (dear, cheap) = e["tokens_per_second_per_chip"], e["chip_hours_per_trillion_tokens"]
    memory = f"state {e['state_bytes'] / gib:.1f}, in all at least {e['least_bytes'] / gib:.1f}"
    return "\n".join([
        f"on paper: {mesh}; {e['parameters']:,} parameters; {memory} of {e['available'] / gib:.1f} GiB a device",
        f"  {e['rows']:g} rows ({e['tokens']:,.0f} tokens) in {e['microbatches']} microbatches, "
        f"{e['model_flops'] / 1e12:,.0f} model TFLOP a device; GB sent: {sent}",
        f"  seconds: {seconds}; regime {e['regime']}",
        f"  {slow:,.0f} (nothing overlapped) to {fast:,.0f} tokens/s/chip, MFU {e['mfu'][0]:.1%} to {e['mfu'][1]:.1%}, "
        f"{dear:,.0f} to {cheap:,.0f} chip-hours a trillion tokens",
    ])  # fmt: skip
