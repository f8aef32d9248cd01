"""Train: `python -m kimi_jax.train --config=configs/demo.py [--config.optimizer.peak_lr=1e-3 ...]`.

Goes on where the run in `config.workdir` stopped, if there is one. Ctrl-C saves first (status 130); so does SIGTERM,
which asks to be started again (status 75). On many hosts the same command runs on each (see kimi_jax.train.hosts).
"""

import sys

from absl import app

from kimi_jax import cli
from kimi_jax.config import ConfigError
from kimi_jax.data import DataError
from kimi_jax.sharding import ShardingError
from kimi_jax.train import hosts, loop


def main(_: list[str]) -> int:
    """Settings from the command line; the exit status of the run."""
    try:
        return loop.run(cli.settings())
    except (ConfigError, DataError, ShardingError, loop.Diverged) as error:
        sys.exit(f"error: {error}")
    except hosts.HostMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.RESTART


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
