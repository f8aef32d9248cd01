"""When a loss spikes: judged inside the step, against running statistics that are part of the state.

That makes the judgement the same on every host, and the same again when a run is continued. Losses whose update was
left out do not enter the statistics. Practice of large runs, not of the paper.

Running means of the loss and of its square start at 0 and are corrected by 1 - DECAY^updates, as in Adam.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kimi_jax.config import RecoveryConfig
from kimi_jax.train.state import TrainState

DECAY = 0.98  # remembers about 50 updates
FLOOR = 0.01  # of the mean: a standard deviation below this is taken for this


def is_spike(config: RecoveryConfig, state: TrainState, loss: jax.Array) -> jax.Array:
    """Bool []: the loss (float32 [], nats a token) is `spike_sigmas` standard deviations above its running mean."""
    updates = state.step - state.skipped
    correction = 1.0 - DECAY ** jnp.maximum(updates, 1).astype(jnp.float32)
    mean = state.loss_mean / correction
    deviation = jnp.sqrt(jnp.maximum(state.loss_square / correction - mean**2, 0.0))
    limit = mean + config.spike_sigmas * jnp.maximum(deviation, FLOOR * mean)
    judged = (config.spike_sigmas > 0) & (updates >= config.spike_after)
    return judged & (loss > limit)


def advance(state: TrainState, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss_mean, loss_square) with this loss taken in."""
    return (
        DECAY * state.loss_mean + (1 - DECAY) * loss,
        DECAY * state.loss_square + (1 - DECAY) * loss**2,
    )
