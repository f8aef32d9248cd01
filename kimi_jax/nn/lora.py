"""LoRA: low-rank adapters beside frozen weights, INT4 experts included.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): W + alpha / r * A B, A
random, B zero. Adapters are a tree of their own in the collection "lora", shaped like the parameters they adapt, so the
base is the very tree that was loaded and nothing of it is copied or given a gradient:

    adapters = unbox(lora.init(config, options, key))
    variables = {"params": params, "lora": lora.scaled(adapters, options)}
    nll, aux = KimiK25(config).apply(variables, batch, method="token_nll")    # differentiate in `adapters`
    params = lora.merge(params, adapters, options)                            # one model again, for export

`train_step` is that as a function. Which axes of a weight form its input is what it was declared with (`nn.param`).

r rank   C inputs   O outputs   L layers   E experts
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.config import ConfigError, ModelConfig, nearest
from kimi_jax.nn.kimi import KimiK25, abstract_params
from kimi_jax.nn.param import ADAPTERS, AdamW, Muon, Param, ParamInfo

# What can be adapted: every matrix below these places of the parameter tree.
TARGETS = {
    "attention": (("dense_layers", "attention"), ("moe_layers", "attention")),
    "mlp": (("dense_layers", "mlp"),),
    "shared": (("moe_layers", "mlp", "shared"),),
    "experts": (("moe_layers", "mlp", "experts"),),
    "vision": (("vision", "blocks"),),
    "projector": (("projector",),),
}


@dataclass(frozen=True)
class LoRA:
    """Which weights learn, and how. Raises ConfigError for a target that is not in TARGETS."""

    rank: int = 16
    alpha: float = 32.0  # the adapters' product counts alpha / rank
    targets: tuple[str, ...] = ("attention", "mlp", "shared")

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise ConfigError(
                    f"no LoRA target {target!r}{nearest(target, TARGETS)}; there are: {', '.join(TARGETS)}"
                )
        if self.rank < 1 or not self.targets:
            raise ConfigError(f"LoRA needs a rank of at least 1 and some target, not {self.rank} and {self.targets}")

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied with."""
        return self.alpha / self.rank


# ------------------------------------------------------------------------------------------------------------- adapters


