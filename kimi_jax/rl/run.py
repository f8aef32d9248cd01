"""A run of reinforcement learning: the one trainer, with rollouts, a policy objective and held-out problems."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, RLConfig, TrainConfig
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
        if rl.rollout.endpoints:
            raise ConfigError("config.rl.rollout.endpoints: runs of a swarm are made in this process; leave them out")
        # here: a run without agents needs none of their packages
        from kimi_jax.rl import orchestrator

        swarm = orchestrator.OrchestratorWorker(config, rl, mesh)
        worker: Worker = swarm
        held_out: Callable[..., list[Row]] = functools.partial(orchestrator.evaluate, swarm)
    else:
        sampler = _sampling_worker(config, rl, mesh)
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


def _sampling_worker(config: TrainConfig, rl: RLConfig, mesh: Mesh) -> RolloutWorker:
    """What draws answers: the engine of this process, or servers."""
    if not rl.rollout.endpoints:
        return RolloutWorker(config, rl.rollout, rl.policy.temperature, mesh)
    try:
        from kimi_jax.rl.remote import RemoteWorker  # here: a run without servers needs no HTTP
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'config.rl.rollout.endpoints: {error}; servers need the extra [serve]: pip install "kimi_jax[serve]"'
        ) from error
    return RemoteWorker(config, rl.rollout, rl.policy.temperature)
