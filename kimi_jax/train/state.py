"""What training carries from step to step, and how each array of it is sharded over the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from kimi_jax import sharding
from kimi_jax.config import LoRAConfig, ModelConfig
from kimi_jax.nn import kimi, lora
from kimi_jax.nn.param import freeze, leaf_name, metadata, unbox


@struct.dataclass
class TrainState:
    """All that a step changes. There is no random state: nothing in pre-training draws numbers after initialisation.

    The same tree also holds shapes or shardings in place of the arrays.
    """

    step: Any  # int32 []: batches seen
    skipped: Any  # int32 []: of these, batches that left no trace: their update was left out, or undone by a rollback
    skipped_in_row: Any  # int32 []: how many of them just now, without a good one between
    loss_mean: Any  # float32 []: running mean of the loss over the updates made
    loss_square: Any  # float32 []: and of its square
    params: Any  # plain nested dict, the checkpoint's layout: the weights, or of `config.lora` the adapters that learn
    opt_state: Any  # nothing in it for what `config.freeze` names
    frozen: Any = None  # with `config.lora` the weights of its base, which no checkpoint of the run holds


SCALARS = {
    "step": jnp.int32,
    "skipped": jnp.int32,
    "skipped_in_row": jnp.int32,
    "loss_mean": jnp.float32,
    "loss_square": jnp.float32,
}


def create(
    model: ModelConfig, tx: optax.GradientTransformation, key: jax.Array, options: LoRAConfig | None = None
) -> TrainState:
    """A fresh state, without what is frozen; the same key gives the same weights on any mesh."""
    params = unbox(_init(model, key, options))
    zeros = {name: jnp.zeros((), dtype) for name, dtype in SCALARS.items()}
    return TrainState(**zeros, params=params, opt_state=tx.init(params))


def _init(model: ModelConfig, key: jax.Array, options: LoRAConfig | None) -> Any:
    return kimi.init_params(model, key) if options is None else lora.init(model, options, key)


@functools.cache
def _boxed(model: ModelConfig, options: LoRAConfig | None) -> Any:
    """Shapes of what learns in their boxes. Kept, because tracing the model is slow and many ask."""
    return jax.eval_shape(lambda: _init(model, jax.random.key(0), options))


def infos(model: ModelConfig, options: LoRAConfig | None = None, frozen: tuple[str, ...] = ()) -> Any:
    """Tree of ParamInfo like `TrainState.params`: of the weights, or with `options` of adapters. No array is made.

    frozen: names of parts whose parameters get the group `Frozen`. Raises ConfigError as `nn.param.freeze`.
    """
    return freeze(metadata(_boxed(model, options)), frozen)


def shardings(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, options: LoRAConfig | None = None
) -> TrainState:
    """A TrainState of NamedSharding: moments are sharded like their parameter, counters are on every device."""
    return jax.tree.map(lambda x: x.sharding, abstract(model, tx, mesh, options))


def abstract(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, options: LoRAConfig | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of a state on this mesh: what a checkpoint is restored into."""
    params = abstract_params(model, mesh, options)
    frozen = None if options is None else abstract_params(model, mesh)
    whole = sharding.replicated(mesh)
    opt_state = jax.eval_shape(tx.init, params)
    placements = _moment_shardings(opt_state, params, whole)
    scalars = {name: jax.ShapeDtypeStruct((), dtype, sharding=whole) for name, dtype in SCALARS.items()}
    return TrainState(**scalars, params=params, opt_state=jax.tree.map(_place, opt_state, placements), frozen=frozen)


def abstract_params(model: ModelConfig, mesh: Mesh, options: LoRAConfig | None = None) -> Any:
    """The same of the weights alone, or with `options` of the adapters."""
    shapes = unbox(_boxed(model, options))
    return jax.tree.map(_place, shapes, sharding.param_shardings(infos(model, options), shapes, mesh))


def _place(x: Any, placement: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)


def _moment_shardings(opt_state: Any, params: Any, whole: NamedSharding) -> Any:
    """Gives each array of `opt_state` the sharding of the parameter whose whole path ends its own path.

    `optax.tree_map_params` would do the same, but only for transformations that do not look at the parameters.
    Raises ShardingError for an array that belongs to no parameter.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))

    def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if not leaf.shape:
            return whole
        for start in range(len(path)):
            param = known.get(path[start:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        name = leaf_name(path)
        raise sharding.ShardingError(f"optimizer array {name} {leaf.shape} belongs to no parameter")

    return jax.tree_util.tree_map_with_path(find, opt_state)
