"""What the engine compiles: one call of the decoder, and a loop of them that stays on the device.

`infer.programs` jits `next_tokens` for chunks of prompts and for single tokens, and `decode_tokens`, whose body is the
same function, for many tokens a call: every token that is fetched on its own costs a trip to Python and back, which for
small models takes longer than the token. `plan.decode` lowers `next_tokens` for a pod.

What only some requests ask for (scores of given tokens, the experts of each token) is asked for by static arguments, so
that the programs of those who do not ask do not hold it.

B rows   T tokens of a chunk   P pages   N most tokens a loop decodes   L MoE layers   k experts of a token   S stop ids
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.infer import forward as decoder
from kimi_jax.infer.cache import Cache
from kimi_jax.infer.request import MAX_TOP_LOGPROBS
from kimi_jax.infer.sampler import Sampled, Settings, sample, score

SCORED = 64  # tokens whose logits are held at a time where all of a chunk are scored


class Drawn(NamedTuple):
    """What came of a chunk. scores: log-probabilities of its targets. experts: those of each of its tokens."""

    sampled: Sampled
    scores: Float[Array, "B T"] | None = None
    experts: Int[Array, "B T L k"] | None = None


class Ends(NamedTuple):
    """When rows end and when a loop does."""

    stop_ids: Int[Array, "B S"]  # -1 where there is none
    limit: Int[Array, " B"]  # tokens of prompt and answer together
    steps: Int[Array, ""]  # most tokens a row gets
    ended: Int[Array, ""]  # the loop is left when this many rows have ended


class Decoded(NamedTuple):
    """Tokens of a loop: `steps` of them are filled in, and of a row only those up to its end mean something."""

    steps: Int[Array, ""]
    sampled: Sampled  # [N, B] each
    experts: Int[Array, "N B L k"] | None


def next_tokens(
    config: ModelConfig,
    mesh: Mesh | None,
    weights: decoder.Weights,
    cache: Cache,
    chunk: decoder.Chunk,
    settings: Settings,
    targets: Int[Array, "B T"] | None = None,
    record: bool = False,
) -> tuple[Cache, Drawn]:
    """The cache with the chunk in it, and what is sampled after the last token of every row.

    A chunk of one token a row decodes all slots: absorbed projections, slots sharded over the mesh. In a longer one the
    rows are pieces of prompts. targets: the tokens that follow, to be scored. record: return the experts.
    """
    rows, length = chunk.tokens.shape
    decoding = length == 1
    if mesh is not None and decoding:
        chunk, settings = jax.lax.with_sharding_constraint((chunk, settings), rows_sharding(mesh, rows))
    # a few rows: room for all of them at any expert device, so that one round is enough
    layout = None if mesh is None else sharding.layout(mesh, expert_capacity_factor=float(mesh.shape["expert"]))
    chosen: list[Array] | None = [] if record else None
    hidden, cache = decoder.forward(config, weights, cache, chunk, absorbed=decoding, layout=layout, chosen=chosen)
    last = jnp.take_along_axis(hidden, jnp.maximum(chunk.count - 1, 0)[:, None, None], axis=1)[:, 0]
    if mesh is not None:
        cache = jax.lax.with_sharding_constraint(cache, rows_sharding(mesh, cache[0].shape[0]))
    sampled = sample(decoder.logits(config, weights, last), settings)
    scores = None if targets is None else _scores(config, weights, hidden, targets, settings)
    drawn = Drawn(sampled, scores, jnp.stack(chosen, axis=2) if chosen else None)
    if mesh is not None:  # every host reads all of it
        drawn = jax.lax.with_sharding_constraint(drawn, sharding.replicated(mesh))
    return cache, drawn


def _scores(config: ModelConfig, weights: decoder.Weights, hidden: Array, targets: Array, settings: Settings) -> Array:
    """[B, T] log-probabilities, without holding all logits at once."""
    rows, length = targets.shape
    size = min(length, 1 << (max(SCORED // rows, 1).bit_length() - 1))  # divides the length: powers of two both

    def block(pair: tuple[Array, Array]) -> Array:
        return score(decoder.logits(config, weights, pair[0]), pair[1], settings.temperature)

    split = lambda a: jnp.moveaxis(a.reshape(rows, length // size, size, *a.shape[2:]), 1, 0)  # noqa: E731
    return jnp.moveaxis(lax.map(block, (split(hidden), split(targets))), 0, 1).reshape(rows, length)


def decode_tokens(
    config: ModelConfig,
    mesh: Mesh | None,
    capacity: int,
    weights: decoder.Weights,
    cache: Cache,
    chunk: decoder.Chunk,
    settings: Settings,
    ends: Ends,
    record: bool = False,
) -> tuple[Cache, Decoded]:
    """Up to `capacity` = N tokens for all slots, from chunks of one token a row; the same ones as one at a time.

    A row that ends is idle from then on: it writes past its own tokens only, which nobody reads. settings.position is
    not looked at.
    """
    rows = chunk.count.shape[0]
    listed = jnp.zeros((capacity, rows, min(MAX_TOP_LOGPROBS, config.vocab_size)))
    sampled = Sampled(listed[..., 0].astype(jnp.int32), listed[..., 0], listed.astype(jnp.int32), listed)
    experts = None
    if record and config.moe is not None:
        shape = capacity, rows, 1, config.num_moe_layers, config.moe.num_experts_per_tok
        experts = jnp.zeros(shape, jnp.int32)

    def goes_on(carry: tuple) -> Array:
        steps, ended = carry[0], carry[3]
        return (steps < jnp.minimum(ends.steps, capacity)) & (ended < ends.ended)

    def one(carry: tuple) -> tuple:
        steps, cache, chunk, ended, held = carry
        now = settings._replace(position=chunk.start + chunk.count)
        cache, drawn = next_tokens(config, mesh, weights, cache, chunk, now, record=record)
        held = jax.tree.map(lambda all, one: all.at[steps].set(one), held, drawn)
        tokens, start = drawn.sampled.tokens, chunk.start + chunk.count
        over = (tokens[:, None] == ends.stop_ids).any(axis=1) | (start + 1 >= ends.limit)
        ended = ended + (over & (chunk.count > 0)).sum(dtype=jnp.int32)
        count = jnp.where(over, 0, chunk.count)
        return steps + 1, cache, chunk._replace(tokens=tokens[:, None], start=start, count=count), ended, held

    begin = jnp.int32(0), cache, jax.tree.map(jnp.asarray, chunk), jnp.int32(0), Drawn(sampled, None, experts)
    steps, cache, _, _, held = lax.while_loop(goes_on, one, begin)
    decoded = Decoded(steps, held.sampled, None if held.experts is None else held.experts[:, :, 0])
    if mesh is not None:
        decoded = jax.lax.with_sharding_constraint(decoded, sharding.replicated(mesh))
    return cache, decoded


def copy_pages(cache: Cache, source: Int[Array, " n"], target: Int[Array, " n"]) -> Cache:
    """The cache with pages copied in all layers."""
    return tuple(pages.at[target].set(pages[source]) for pages in cache)


def rows_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """A first axis of this size along the batch's axes of the mesh, or whole if it does not divide."""
    return NamedSharding(mesh, sharding.layout(mesh).spec(("batch",), (size,)))
