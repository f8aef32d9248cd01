"""The whole sharding story: the mesh, one table from logical axis names to mesh axes, and what follows from it.

Source: docs/architecture.md sections 3 and 6. Parameters name their axes where they are created (`nn.param.declare`),
the model names those of activations at the edges of blocks; this file decides which mesh axes hold which name
(`nn.layout.Layout` applies it). Five axes:

    replica   copies of all weights, the only axis across slices: one all-reduce of the gradients a step on the slow net
    fsdp      shards rows of the batch and every weight
    expert    shards rows of the batch too; the routed experts live on it and tokens are sent to them
    context   shards the tokens of a row (long sequences); keys' latents are gathered
    tensor    shards heads and inner widths; activations at block edges are whole

Rows and the vision bins beside them are sharded by whole packs, so no feature crosses devices.

G  packs of the batch, a multiple of the devices along its axes
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.nn.layout import Layout, ShardingError
from kimi_jax.nn.param import ParamInfo

AXES = ("replica", "fsdp", "expert", "context", "tensor")  # outermost first: neighbours on the chip net come last
FSDP_AXES = ("fsdp", "expert", "context")  # what a weight may be sharded by just to need less room

# Logical name -> mesh axes. The order is a preference: of the axes of one array that want the same mesh axis, the first
# entry whose size divides gets it. (): never sharded.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp", "expert"),
    "bins": ("replica", "fsdp", "expert", "context", "tensor"),  # `nn.vision_stage`
    "sequence": ("context",),
    "expert": ("expert",),
    # a matrix is sharded along both sides: in 512 along one, parts would be no whole tiles, and the TPU compiler sums
    # matrices that are zero elsewhere instead of gathering such parts, which sends twice as much
    "embed": ("fsdp", "context"),
    "heads": ("tensor", "expert"),
    "vision_embed": FSDP_AXES,
    "mlp": ("tensor", "expert", "fsdp", "context"),
    "expert_mlp": ("tensor", *FSDP_AXES),
    "vision_mlp": ("tensor", *FSDP_AXES),
    "merged": FSDP_AXES,
    "q_lora": ("expert", "fsdp", "context"),
    "kv_lora": ("expert", "fsdp", "context"),
    "vocab": ("tensor", "expert", "fsdp", "context"),
    "vision_heads": (),
    "head_dim": (),
    "vision_head_dim": (),
    "router": (),
    "norm": (),
    "pixels": (),
    "qkv": (),
    "grid": (),
    "vision_position": (),  # else the compiler would rather gather what reads the table, for the images of all chips
    "layers": (),
    "lora": (),
}
ACTIVATIONS = ("batch", "bins", "sequence")  # names that no parameter has


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, in the order of `AXES`; a field of -1 takes all devices that are left.

    Raises ConfigError if the sizes do not multiply to the number of devices.
    """
    given = dataclasses.asdict(config)
    sizes = {axis: given[axis] for axis in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh: only one axis may be -1, not {' and '.join(free)}")
    if free:
        sizes[free[0]] = num_devices // math.prod(size for size in sizes.values() if size != -1)
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(f"config.mesh: {sizes} does not make {num_devices} devices; set one axis to -1")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh. Of several TPU slices the replicas lie across the slices, everything else within one.

    Raises ConfigError if the sizes do not multiply to the number of devices, or replicas cannot be distributed to
    slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    types = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        # an axis of 16 on an 8 x 8 x 8 torus takes one side and a part of another, which `jax.make_mesh` refuses
        placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(placed, tuple(sizes), axis_types=types)
    if sizes["replica"] % slices:
        raise ConfigError(
            f"config.mesh.replica={sizes['replica']} cannot be distributed over {slices} slices; "
            f"make it a multiple of {slices}"
        )
    inside = (sizes["replica"] // slices, *list(sizes.values())[1:])
    across = (slices, *(1 for _ in inside[1:]))
    placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=types)


def serving_mesh() -> Mesh:
    """All devices along the expert axis, which shards every weight as fsdp does; but no expert is gathered."""
    return make_mesh(MeshConfig(fsdp=1, expert=-1))


def layout(mesh: Mesh | AbstractMesh, **settings: Any) -> Layout:
    """The rules applied to this mesh; settings: the other fields of `Layout`."""
    return Layout(mesh, tuple(RULES.items()), **settings)


def spec(info: ParamInfo, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How one parameter is sharded, see `Layout.spec`. Raises ShardingError as it does."""
    return layout(mesh).spec(info.axes, shape)


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
    """Axis 0 of every array of a batch is sharded by whole packs."""
    return NamedSharding(mesh, PartitionSpec(layout(mesh).axes("batch")))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts the mesh divides a batch."""
    return layout(mesh).parts("batch")


def check_packs(num_packs: int, mesh: Mesh | AbstractMesh, microbatches: int = 1) -> None:
    """Raises ShardingError unless every device gets the same number of whole packs, in every microbatch."""
    parts = batch_parts(mesh)
    if num_packs % (parts * microbatches):
        times = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise ShardingError(
            f"config.data.num_packs={num_packs} cannot be sharded over {parts} devices{times}; "
            f"make it a multiple of {parts * microbatches}, or use fewer devices"
        )


def local_packs(num_packs: int, mesh: Mesh) -> list[int]:
    """The packs of a batch that the devices of this host hold, ascending: what its part of the data stream makes."""
    placement = batch_sharding(mesh).addressable_devices_indices_map((num_packs,))
    return sorted({pack for (part,) in placement.values() for pack in range(num_packs)[part]})


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The host's rows of a packed batch as global device arrays, axis 0 sharded by packs."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
