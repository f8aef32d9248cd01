"""The policy objective of Kimi K2.5: importance-weighted advantages with a two-sided token mask, and a leash.

Source: docs/paper_notes.md section 5.1 (equation 1) and its list of ambiguities, items 3 and 4; docs/paper_notes.md
section 5.1. With d = log pi_theta - log pi_old of a sampled token and rho = exp(d),

    loss = -1/N sum [ Clip(rho, alpha, beta) * A - tau * d^2 ]
    d loss / d log pi_theta = -1/N [ rho * A * 1{alpha <= rho <= beta} - 2 * tau * d ]

The printed formula clips the ratio, the text bounds the log-ratio by the same letters; alpha > 0 on a *log*-ratio would
drop the on-policy token itself (log 1 = 0). So alpha < 1 < beta bound the ratio and the test is in log space, closed at
both ends. Unlike in PPO the sign of the advantage plays no part: outside the bounds a token has no policy gradient, and
only tau, which is never masked, pulls it back.

B rows   T tokens a row   N generated tokens of the whole batch, over all devices and microbatches
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

MAX_EXPONENT = 80.0  # of the KL estimate: exp of it is still finite in float32


def policy_loss(
    logp: Float[Array, "B T"],
    logp_sampler: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Num[Array, "B T"] | Bool[Array, "B T"],
    num_tokens: float | int | Num[Array, ""],
    *,
    alpha: float = 0.5,
    beta: float = 2.0,
    tau: float = 1e-3,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is minimised, and how far the tokens have drifted.

    logp:         log-probabilities of the sampled tokens under the policy that is trained; the gradient flows here.
    logp_sampler: as the sampler recorded them when it drew the tokens (not recomputed: the difference between the two
                  programs is part of the drift that is bounded).
    advantage:    reward minus the mean reward of the prompt's group, not divided by a deviation.
    mask:         nonzero for tokens that the policy generated. The others (prompt, tool results, pictures, padding)
                  count as exactly zero, whatever stands there: -inf and NaN too.
    num_tokens:   N, at least 1 in effect. Global, so that losses and gradients of microbatches and shards *add up* to
                  those of the whole.
    alpha, beta:  bounds of the ratio, 0 < alpha < 1 < beta. tau: weight of the squared log-ratio, 0 or more. The paper
                  publishes none of them; [0.5, 2] suits fresh rollouts, [0.2, 5] stale ones.

    Returns the loss and metrics, float32 (float64 for such log-probabilities) and all divided by num_tokens as the loss
    is: `policy` and `penalty` (the loss is their sum), `below` and `above` (share of tokens that the bounds drop),
    `ratio` (clipped, mean) and `mismatch_kl` (KL(sampler || policy), the estimate rho - 1 - d). No gradient in them.
    Raises ValueError for bounds that do not contain 1 or a negative tau.
    """
    if not 0 < alpha < 1 < beta < math.inf:
        raise ValueError(
            f"alpha={alpha}, beta={beta}: they bound the ratio of probabilities, 0 < alpha < 1 < beta, so that a token "
            "with ratio 1 is kept; for bounds a, b of the log-ratio pass exp(a), exp(b)"
        )
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau={tau}: the weight of the squared log-ratio is 0 or a positive number")
    dtype = jnp.promote_types(logp.dtype, jnp.float32)
    generated = mask != 0

    def clean(x: Array) -> Array:  # before any arithmetic: 0 * inf is NaN, in the gradient too
        return jnp.where(generated, x.astype(dtype), 0)

    d = clean(logp) - lax.stop_gradient(clean(logp_sampler))
    low, high = math.log(alpha), math.log(beta)
    kept = (d >= low) & (d <= high)
    # clipped before exp: clip(exp(d)) has the right value, but its gradient is 0 * inf = NaN for a large d
    ratio = jnp.exp(jnp.where(kept, d, lax.stop_gradient(jnp.clip(d, low, high))))

    def mean(x: Array) -> Array:
        return jnp.where(generated, x, 0).astype(dtype).sum() / jnp.maximum(num_tokens, 1)

    policy = -mean(ratio * lax.stop_gradient(clean(advantage)))
    penalty = tau * mean(d * d)
    metrics = {
        "policy": policy,
        "penalty": penalty,
        "below": mean(d < low),
        "above": mean(d > high),
        "ratio": mean(ratio),
        "mismatch_kl": mean(jnp.expm1(jnp.minimum(d, MAX_EXPONENT)) - d),
    }
    return policy + penalty, {name: lax.stop_gradient(value) for name, value in metrics.items()}
