"""The whole sharding story: the mesh, one table from logical axis names to mesh axes, and what follows from it.

Parameters name their axes where they are created (`nn.param.declare`); this file decides which mesh axis holds which
name. Fully sharded data parallelism for now (shared/docs/design.md section 3): every parameter is cut once along
`fsdp`, and the same axis cuts the batch by groups, so that rows and the vision bins beside them share a device. New
kinds of parallelism are new axes of the mesh and new entries of the table, nothing else.

G  groups of the batch, a multiple of the devices
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.nn.param import ParamInfo

# Logical name -> mesh axis. The order is a preference: of the axes of one array that want the same mesh axis, the first
# entry whose size divides gets it. None: never cut.
RULES: dict[str, str | None] = {
    "batch": "fsdp",
    "embed": "fsdp",
    "vision_embed": "fsdp",
    "mlp": "fsdp",
    "expert_mlp": "fsdp",
    "vision_mlp": "fsdp",
    "merged": "fsdp",
    "q_lora": "fsdp",
    "kv_lora": "fsdp",
    "vocab": "fsdp",
    "expert": "fsdp",
    "heads": "fsdp",
    "vision_heads": None,
    "head_dim": None,
    "vision_head_dim": None,
    "router": None,
    "norm": None,
    "pixels": None,
    "qkv": None,
    "grid": None,
    "layers": None,
    "lora": None,
}
ACTIVATIONS = ("batch",)  # names that no parameter has


class ShardingError(ValueError):
    """A logical name without a rule, a rule without a name or mesh axis, or a size that does not divide."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh, one axis for each field of `config`; a field of -1 takes all devices that are left.

    Raises ConfigError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh: only one axis may be -1, not {' and '.join(free)}")
    if free:
        taken = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"config.mesh: {sizes} does not make {len(devices)} devices; set one axis to -1")
    axes = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def spec(info: ParamInfo, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How one parameter is cut: each mesh axis at most once, and only where it divides evenly.

    Raises ShardingError for a logical name that is not in `RULES` or a rule whose mesh axis does not exist.
    """
    out: list[str | None] = [None] * len(shape)
    for name in sorted(set(info.axes), key=_preference):
        axis = RULES[name]
        if axis is None or axis in out:
            continue
        if axis not in mesh.shape:
            raise ShardingError(f"RULES[{name!r}] is {axis!r}, but the mesh has only {tuple(mesh.shape)}")
        place = info.axes.index(name)
        if shape[place] % mesh.shape[axis] == 0:
            out[place] = axis
    return PartitionSpec(*out)


def _preference(name: str) -> int:
    if name not in RULES:
        raise ShardingError(f"no rule for the logical axis {name!r}; add it to kimi_jax.sharding.RULES")
    return list(RULES).index(name)


def param_shardings(infos: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter. `infos`: tree of ParamInfo; `shapes`: same tree, leaves with `.shape`."""
    return jax.tree.map(lambda info, x: NamedSharding(mesh, spec(info, x.shape, mesh)), infos, shapes)


def unused_rules(*infos: Any) -> list[str]:
    """Names of `RULES` that no parameter of these trees has; must be empty over all presets together (a test)."""
    used = {name for tree in infos for info in jax.tree.leaves(tree) for name in info.axes}
    return [name for name in RULES if name not in used and name not in ACTIVATIONS]


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 of every array of a batch is cut by whole groups."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_groups(num_groups: int, mesh: Mesh) -> None:
    """Raises ShardingError unless every device gets the same number of whole groups."""
    parts = mesh.shape[RULES["batch"]]
    if num_groups % parts:
        raise ShardingError(
            f"config.data.num_groups={num_groups} cannot be cut over {parts} devices; "
            f"make it a multiple of {parts}, or use fewer devices"
        )


def local_groups(num_groups: int, mesh: Mesh) -> list[int]:
    """The groups of a batch that the devices of this host hold, ascending: what its part of the data stream makes."""
    cut = batch_sharding(mesh).addressable_devices_indices_map((num_groups,))
    return sorted({group for (part,) in cut.values() for group in range(num_groups)[part]})


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The host's rows of a packed batch as global device arrays, axis 0 cut by groups."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
