"""Policy objectives: K2.5's two-sided token mask, and the ones that it is compared with, behind one reducer.

Source: docs/rl.md sections 1 and 2; docs/paper_notes.md section 5.1 (Kimi K2.5 report, arXiv 2602.02276, equation 1).
With d = log pi_theta - log pi_old of a sampled token, rho = exp(d) and A its advantage, K2.5 minimises

    loss = -1/N sum [ Clip(rho, alpha, beta) * A - tau * d^2 ]
    d loss / d log pi_theta = -1/N [ rho * A * 1{alpha <= rho <= beta} - 2 * tau * d ]

The printed formula clips the ratio, the text bounds the log-ratio by the same letters; alpha > 0 on a *log*-ratio would
drop the on-policy token itself (log 1 = 0). So alpha < 1 < beta bound the ratio and the test is in log space, closed at
both ends. Unlike in PPO the sign of the advantage plays no part: outside the bounds a token has no policy gradient, and
only tau, which by default is never masked, pulls it back.

An objective is a frozen dataclass whose `terms` gives one number for each token. `reduce_terms` is the only place that
sums: by the global N, so that losses, gradients and metrics of microbatches and shards add up to those of the whole.
Correction of the mismatch between sampler and trainer (TIS, IcePop) is a factor of any of them.

B rows   T tokens a row   N generated tokens of the whole batch, over all devices and microbatches
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

MAX_EXPONENT = 80.0  # of the KL estimate: exp of it is still finite in float32
MAX_LOG_RATIO = 20.0  # of objectives that do not bound the ratio on both sides; beyond it they have no gradient


class Tokens(NamedTuple):
    """What an objective sees. Everything is exactly 0 where nothing was generated."""

    d: Float[Array, "B T"]  # log-ratio of trained policy and sampler; the gradient flows here
    advantage: Float[Array, "B T"]
    generated: Bool[Array, "B T"]
    sequences: Int[Array, "B T"]  # which response of its row a token belongs to, 0..T

    def sequence_sum(self, x: Float[Array, "B T"]) -> Float[Array, "B T"]:
        """At each token the sum of x over the generated tokens of its response."""
        x, count = jnp.where(self.generated, x, 0), x.shape[1] + 1
        return jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, count)[ids])(x, self.sequences)

    def sequence_length(self) -> Float[Array, "B T"]:
        """At each token how many generated tokens its response has; at least 1."""
        return jnp.maximum(self.sequence_sum(jnp.ones_like(self.d)), 1)


class Terms(NamedTuple):
    """One number a token: what is maximised, what is minimised, and whether the bounds keep the policy gradient."""

    gain: Float[Array, "B T"]
    penalty: Float[Array, "B T"]
    kept: Bool[Array, "B T"]
    ratio: Float[Array, "B T"]  # the bounded ratio, for the metrics


@runtime_checkable
class TokenLoss(Protocol):
    """A policy objective. Raises ValueError when it is made, not when it is called."""

    def terms(self, tokens: Tokens) -> Terms:
        """The terms of every token."""


def _bounded_ratio(d: Array, kept: Array, low: float, high: float) -> Array:
    """exp(d) where kept; elsewhere its value clipped to exp([low, high]), which has no gradient.

    Clipped before exp: clip(exp(d)) has the right value, but its gradient is 0 * inf = NaN for a large d.
    """
    return jnp.exp(
        jnp.where(kept, jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO), lax.stop_gradient(jnp.clip(d, low, high)))
    )


@dataclass(frozen=True)
class KimiK25Loss:
    """Equation 1 of the K2.5 report. See `policy_loss` for the meaning of the settings."""

    alpha: float = 0.5
    beta: float = 2.0
    tau: float = 1e-3
    tau_on: str = "all"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 < self.beta < math.inf:
            raise ValueError(
                f"alpha={self.alpha}, beta={self.beta}: they bound the ratio of probabilities, 0 < alpha < 1 < beta, "
                "so that a token with ratio 1 is kept; for bounds a, b of the log-ratio pass exp(a), exp(b)"
            )
        if not 0 <= self.tau < math.inf:
            raise ValueError(f"tau={self.tau}: the weight of the squared log-ratio is 0 or a positive number")
        if self.tau_on not in ("all", "kept"):
            raise ValueError(f'tau_on={self.tau_on!r} must be "all" (equation 1) or "kept"')

    def terms(self, tokens: Tokens) -> Terms:
        """Clip(rho) A and tau d^2."""
        d = tokens.d
        low, high = math.log(self.alpha), math.log(self.beta)
        kept = (d >= low) & (d <= high)
        ratio = jnp.exp(jnp.where(kept, d, lax.stop_gradient(jnp.clip(d, low, high))))
        leashed = kept if self.tau_on == "kept" else True
        return Terms(ratio * tokens.advantage, self.tau * jnp.where(leashed, d * d, 0), kept, ratio)


@dataclass(frozen=True)
class PPO:
    """min(rho A, clip(rho, 1 - low, 1 + high) A): bounded only where the update would go further (arXiv 1707.06347).

    DAPO's is low = 0.2, high = 0.28 (arXiv 2503.14476). dual_clip: c > 1 also bounds rho for A < 0, by max(., c A)
    (arXiv 1912.09729); 3 is usual.
    """

    low: float = 0.2
    high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        _check_epsilons(self.low, self.high)
        if self.dual_clip is not None and not 1 + self.high < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip={self.dual_clip}: the bound of the ratio for A < 0 is above 1 + high")

    def terms(self, tokens: Tokens) -> Terms:
        """The pessimistic of rho A and clip(rho) A."""
        kept, ratio = _one_sided(tokens.d, tokens.advantage, self.low, self.high, self.dual_clip)
        return Terms(ratio * tokens.advantage, jnp.zeros_like(ratio), kept, ratio)


@dataclass(frozen=True)
class GSPO:
    """PPO on the geometric mean s of the ratios of a response (arXiv 2507.18071); needs `sequences` if rows are packed.

    level "token" is s_i = sg(s) pi / sg(pi): the same value, and the same gradient if A is constant in a response.
    The paper's mean over responses is `sequence_mean_weight`.
    """

    low: float = 3e-4
    high: float = 4e-4
    level: str = "sequence"

    def __post_init__(self) -> None:
        _check_epsilons(self.low, self.high)
        if self.level not in ("sequence", "token"):
            raise ValueError(f'level={self.level!r} must be "sequence" or "token"')

    def terms(self, tokens: Tokens) -> Terms:
        """The pessimistic of s A and clip(s) A, at every token of the response."""
        mean = tokens.sequence_sum(tokens.d) / tokens.sequence_length()
        if self.level == "token":
            mean = lax.stop_gradient(mean) + tokens.d - lax.stop_gradient(tokens.d)
        kept, ratio = _one_sided(mean, tokens.advantage, self.low, self.high, None)
        return Terms(ratio * tokens.advantage, jnp.zeros_like(ratio), kept, ratio)


@dataclass(frozen=True)
class CISPO:
    """sg(min(rho, ratio_max)) A log pi: the weight is bounded, no token loses its gradient (arXiv 2506.13585).

    ratio_max is the bound itself, not 1 + epsilon: libraries differ in what they call epsilon_high.
    """

    ratio_max: float = 5.0

    def __post_init__(self) -> None:
        if not 1 < self.ratio_max < math.inf:
            raise ValueError(f"ratio_max={self.ratio_max} bounds the ratio itself, so it is above 1")

    def terms(self, tokens: Tokens) -> Terms:
        """The bounded ratio, without gradient, times A d (which has the gradient of A log pi)."""
        ratio = lax.stop_gradient(jnp.exp(jnp.clip(tokens.d, -MAX_LOG_RATIO, math.log(self.ratio_max))))
        return Terms(ratio * tokens.advantage * tokens.d, jnp.zeros_like(ratio), jnp.ones_like(tokens.generated), ratio)


@dataclass(frozen=True)
class KimiK15Loss:
    """A log pi - tau/2 (log-ratio of the response)^2 (Kimi k1.5 report, arXiv 2501.12599, section 2.3.2); no bounds.

    Needs `sequences` if rows are packed. K2's squared form (A - tau D)^2 has this gradient times a constant.
    """

    tau: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.tau < math.inf:
            raise ValueError(f"tau={self.tau}: the weight of the squared log-ratio is 0 or a positive number")

    def terms(self, tokens: Tokens) -> Terms:
        """A d, and the response's tau/2 D^2 in equal parts at its tokens."""
        total = tokens.sequence_sum(tokens.d)
        penalty = 0.5 * self.tau * total * total / tokens.sequence_length()
        ratio = lax.stop_gradient(jnp.exp(jnp.clip(tokens.d, -MAX_LOG_RATIO, MAX_LOG_RATIO)))
        return Terms(tokens.advantage * tokens.d, penalty, jnp.ones_like(tokens.generated), ratio)


