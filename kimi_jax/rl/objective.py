"""K2.5's policy loss as the objective of a training step.

Source: Kimi K2.5 (arXiv 2602.02276), the token-level clipped objective; the mathematics is `kimi_jax.rl.losses`, which
this file only feeds. A batch is one of pre-training with two columns: the log-probability that the sampler recorded of
each target, and the advantage of the rollout that it belongs to. Targets whose loss weight is not 0 are tokens that the
policy generated; N counts them over the global batch.

B rows   S tokens
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kimi_jax.config_rl import PolicyConfig as PolicyConfig
from kimi_jax.packed_batch import PackedBatch
from kimi_jax.rl import losses
from kimi_jax.rl.types import COLUMNS
from kimi_jax.train.objective import Max, Mean, Metrics, Objective, Totals


def policy(config: PolicyConfig) -> Objective:
    """The objective; metrics are those of `losses.objective_loss`, each a mean over generated tokens, `loss`, and
    `max_log_ratio`.

    Raises ValueError for bounds that the loss refuses.
    """
    chosen = _loss(config)

    def totals(batch: PackedBatch) -> Totals:
        return {"num_tokens": _generated(batch)}

    def loss(logp: jax.Array, batch: PackedBatch, totals: Totals) -> tuple[jax.Array, Metrics]:
        sampler, advantage = (batch.columns[name] for name in COLUMNS)
        mask = batch.loss_weights
        value, metrics = losses.objective_loss(
            chosen, logp, sampler, advantage, mask, totals["num_tokens"], sequences=batch.segment_ids
        )
        # the parts' shares of a mean over all N tokens, as sums over their own tokens
        share, tokens = jnp.maximum(totals["num_tokens"], 1.0), _generated(batch)
        reduced: Metrics = {name: Mean(part * share, tokens) for name, part in (metrics | {"loss": value}).items()}
        return value, reduced | {"max_log_ratio": Max(losses.max_log_ratio(logp, sampler, mask))}

    return Objective(COLUMNS, totals, loss, config.temperature)


def _loss(config: PolicyConfig) -> losses.TokenLoss:
    """The objective of that name. "none" keeps every token: bounds that float32 log-ratios do not reach."""
    if config.loss == "ppo":
        return losses.PPO(config.low, config.high)
    if config.loss == "gspo":
        return losses.GSPO(config.low, config.high)
    if config.loss == "cispo":
        return losses.CISPO(config.beta)
    if config.loss == "k1_5":
        return losses.KimiK15Loss(config.tau)
    if config.loss == "none":
        return losses.KimiK25Loss(math.exp(-losses.MAX_LOG_RATIO), math.exp(losses.MAX_LOG_RATIO), 0.0)
    return losses.KimiK25Loss(config.alpha, config.beta, config.tau)


def _generated(batch: PackedBatch) -> jax.Array:
    """How many targets the policy generated, float32 []."""
    return jnp.sum(batch.loss_weights != 0, dtype=jnp.float32)
