"""One token for every row of logits: greedy, or drawn at the row's own temperature, nucleus, and random stream.

A row's draw depends on its logits, its seed and the position of the new token, and on nothing
else of the batch. What a row is not allowed is never drawn, but log-probabilities are those of a row that is allowed
everything. The nucleus is found without sorting: the least logit that is still inside is bisected by its bit pattern,
which is exact. What no row asks for (noise, nucleus, alternatives, masks) is not computed.

B rows   V vocabulary   A alternatives listed   W = ceil(V / 32)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from kimi_jax.infer.request import MAX_TOP_LOGPROBS, MIN_TEMPERATURE


class Settings(NamedTuple):
    """The rows' settings; see `request.Sampling`."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    position: Int[Array, " B"]  # of the new token
    top_logprobs: Int[Array, " B"]
    allowed: UInt32[Array, "B W"] | None = None  # bit i % 32 of word i // 32: whether the row may draw token i


class Sampled(NamedTuple):
    """The new tokens. The distribution is softmax(logits / temperature), and softmax(logits) if greedy."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    top_tokens: Int[Array, "B A"]  # most probable first; zeros if no row asks for any
    top_logprobs: Float[Array, "B A"]


def sample(logits: Float[Array, "B V"], settings: Settings) -> Sampled:
    """Draw one token a row. Logits float32."""
    greedy = settings.temperature < MIN_TEMPERATURE
    logprobs = _log_softmax(logits, settings.temperature)
    choice = logprobs if settings.allowed is None else _within(logprobs, settings.allowed)
    drawn = lax.cond(greedy.all(), lambda: choice, lambda: _perturbed(choice, settings))
    tokens = jnp.argmax(jnp.where(greedy[:, None], choice, drawn), axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    listed = min(MAX_TOP_LOGPROBS, logits.shape[1])
    none = jnp.zeros((logits.shape[0], listed))
    top, top_tokens = lax.cond(
        (settings.top_logprobs > 0).any(),
        lambda: tuple(lax.top_k(logprobs, listed)),
        lambda: (none, none.astype(jnp.int32)),
    )
    return Sampled(tokens, chosen, top_tokens, top)


def score(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], temperature: Float[Array, " B"]) -> Array:
    """Log-probabilities [B, T] of given tokens, in the distribution that `sample` draws from before the nucleus."""
    logprobs = jax.vmap(_log_softmax, in_axes=(1, None), out_axes=1)(logits, temperature)
    return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def _log_softmax(logits: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Float[Array, "B V"]:
    logprobs = jax.nn.log_softmax(logits / jnp.where(temperature < MIN_TEMPERATURE, 1.0, temperature)[:, None])
    return jnp.minimum(logprobs, 0.0)  # XLA:CPU makes 3e-8 of the logarithm of 1, and a probability above 1


def _within(logprobs: Float[Array, "B V"], allowed: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """The distribution over the tokens that are allowed; -inf for the others."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    inside = bits.reshape(len(allowed), -1)[:, : logprobs.shape[1]] == 1
    return jax.nn.log_softmax(jnp.where(inside, logprobs, -jnp.inf))


def _perturbed(logprobs: Array, settings: Settings) -> Array:
    """Log-probabilities inside the nucleus plus Gumbel noise: their maximum is a draw."""
    inside = lax.cond((settings.top_p < 1).any(), lambda: nucleus(logprobs, settings.top_p), lambda: logprobs)

    def noise(seed: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), logprobs.shape[1:])

    return inside + jax.vmap(noise)(settings.seed, settings.position)


def nucleus(logprobs: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """-inf outside the smallest set of most probable tokens whose mass reaches top_p.

    Equally probable ones stay together. Rows with top_p = 1 are unchanged. The most probable token always stays.
    """
    # floats at most 0 have the order of their bit patterns, reversed: so 0 is the largest and finding is bisection
    bits = lax.bitcast_convert_type(jnp.minimum(logprobs, -0.0), jnp.int32) & 0x7FFFFFFF
    probs = jnp.exp(logprobs)
    top_p = jnp.maximum(top_p, jnp.finfo(top_p.dtype).tiny)  # 1e-50 is 0 in float32, and 0 would keep no token

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        """The set {bits <= low} is too small or low is -1; the set {bits <= high} is large enough."""
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.where(bits <= middle[:, None], probs, 0.0).sum(axis=-1) >= top_p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full(top_p.shape, -1, jnp.int32)
    _, high = lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, 0x7FFFFFFF - 1)))
    inside = (bits <= high[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(inside, logprobs, -jnp.inf)
