"""What training carries from step to step, and how each array of it is cut over the mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.nn import kimi
from kimi_jax.nn.param import metadata, unbox


@struct.dataclass
class TrainState:
    """All that a step changes. There is no random state: nothing in pre-training draws numbers after initialisation.

    The same tree also holds shapes or shardings in place of the arrays.
    """

    step: Any  # int32 []: batches seen
    skipped: Any  # int32 []: of these, batches whose update was left out because it was not finite
    skipped_in_row: Any  # int32 []: how many of them just now, without a good one between
    params: Any  # plain nested dict, the checkpoint's layout
    opt_state: Any


def create(model: ModelConfig, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state; the same key gives the same weights on any mesh."""
    params = unbox(kimi.init_params(model, key))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, skipped=zero, skipped_in_row=zero, params=params, opt_state=tx.init(params))


def infos(model: ModelConfig) -> Any:
    """Tree of ParamInfo, in the shape of the parameters; no array is made."""
    return metadata(jax.eval_shape(lambda: kimi.init_params(model, jax.random.key(0))))


def shardings(model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState of NamedSharding: moments are cut like their parameter, counters are on every device."""
    shapes = jax.eval_shape(lambda: create(model, tx, jax.random.key(0)))
    params = sharding.param_shardings(infos(model), shapes.params, mesh)
    whole = sharding.replicated(mesh)
    opt_state = _moment_shardings(shapes.opt_state, shapes.params, params, whole)
    return TrainState(step=whole, skipped=whole, skipped_in_row=whole, params=params, opt_state=opt_state)


def _moment_shardings(opt_state: Any, shapes: Any, cuts: Any, whole: NamedSharding) -> Any:
    """Gives each leaf of `opt_state` the sharding of the parameter whose whole path ends its own path.

    `optax.tree_map_params` would do the same, but only for transformations that do not look at the parameters.
    Raises ShardingError for an array that belongs to no parameter.
    """
    known = {
        path: (leaf.shape, cut)
        for (path, leaf), cut in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(cuts), strict=True)
    }

    def find(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if not leaf.shape:
            return whole
        for start in range(len(path)):
            shape, cut = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return cut
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise sharding.ShardingError(f"optimizer array {name} {leaf.shape} belongs to no parameter")

    return jax.tree_util.tree_map_with_path(find, opt_state)


def abstract(model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state on this mesh: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: create(model, tx, jax.random.key(0)))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(model, tx, mesh)
    )


def abstract_params(model: ModelConfig, mesh: Mesh) -> Any:
    """The same of the weights alone."""
    boxed = jax.eval_shape(lambda: kimi.init_params(model, jax.random.key(0)))
    shapes = unbox(boxed)
    cuts = sharding.param_shardings(metadata(boxed), shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, cuts)
