"""One plan: a configuration and a pod in, memory, time and traffic out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from kimi_jax.infer.forward import KEYS
from kimi_jax.plan import decode as decode_lib
from kimi_jax.plan import hlo, paper, program, report
from kimi_jax.plan.chips import Topology
from kimi_jax.plan.cost import price
from kimi_jax.plan.network import Network
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import make_optimizer

MICROBATCHES = (1, 2, 4)  # that a search tries


def make(
    config: TrainConfig,
    topology: Topology,
    rows: int | None = None,
    rounds: Sequence[int] = (1, 2),
    devices: Sequence[jax.Device] | None = None,
) -> tuple[dict[str, Any], str]:
    """The plan as plain data (`report.table` prints it) and the text of the compiled program ("" if it did not fit).

    rows: sequences a device, None for the global batch of `config` spread over the devices; rounds: how often a loop
    of unknown length is taken to run, one prediction each, beside what the mean load takes ("usual_rounds").
    Raises PlanError, ConfigError, ShardingError.
    """
    devices = program.devices_of(topology) if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, devices)
    config = program.scaled(config, mesh, rows)
    plan = _description(config, topology, mesh)
    try:
        compiled = program.compile_step(config, mesh)
    except program.DoesNotFit as error:
        return {**plan, "memory": report.memory_failed(error)}, ""
    plan["memory"] = report.memory(compiled, topology)
    parsed, network = hlo.parse(compiled.text), Network.of(topology, mesh)
    usual = plan["usual_rounds"]
    costs = {count: price(parsed, topology.chip, network, count) for count in sorted({*rounds, usual})}
    if not costs[usual].dynamic_loops:  # then all rounds are the same
        costs = {usual: costs[usual]}
    plan["rounds"] = {str(count): report.timing(config, topology, cost) for count, cost in costs.items()}
    plan["collectives_per_loop"] = report.collectives_per_loop(costs[usual])
    return plan, compiled.text


def decode(
    model: ModelConfig,
    mesh: MeshConfig,
    topology: Topology,
    slots: int,
    length: int,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[dict[str, Any], str]:
    """The same of one decoding step: `slots` requests of up to `length` tokens each (`report.decode_table` prints it).

    Raises PlanError, ConfigError, ShardingError.
    """
    devices = program.devices_of(topology) if devices is None else devices
    placed, model = sharding.make_mesh(mesh, devices), decode_lib.served(model)
    plan = {
        "topology": topology.name, "mesh": dict(placed.shape), "slots": slots, "length": length, "dtype": model.dtype,
        "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"),
        "weights_bytes": program.bytes_a_device(decode_lib.abstract_weights(model, placed)),
        "floor_seconds": decode_lib.floor_bytes(model, placed, slots, length) / topology.chip.hbm_rate,
    }  # fmt: skip
    try:
        compiled = program.compile_lowered(lambda: decode_lib.lower(model, placed, slots, length))
    except program.DoesNotFit as error:
        return {**plan, "memory": report.memory_failed(error)}, ""
    blocks = -(-length // KEYS)  # the loops of unknown length walk over the pages
    cost = price(hlo.parse(compiled.text), topology.chip, Network.of(topology, placed), blocks)
    return {
        **plan, "memory": report.memory(compiled, topology), "step": report.decoding(cost, slots),
    }, compiled.text  # fmt: skip


def _description(config: TrainConfig, topology: Topology, mesh: Mesh) -> dict[str, Any]:
    tx = make_optimizer(config, mesh)
    state = state_lib.abstract(config.model, tx, mesh)
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "devices": topology.devices,
        "mesh": dict(mesh.shape),
        "rows": config.data.num_packs * config.data.rows_per_pack / topology.devices,
        "packs": config.data.num_packs,
        "rows_per_pack": config.data.rows_per_pack,
        "microbatches": config.memory.microbatches,
        "usual_rounds": math.ceil(1 / config.memory.expert_capacity_factor),
        "sequence_length": config.data.sequence_length,
        "vision_bins": config.data.vision_bins,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "params": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "params_bytes": program.bytes_a_device(state.params),
        "state_bytes": program.bytes_a_device(state),
    }


# --------------------------------------------------------------------------------------------------------------- search


def layouts(config: TrainConfig, devices: int) -> list[MeshConfig]:
    """The meshes worth trying: every way to split the devices over the axes of `MeshConfig` in powers of two.

    `replica` stays as the configuration has it (it is the number of slices), `expert` divides the experts, `tensor`
    divides the heads and is at most 8, `context` stays 1 (it is for long sequences); `fsdp` takes the rest.
    """
    limits = {"expert": config.model.moe.n_routed_experts if config.model.moe else 1,
              "tensor": math.gcd(8, config.model.num_attention_heads)}  # fmt: skip
    names = [f.name for f in dataclasses.fields(MeshConfig) if f.name in limits]
    found = [dataclasses.replace(config.mesh, fsdp=-1)]
    for name in names:
        sizes = [2**k for k in range(devices.bit_length()) if limits[name] % 2**k == 0]
        found = [dataclasses.replace(mesh, **{name: size}) for mesh in found for size in sizes]
    out = []
    for mesh in found:
        taken = math.prod(v for k, v in dataclasses.asdict(mesh).items() if k != "fsdp" and v > 0)
        if devices % taken == 0:
            out.append(dataclasses.replace(mesh, fsdp=devices // taken))
    return out


def search(
    config: TrainConfig, topology: Topology, rows: Sequence[int], compiled: int = 3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(plans of the best layouts, the fastest that fits first; every layout on paper, the fastest first).

    Layouts, sequences a device and microbatches are ranked on paper (`plan.paper`); of those that need less than
    the chip has the first `compiled` are compiled and ranked again by predicted tokens/s/chip if nothing overlapped.
    """
    devices = program.devices_of(topology) if compiled else []
    candidates = []
    for mesh in layouts(config, topology.devices):
        for count, parts in itertools.product(rows, MICROBATCHES):
            memory = dataclasses.replace(config.memory, microbatches=parts)
            candidate = dataclasses.replace(config, mesh=mesh, memory=memory)
            with contextlib.suppress(ConfigError):  # so many microbatches do not divide these rows
                candidates.append((candidate, count, paper.estimate(candidate, topology, count)))
    candidates = [c for c in candidates if c[2]["least_bytes"] < topology.chip.hbm]
    candidates.sort(key=lambda c: -c[2]["tokens_per_second_per_chip"][0])
    plans = [make(candidate, topology, count, (1,), devices)[0] for candidate, count, _ in candidates[:compiled]]
    return sorted(plans, key=_rank), [estimate for _, _, estimate in candidates]


def _rank(plan: dict[str, Any]) -> tuple[bool, float]:
    if not plan["memory"]["fits"]:
        return True, -plan["memory"]["spare"]
    return False, -plan["rounds"][str(plan["usual_rounds"])]["tokens_per_second_per_chip"][0]
