"""Parameter metadata: what a parameter says about itself where it is created.

One Linen box carries the logical axis names (for `kimi_jax.sharding`), the optimizer group (for `kimi_jax.optim`) and
the names of the parts of the model that the parameter belongs to, by which it can be frozen (`freeze`).
It survives `nn.scan` (which adds a leading "layers" axis) and `nn.remat`. `unbox` strips it, `metadata` keeps only it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from kimi_jax.config import ConfigError, nearest

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
    """Weights that do not learn: INT4 words and their scales, and what `freeze` names."""


Group = Muon | AdamW | RouterBias | Frozen


@dataclass(frozen=True)
class ParamInfo:
    """Logical axis names, one for each axis of the array, the optimizer group, and names of parts of the model."""

    axes: tuple[str, ...]
    group: Group
    parts: tuple[str, ...] = ()


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
        info = dataclasses.replace(self.info, axes=(LAYERS, *self.info.axes), group=group)
        return dataclasses.replace(self, info=info)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Param:
        """Called by `nn.scan`: the view of one layer inside the loop."""
        group = self.info.group
        if isinstance(group, Muon):
            group = Muon(group.batch - 1, group.rows)
        return dataclasses.replace(self, info=dataclasses.replace(self.info, axes=self.info.axes[1:], group=group))


def declare(init: Callable, axes: tuple[str, ...], group: Group, parts: tuple[str, ...] = ()) -> Callable:
    """An initializer for `self.param` whose result carries `axes`, `group` and the names of `parts` it belongs to.

    Example: `kernel = self.param("kernel", declare(normal(0.02), ("embed", "mlp"), Muon()), (D, F), jnp.float32)`.
    Raises ValueError if the number of axes is not the number of dimensions.
    """

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Param:
        if len(axes) != len(shape):
            raise ValueError(f"{len(axes)} axis names {axes} for shape {shape}")
        return Param(init(key, shape, dtype), ParamInfo(axes, group, parts))

    return boxed


def unbox(tree: Any) -> Any:
    """The plain nested dict of arrays: the one layout that is trained, saved and converted."""
    return nn.meta.unbox(tree)


def metadata(tree: Any) -> Any:
    """The same tree with a `ParamInfo` in place of every array. Works on `jax.eval_shape` results."""
    return jax.tree.map(lambda p: p.info, tree, is_leaf=lambda x: isinstance(x, Param))


# ------------------------------------------------------------------------------------------------------------- freezing


def freeze(infos: Any, names: Collection[str]) -> Any:
    """The infos with the group `Frozen` wherever a parameter belongs to a part of one of these names.

    Raises ConfigError for a name that no parameter has, or if nothing is left to learn.
    """
    known = {part for info in jax.tree.leaves(infos) for part in info.parts}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"config.freeze: no parameters are called {name!r}{nearest(name, known)}; there are: "
                f"{', '.join(sorted(known))}"
            )

    def each(info: ParamInfo) -> ParamInfo:
        return dataclasses.replace(info, group=Frozen()) if set(info.parts) & set(names) else info

    out = jax.tree.map(each, infos)
    if not jax.tree.leaves(learned(out, out)):
        raise ConfigError(f"config.freeze = {tuple(names)} leaves nothing to learn")
    return out


def learned(tree: Any, infos: Any) -> Any:
    """A tree in the shape of `infos` with None, which jax takes for nothing, in place of what is `Frozen`."""
    return jax.tree.map(lambda info, leaf: None if isinstance(info.group, Frozen) else leaf, infos, tree)


def frozen(tree: Any, infos: Any) -> Any:
    """The rest: None in place of what learns."""
    return jax.tree.map(lambda info, leaf: leaf if isinstance(info.group, Frozen) else None, infos, tree)


def join(one: Any, other: Any) -> Any:
    """One tree of two in which each leaf is None in one of them (`learned` and `frozen`)."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def learns(infos: Any, part: str) -> bool:
    """Whether any parameter of this part learns."""
    return any(part in info.parts for info in jax.tree.leaves(learned(infos, infos)))


def leaf_name(path: tuple) -> str:
    """The name of a leaf by its path in the tree, such as "moe_layers.mlp.router.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
