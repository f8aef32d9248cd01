"""One decoding step of the engine on a pod, lowered from shapes: every slot gets its next token.

What is lowered is `infer.step.next_tokens`, which the engine jits (a test compares the texts), for weights sharded by
`kimi_jax.sharding` and pages and slots sharded along the batch's axes, as the engine shards them.

B slots   W pages in a table   P pages   s tokens a page   H heads   n, v, R widths as in `infer.forward`
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.infer import forward as decoder
from kimi_jax.infer.cache import empty_cache
from kimi_jax.infer.sampler import Settings
from kimi_jax.infer.step import next_tokens, rows_sharding
from kimi_jax.kernels.moe.expert_weights import Int4
from kimi_jax.nn.decoder import DENSE, MOE
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import metadata, unbox
from kimi_jax.plan.program import bytes_a_device

PAGE = 64  # tokens a page: what the engine takes unless told otherwise


def served(config: ModelConfig) -> ModelConfig:
    """The model as it is served: weights in the activations' dtype, nothing recomputed."""
    return dataclasses.replace(config, param_dtype=config.dtype, remat=False)


def lower(config: ModelConfig, mesh: Mesh, slots: int, length: int, page_size: int = PAGE) -> jax.stages.Lowered:
    """The program that decodes; every one of `slots` requests may hold `length` tokens."""
    width = -(-length // page_size)
    pages = 1 + slots * width
    pages += -pages % sharding.batch_parts(mesh)
    given = jax.ShapeDtypeStruct  # from the host, as the engine passes them
    rows = given((slots,), "int32")
    chunk = decoder.Chunk(given((slots, 1), "int32"), rows, rows, given((slots, width), "int32"))
    settings = Settings(given((slots,), "float32"), given((slots,), "float32"), given((slots,), "uint32"), rows, rows)
    cache = jax.eval_shape(functools.partial(empty_cache, config, pages, page_size))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding(mesh, pages)), cache)
    step = jax.jit(functools.partial(next_tokens, config, mesh), donate_argnums=1)
    return step.lower(abstract_weights(config, mesh), cache, chunk, settings)


def floor_bytes(config: ModelConfig, mesh: Mesh, slots: int, length: int) -> int:
    """What a device has to read from its memory in a step at the least: its parts of the weights that are touched, each
    once, and its share of the latents of all slots, all of which hold `length` tokens.

    Of the routed experts those are counted that are touched on average if each token chooses at random. The rows of the
    embedding, and the zeros behind latents, are not counted.
    """
    weights = abstract_weights(config, mesh)
    read = [{**layer, "attention": {**layer["attention"], "kv_b": {}}} for layer in weights.layers]  # it has its halves
    total = bytes_a_device(weights._replace(embed={}, layers=tuple(read), expert_weights=None))
    if config.moe is not None:
        touched = 1 - (1 - config.moe.num_experts_per_tok / config.moe.n_routed_experts) ** slots
        total += int(touched * bytes_a_device(weights.expert_weights))
    latent = (config.kv_lora_rank + config.qk_rope_head_dim) * jnp.dtype(config.dtype).itemsize
    return total + slots * length * config.num_hidden_layers * latent // mesh.size


def abstract_weights(config: ModelConfig, mesh: Mesh) -> decoder.Weights:
    """Shapes, dtypes and shardings of `infer.forward.prepare`: each layer's slice is sharded as its stack is."""
    boxed = abstract_params(config)
    shapes, infos = unbox(boxed), metadata(boxed)
    specs_of = jax.tree.map(lambda x: x.spec, sharding.param_shardings(infos, shapes, mesh))
    layers: list[dict[str, Any]] = []
    for name, length in ((DENSE, config.num_dense_layers), (MOE, config.num_moe_layers)):
        if length:
            stack = {**specs_of[name], "mlp": {k: v for k, v in specs_of[name]["mlp"].items() if k != "experts"}}
            layers += [_layer(stack)] * length
    expert_weights = None
    if config.num_moe_layers:
        experts = specs_of[MOE]["mlp"]["experts"]
        expert_weights = decoder.ExpertWeights(
            **{k: Int4(**v) if isinstance(v, dict) else v for k, v in experts.items()}
        )
    specs = decoder.Weights(
        specs_of["embed"], tuple(layers), expert_weights, specs_of["final_norm"], specs_of["lm_head"]
    )
    out = jax.eval_shape(functools.partial(decoder.prepare, config), shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), out, specs
    )


def _layer(stack: dict[str, Any]) -> dict[str, Any]:
    """Specs of one layer; the halves of kv_b lie as [H, n, R] and [H, R, v]."""
    layer = jax.tree.map(lambda s: PartitionSpec(*s[1:]), stack, is_leaf=lambda s: isinstance(s, PartitionSpec))
    kv_b = cast(PartitionSpec, layer["attention"]["kv_b"]["kernel"])
    rank, heads = (tuple(kv_b) + (None, None))[:2]
    return {**layer, "absorbed": {"keys": PartitionSpec(heads, None, rank), "values": PartitionSpec(heads, rank)}}
