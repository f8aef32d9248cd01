"""LoRA: low-rank adapters beside frozen weights, INT4 experts included.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685): W + alpha / r * A B, A
random, B zero. Adapters are a tree of their own in the collection "lora", shaped like the parameters they adapt, so the
base is the very tree that was loaded and nothing of it is copied or given a gradient:

    adapters = unbox(lora.init(config, options, key))
    variables = lora.variables(adapters, params, options)
    nll, aux = KimiK25(config).apply(variables, batch, method="token_nll")    # differentiate in `adapters`
    params = lora.merge(params, adapters, options)                            # one model again, for export

`config.lora` of a run does that (`kimi_jax.train`). Which axes of a weight form its input is what it was declared with
(`nn.param`).

r rank   C inputs   O outputs   L layers   E experts
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.config import ConfigError, LoRAConfig, ModelConfig, nearest
from kimi_jax.nn.kimi import abstract_params
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


# ------------------------------------------------------------------------------------------------------------- adapters


def init(config: ModelConfig, options: LoRAConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters, float32, boxed with axes and optimizer group: A [..., C, r] normal with variance 1 / C, B zero.

    INT4 experts get the same adapters as float ones. Works under jit and eval_shape. Raises ConfigError for a target
    that is not in TARGETS, a rank below 1, or if the model has none of the targets.
    """
    for target in options.targets:
        if target not in TARGETS:
            raise ConfigError(f"no LoRA target {target!r}{nearest(target, TARGETS)}; there are: {', '.join(TARGETS)}")
    if options.rank < 1 or not options.targets:
        raise ConfigError(f"LoRA needs a rank of at least 1 and some target, not {options.rank} and {options.targets}")
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
        "a": Param(a, ParamInfo((*axes[:middle], "lora"), AdamW(), box.info.parts)),
        "b": Param(b, ParamInfo((*axes[:stack], "lora", *axes[middle:]), AdamW(), box.info.parts)),
    }


def _without_none(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    kept = {key: _without_none(value) for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def scaled(adapters: dict[str, Any], options: LoRAConfig) -> dict[str, Any]:
    """The collection "lora" for `apply`: every b times alpha / rank."""
    return _map_pairs(lambda pair: {"a": pair["a"], "b": options.scale * pair["b"]}, adapters)


def variables(learned: Any, frozen: Any, options: LoRAConfig | None) -> dict[str, Any]:
    """What `apply` takes of a run: all weights learn, or with options adapters beside the frozen weights."""
    if options is None:
        return {"params": learned}
    return {"params": frozen, ADAPTERS: scaled(learned, options)}


def _is_pair(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"a", "b"}


def _map_pairs(fn: Callable, adapters: dict[str, Any], *rest: Any) -> Any:
    """fn(pair, *the same place of the other trees) for every pair of adapters."""
    return jax.tree.map(fn, adapters, *rest, is_leaf=_is_pair)


# ---------------------------------------------------------------------------------------------------------------- merge


def merge(params: dict[str, Any], adapters: dict[str, Any], options: LoRAConfig) -> dict[str, Any]:
    """The parameters with the adapters' products added (in float32, rounded once to the dtype of the weight).

    What has no adapter is the same array as before, INT4 experts too. Raises ValueError for adapters of INT4 experts:
    the sum is not INT4; load the base with experts="float" to merge them.
    """
    return _merge(params, adapters, options, "")


def _merge(params: Any, adapters: Any, options: LoRAConfig, where: str) -> Any:
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
