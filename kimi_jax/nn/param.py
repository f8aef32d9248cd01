"""Parameter metadata: what a parameter says about itself where it is created.

One Linen box carries the logical axis names (for `kimi_jax.sharding`) and the optimizer group (for `kimi_jax.optim`).
It survives `nn.scan` (which adds a leading "layers" axis) and `nn.remat`. `unbox` strips it, `metadata` keeps only it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

LAYERS = "layers"  # the logical axis that a scan adds
ADAPTERS = "lora"  # the collection of adapters (nn.lora), a tree like "params" where there are some


@dataclass(frozen=True)
class Muon:
    """A stack of matrices: `batch` leading axes, then `rows` axes that form the input, the rest form the output."""

    batch: int = 0
    rows: int = 1


@dataclass(frozen=True)
class AdamW:
    """Embeddings, output head, norms, biases, tables."""


@dataclass(frozen=True)
class RouterBias:
    """The selection bias of a router: no gradient, moved by `kimi_jax.optim.router_bias`."""


@dataclass(frozen=True)
class Frozen:
    """Weights that are never trained: INT4 words and their scales."""


Group = Muon | AdamW | RouterBias | Frozen


@dataclass(frozen=True)
class ParamInfo:
    """Logical axis names, one for each axis of the array, and the optimizer group."""

    axes: tuple[str, ...]
    group: Group


@struct.dataclass
class Param(nn.meta.AxisMetadata):
    """The box. `value` is the array."""

    value: Any
    info: ParamInfo = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The array alone."""
        return self.value

    def replace_boxed(self, val: Any) -> Param:
        """The same box around another array."""
        return dataclasses.replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Param:
        """Called by `nn.scan`: the stacked parameter has one more leading axis."""
        if index != 0:
            raise ValueError(f"parameters are stacked on axis 0, not {index}")
        group = self.info.group
        if isinstance(group, Muon):
            group = Muon(group.batch + 1, group.rows)
        return dataclasses.replace(self, info=ParamInfo((LAYERS, *self.info.axes), group))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Param:
        """Called by `nn.scan`: the view of one layer inside the loop."""
        group = self.info.group
        if isinstance(group, Muon):
            group = Muon(group.batch - 1, group.rows)
        return dataclasses.replace(self, info=ParamInfo(self.info.axes[1:], group))


def declare(init: Callable, axes: tuple[str, ...], group: Group) -> Callable:
    """An initializer for `self.param` whose result carries `axes` and `group`.

    Example: `kernel = self.param("kernel", declare(normal(0.02), ("embed", "mlp"), Muon()), (D, F), jnp.float32)`.
    Raises ValueError if the number of axes is not the number of dimensions.
    """

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Param:
        if len(axes) != len(shape):
            raise ValueError(f"{len(axes)} axis names {axes} for shape {shape}")
        return Param(init(key, shape, dtype), ParamInfo(axes, group))

    return boxed


def unbox(tree: Any) -> Any:
    """The plain nested dict of arrays: the one layout that is trained, saved and converted."""
    return nn.meta.unbox(tree)


def metadata(tree: Any) -> Any:
    """The same tree with a `ParamInfo` in place of every array. Works on `jax.eval_shape` results."""
    return jax.tree.map(lambda p: p.info, tree, is_leaf=lambda x: isinstance(x, Param))
