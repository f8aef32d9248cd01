"""K2.5's policy loss as the objective of a training step.

Source: Kimi K2.5 (arXiv 2602.02276), the token-level clipped objective; the mathematics is `kimi_jax.rl.losses`, which
this file only feeds. A batch is one of pre-training with two columns more, in the order of `targets`: the
log-probability that the sampler recorded of each target, and the advantage of the rollout that it belongs to. Targets
whose loss weight is not 0 are tokens that the policy generated; N counts them over the global batch.

B rows   S tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from kimi_jax.ranges import NonNegative, Positive, Range
from kimi_jax.rl.losses import policy_loss
from kimi_jax.rl.types import COLUMNS
from kimi_jax.train.objective import Batch, Mean, Metrics, Objective, Totals


@dataclass(frozen=True)
class PolicyConfig:
    """Settings of the loss. The paper publishes no values: see `rl.losses.policy_loss`."""

    alpha: Annotated[float, Range(1e-6, 1.0)] = 0.5  # lower bound of the ratio of probabilities
    beta: Annotated[float, Range(1.0, 1e6)] = 2.0  # upper bound
    tau: NonNegative = 1e-3  # weight of the squared log-ratio
    temperature: Positive = 1.0  # of the sampler; the trained policy is softmax(logits / temperature) as well


def policy(config: PolicyConfig) -> Objective:
    """The objective; metrics are those of `policy_loss`, each a mean over generated tokens, and `loss`.

    Raises ValueError, when the step is traced, for bounds that `policy_loss` refuses.
    """

    def totals(batch: Batch) -> Totals:
        return {"num_tokens": _generated(batch)}

    def loss(logp: jax.Array, batch: Batch, totals: Totals) -> tuple[jax.Array, Metrics]:
        sampler, advantage = (batch[name] for name in COLUMNS)
        value, metrics = policy_loss(
            logp,
            sampler,
            advantage,
            batch["loss_weights"],
            totals["num_tokens"],
            alpha=config.alpha,
            beta=config.beta,
            tau=config.tau,
        )
        # the parts' shares of a mean over all N tokens, as sums over their own tokens
        share, tokens = jnp.maximum(totals["num_tokens"], 1.0), _generated(batch)
        return value, {name: Mean(part * share, tokens) for name, part in (metrics | {"loss": value}).items()}

    return Objective(COLUMNS, totals, loss, config.temperature)


def _generated(batch: Batch) -> jax.Array:
    """How many targets the policy generated, float32 []."""
    return jnp.sum(batch["loss_weights"] != 0, dtype=jnp.float32)
