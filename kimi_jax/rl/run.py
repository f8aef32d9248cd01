"""A run of reinforcement learning: the one trainer, with rollouts, a policy objective and held-out problems."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from kimi_jax import sharding
from kimi_jax.config import TrainConfig
from kimi_jax.eval.runner import Row
from kimi_jax.rl.evaluate import evaluate
from kimi_jax.rl.objective import policy
from kimi_jax.rl.rollout import RolloutSource, Worker, settings
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.train import loop
from kimi_jax.train.batches import HostState


def run(config: TrainConfig) -> int:
    """Trains by reward; the exit status of `train.loop.run`. Raises as it does, and ConfigError without `config.rl`."""
    rl = settings(config)
    mesh = sharding.make_mesh(config.mesh)
    if rl.orchestrator is not None:
        # here: a run without agents needs none of their packages
        from kimi_jax.rl import orchestrator

        swarm = orchestrator.OrchestratorWorker(config, rl, mesh)
        worker: Worker = swarm
        held_out: Callable[..., list[Row]] = functools.partial(orchestrator.evaluate, swarm)
    else:
        sampler = RolloutWorker(config, rl.rollout, rl.policy.temperature, mesh)
        worker, held_out = sampler, functools.partial(evaluate, sampler)

    def open_rollouts(config: TrainConfig, packs: Sequence[int], state: HostState | None) -> RolloutSource:
        return RolloutSource(config, packs, state, worker)

    try:
        return loop.run(
            config,
            objective=policy(rl.policy),
            batches=open_rollouts,
            evaluate=held_out if config.eval.tasks else None,
        )
    finally:
        worker.close()
