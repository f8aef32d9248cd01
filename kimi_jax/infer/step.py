"""One call of the decoder for the engine: a chunk of tokens in, the next token of every sequence out.

`infer.engine` jits `next_tokens`; `plan.decode` lowers it for a pod.

B slots   T tokens of a chunk   P pages
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.infer import forward as decoder
from kimi_jax.infer.cache import Cache
from kimi_jax.infer.sampler import Sampled, Settings, sample


def next_tokens(
    config: ModelConfig,
    mesh: Mesh | None,
    weights: decoder.Weights,
    cache: Cache,
    chunk: decoder.Chunk,
    settings: Settings,
) -> tuple[Cache, Sampled]:
    """The cache with the chunk in it, and what is sampled after its last token.

    A chunk of one token a sequence decodes all slots: absorbed projections, slots cut over the mesh. A longer one is a
    piece of one prompt.
    """
    rows, length = chunk.tokens.shape
    decoding = length == 1
    if mesh is not None and decoding:
        chunk, settings = jax.lax.with_sharding_constraint((chunk, settings), cut(mesh, rows))
    # a few rows: room for all of them at any expert device, so that they travel in one round
    layout = None if mesh is None else sharding.layout(mesh, expert_buffer=float(mesh.shape["expert"]))
    hidden, cache = decoder.forward(config, weights, cache, chunk, absorbed=decoding, layout=layout)
    last = jnp.take_along_axis(hidden, jnp.maximum(chunk.count - 1, 0)[:, None, None], axis=1)[:, 0]
    if mesh is not None:
        cache = jax.lax.with_sharding_constraint(cache, cut(mesh, cache[0].shape[0]))
    return cache, sample(decoder.logits(config, weights, last), settings)


def cut(mesh: Mesh, size: int) -> NamedSharding:
    """A first axis of this size along the batch's axes of the mesh, or whole if it does not divide."""
    return NamedSharding(mesh, sharding.layout(mesh).spec(("batch",), (size,)))