def init(config: ModelConfig, options: LoRA, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters, float32, boxed with axes and optimizer group: A [..., C, r] normal with variance 1 / C, B zero.

    INT4 experts get the same adapters as float ones. Works under jit and eval_shape. Raises ConfigError if the model
    has none of the targets.
    """
    floats = dataclasses.replace(config.moe, int4_group_size=None) if config.moe else None
    boxed = abstract_params(dataclasses.replace(config, moe=floats))
    places = [place for target in options.targets for place in TARGETS[target] if _get(boxed, place) is not None]
    if not places:
        raise ConfigError(f"this model has none of {', '.join(options.targets)} to adapt")
    out: dict[str, Any] = {}
    for place in places:
        found, treedef = jax.tree.flatten(_get(boxed, place), is_leaf=lambda x: isinstance(x, Param))
        keys = jax.random.split(jax.random.fold_in(key, len(out)), len(found))
        pairs = [_pair(k, box, options.rank) for k, box in zip(keys, found, strict=True)]
        node = out
        for name in place[:-1]:
            node = node.setdefault(name, {})
        node[place[-1]] = _without_none(jax.tree.unflatten(treedef, pairs))
        key = jax.random.fold_in(key, 1)
    return out


def _get(tree: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        tree = tree.get(name) if tree else None
    return tree


def _pair(key: jax.Array, box: Param, rank: int) -> dict[str, Param] | None:
    """The adapters of one weight, None if it is no matrix."""
    group, axes, shape = box.info.group, box.info.axes, box.value.shape
    if not isinstance(group, Muon):
        return None
    stack, middle = group.batch, group.batch + group.rows
    std = 1 / math.sqrt(math.prod(shape[stack:middle]))
    a = nn.initializers.normal(std)(key, (*shape[:middle], rank), jnp.float32)
    b = jnp.zeros((*shape[:stack], rank, *shape[middle:]), jnp.float32)
    return {
        "a": Param(a, ParamInfo((*axes[:middle], "lora"), AdamW())),
        "b": Param(b, ParamInfo((*axes[:stack], "lora", *axes[middle:]), AdamW())),
    }


def _without_none(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    kept = {key: _without_none(value) for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def scaled(adapters: dict[str, Any], options: LoRA) -> dict[str, Any]:
    """The collection "lora" for `apply`: every b times alpha / rank."""
    return _map_pairs(lambda pair: {"a": pair["a"], "b": options.scale * pair["b"]}, adapters)


def _is_pair(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"a", "b"}


def _map_pairs(fn: Callable, adapters: dict[str, Any], *rest: Any) -> Any:
    """fn(pair, *the same place of the other trees) for every pair of adapters."""
    return jax.tree.map(fn, adapters, *rest, is_leaf=_is_pair)


# ---------------------------------------------------------------------------------------------------------------- merge


def merge(params: dict[str, Any], adapters: dict[str, Any], options: LoRA) -> dict[str, Any]:
    """The parameters with the adapters' products added (in float32, rounded once to the dtype of the weight).

    What has no adapter is the same array as before, INT4 experts too. Raises ValueError for adapters of INT4 experts:
    the sum is not INT4; load the base with experts="float" to merge them.
    """
    return _merge(params, adapters, options, "")


def _merge(params: Any, adapters: Any, options: LoRA, where: str) -> Any:
    if _is_pair(adapters):
        if isinstance(params, dict):
            raise ValueError(f"{where[1:]} is INT4 and cannot take its adapters in; load the base as floats to merge")
        return _sum(params, adapters["a"], options.scale * adapters["b"])
    return {
        key: _merge(value, adapters[key], options, f"{where}.{key}") if key in adapters else value
        for key, value in params.items()
    }


@jax.jit
def _sum(weight: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """weight + a b, over the stack axes that all three begin with; the rank is a's last axis."""
    stack = a.ndim + b.ndim - weight.ndim - 2
    lead = weight.shape[:stack]
    low = jnp.matmul(
        a.reshape(*lead, -1, a.shape[-1]), b.reshape(*lead, a.shape[-1], -1), precision=lax.Precision.HIGHEST
    )
    return (weight.astype(jnp.float32) + low.reshape(weight.shape)).astype(weight.dtype)


# ---------------------------------------------------------------------------------------------------------------- train


def loss(
    adapters: dict[str, Any],
    params: dict[str, Any],
    batch: dict[str, Any],
    config: ModelConfig,
    options: LoRA,
    num_groups: int = 1,
) -> Float[Array, ""]:
    """Mean next-token loss of a packed batch of `num_groups` groups, weighted by its `loss_weights`."""
    variables = {"params": params, ADAPTERS: scaled(adapters, options)}
    nll, _ = KimiK25(config).apply(variables, batch, num_groups, method="token_nll")
    weights = batch["loss_weights"]
    return (nll * weights).sum() / jnp.maximum(weights.sum(), 1e-6)


def train_step(
    config: ModelConfig, options: LoRA, tx: optax.GradientTransformation, num_groups: int = 1
) -> Callable[[Any, Any, Any, Any], tuple[Any, Any, Float[Array, ""]]]:
    """A jitted (adapters, tx's state, params, batch) -> (adapters, tx's state, loss) that gives up the first two.

    `params` are only read: they have no gradient, no moments, and keep their bytes. QK-clip and the router's balance
    change weights of the base and are off.
    """

    def step(adapters: Any, state: Any, params: Any, batch: Any) -> tuple[Any, Any, Array]:
        value, grads = jax.value_and_grad(loss)(adapters, params, batch, config, options, num_groups)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))
