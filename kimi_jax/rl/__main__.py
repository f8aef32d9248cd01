"""Reinforcement learning: `python -m kimi_jax.rl --config=configs/rl/demo.py [--config.rl.policy.tau=0 ...]`.

The trainer of `python -m kimi_jax.train` with rollouts as batches and a policy objective; signals, checkpoints, exit
status and logs are the same. Goes on where the run in `config.workdir` stopped, if there is one.
"""

import signal
import sys

from absl import app

from kimi_jax import cli
from kimi_jax.train.__main__ import _stop


def main(_: list[str]) -> int:
    """Settings from the command line; the exit status of the run."""
    from kimi_jax.config import ConfigError  # here: jax is slow to import, and signals are handled before
    from kimi_jax.data import DataError
    from kimi_jax.rl.run import run
    from kimi_jax.sharding import ShardingError
    from kimi_jax.train.batches import SourceUnavailable
    from kimi_jax.train.loop import Diverged, StorageError

    try:
        return run(cli.settings())
    except (ConfigError, DataError, ShardingError, Diverged, SourceUnavailable, StorageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    app.run(main, flags_parser=cli.parse)
