"""A run of reinforcement learning: the one trainer, with rollouts, a policy objective and held-out problems."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from kimi_jax import sharding
from kimi_jax.config import TrainConfig
from kimi_jax.rl.evaluate import evaluate
from kimi_jax.rl.objective import policy
from kimi_jax.rl.rollout import RolloutSource, settings
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.train import loop
from kimi_jax.train.batches import HostState


def run(config: TrainConfig) -> int:
    """Trains by reward; the exit status of `train.loop.run`. Raises as it does, and ConfigError without `config.rl`."""
    rl = settings(config)
    worker = RolloutWorker(config, rl.rollout, rl.policy.temperature, sharding.make_mesh(config.mesh))

    def open_rollouts(config: TrainConfig, packs: Sequence[int], state: HostState | None) -> RolloutSource:
        return RolloutSource(config, packs, state, worker)

    try:
        return loop.run(
            config,
            objective=policy(rl.policy),
            batches=open_rollouts,
            evaluate=functools.partial(evaluate, worker) if config.eval.tasks else None,
        )
    finally:
        worker.close()