def _check_epsilons(low: float, high: float) -> None:
    if not (0 < low < 1 and 0 < high < math.inf):
        raise ValueError(f"low={low}, high={high}: the ratio is clipped to [1 - low, 1 + high], 0 < low < 1, 0 < high")


def _one_sided(d: Array, advantage: Array, low: float, high: float, dual: float | None) -> tuple[Array, Array]:
    """(kept, bounded ratio) of min(rho A, clip(rho) A), which has no gradient only where A pushes further out."""
    bottom, top = math.log1p(-low), math.log1p(high)
    positive = advantage > 0
    kept = jnp.where(positive, d <= top, d >= bottom)
    if dual is None:
        return kept, _bounded_ratio(d, kept, bottom, top)
    far = math.log(dual)
    beyond = ~positive & (d > far)
    ratio = _bounded_ratio(d, kept & ~beyond, bottom, top)
    return kept & ~beyond, jnp.where(beyond, jnp.asarray(dual, d.dtype), ratio)


def tis_weight(
    logp_old: Float[Array, "B T"], logp_sampler: Float[Array, "B T"], ratio_max: float = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance sampling: min(kappa, ratio_max), kappa = exp(logp_old - logp_sampler), no gradient.

    logp_old: of the sampled tokens, recomputed by the trainer before its first update on them; what the sampler
    recorded is logp_sampler. Pass logp_old to `objective_loss` as the policy that the ratio is taken to.
    """
    kappa = jnp.exp(jnp.clip(logp_old - logp_sampler, -MAX_LOG_RATIO, math.log(ratio_max)))
    return lax.stop_gradient(kappa)


def icepop_weight(
    logp_old: Float[Array, "B T"], logp_sampler: Float[Array, "B T"], low: float = 0.5, high: float = 5.0
) -> Float[Array, "B T"]:
    """kappa within [low, high] and 0 outside, no gradient; arguments as in `tis_weight` (IcePop, arXiv 2510.18855)."""
    d = lax.stop_gradient(logp_old - logp_sampler)
    kept = (d >= math.log(low)) & (d <= math.log(high))
    return jnp.where(kept, jnp.exp(jnp.where(kept, d, 0)), 0)


def sequence_mean_weight(
    mask: Num[Array, "B T"] | Bool[Array, "B T"],
    num_tokens: float | int | Num[Array, ""],
    num_sequences: float | int | Num[Array, ""],
    sequences: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Weights that turn the mean over tokens into the mean over responses of the mean over their tokens (GRPO, GSPO).

    N / (J |y|) for J responses in the whole batch, N and J global.
    """
    tokens = _tokens(jnp.zeros(mask.shape), jnp.zeros(mask.shape), jnp.zeros(mask.shape), mask, sequences)
    return jnp.asarray(num_tokens, jnp.float32) / jnp.maximum(num_sequences, 1) / tokens.sequence_length()


def _tokens(logp: Array, logp_old: Array, advantage: Array, mask: Array, sequences: Array | None) -> Tokens:
    """Cleaned before any arithmetic: 0 * inf is NaN, in the gradient too."""
    dtype = jnp.promote_types(logp.dtype, jnp.float32)
    generated = mask != 0

    def clean(x: Array) -> Array:
        return jnp.where(generated, x.astype(dtype), 0)

    d = clean(logp) - lax.stop_gradient(clean(logp_old))
    ids = jnp.zeros(mask.shape, jnp.int32) if sequences is None else sequences
    return Tokens(d, lax.stop_gradient(clean(advantage)), generated, ids)


def reduce_terms(
    tokens: Tokens,
    terms: Terms,
    num_tokens: float | int | Num[Array, ""],
    weight: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The summed loss over N and the metrics of `objective_loss`: the one place where tokens are added up."""
    d, generated = tokens.d, tokens.generated

    def mean(x: Array) -> Array:
        return jnp.where(generated, x, 0).astype(d.dtype).sum() / jnp.maximum(num_tokens, 1)

    gain = terms.gain if weight is None else terms.gain * lax.stop_gradient(jnp.where(generated, weight, 0))
    policy, penalty = -mean(gain), mean(terms.penalty)
    k3 = jnp.expm1(jnp.minimum(d, MAX_EXPONENT)) - d
    metrics = {
        "policy": policy,
        "penalty": penalty,
        "below": mean(~terms.kept & (d < 0)),
        "above": mean(~terms.kept & (d >= 0)),
        "ratio": mean(terms.ratio),
        "mismatch_kl": mean(k3),
        "k3_masked": mean(jnp.where(terms.kept, 0, k3)),
        "k1_kept": mean(jnp.where(terms.kept, -d, 0)),
        "k1_masked": mean(jnp.where(terms.kept, 0, -d)),
    }
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    return policy + penalty, {name: lax.stop_gradient(value) for name, value in metrics.items()}


def objective_loss(
    objective: TokenLoss,
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Num[Array, "B T"] | Bool[Array, "B T"],
    num_tokens: float | int | Num[Array, ""],
    *,
    sequences: Int[Array, "B T"] | None = None,
    weight: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Any objective of this file; arguments that `policy_loss` has mean the same here.

    logp_old:  of the policy that the ratio is taken to: the sampler's own, or recomputed (then with `weight`).
    sequences: int, 0..T, the same for the tokens of one response and of no other in its row; None: a row is a response.
    weight:    factor of every token's gain, without gradient: `tis_weight`, `icepop_weight`, `sequence_mean_weight`.
    entropy:   of the policy at each token, if known; only a metric.

    Returns the loss and metrics, float32 (float64 for such log-probabilities), all divided by num_tokens: `policy` and
    `penalty` (the loss is their sum), `below` and `above` (share of tokens without policy gradient, by the side of
    ratio 1), `ratio` (bounded, mean), `mismatch_kl` (KL(old || policy), the estimate k3 = rho - 1 - d), `k3_masked`
    (the part of it from tokens without policy gradient; the rest is from those kept), `k1_kept` and `k1_masked` (the
    estimate -d), `entropy` if given. To get the mean over masked tokens divide by below + above.
    """
    tokens = _tokens(logp, logp_old, advantage, mask, sequences)
    return reduce_terms(tokens, objective.terms(tokens), num_tokens, weight, entropy)


def max_log_ratio(
    logp: Float[Array, "B T"], logp_sampler: Float[Array, "B T"], mask: Num[Array, "B T"] | Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The largest |d| of a generated token, 0 without any. Over microbatches it is combined by max, not by sum."""
    tokens = _tokens(logp, logp_sampler, jnp.zeros_like(logp), mask, None)
    return lax.stop_gradient(jnp.max(jnp.abs(tokens.d), initial=0.0))


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
    tau_on: str = "all",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """K2.5's loss, and how far the tokens have drifted.

    logp:         log-probabilities of the sampled tokens under the policy that is trained; the gradient flows here.
    logp_sampler: as the sampler recorded them when it drew the tokens (not recomputed: the difference between the two
                  programs is part of the drift that is bounded).
    advantage:    reward minus the mean reward of the prompt's group, not divided by a deviation.
    mask:         nonzero for tokens that the policy generated. The others (prompt, tool results, images, padding)
                  count as exactly zero, whatever stands there: -inf and NaN too.
    num_tokens:   N, at least 1 in effect. Global, so that losses and gradients of microbatches and shards *add up* to
                  those of the whole.
    alpha, beta:  bounds of the ratio, 0 < alpha < 1 < beta. tau: weight of the squared log-ratio, 0 or more. The paper
                  publishes none of them; [0.5, 2] suits fresh rollouts, [0.2, 5] stale ones.
    tau_on:       which tokens the squared log-ratio counts for: "all" as in equation 1, or those within the bounds.
                  With "kept" nothing pulls a token back that has left the bounds.

    Returns the loss and the metrics of `objective_loss`. No gradient in the metrics.
    Raises ValueError for bounds that do not contain 1, a negative tau or another tau_on.
    """
    objective = KimiK25Loss(alpha, beta, tau, tau_on)
    return objective_loss(objective, logp, logp_sampler, advantage, mask, num_tokens)
