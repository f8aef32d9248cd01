"""Train: `python -m kimi_jax.train --config=configs/demo.py [--config.optimizer.peak_lr=1e-3 ...]`.

Goes on where the run in `config.workdir` stopped, if there is one. Ctrl-C saves first (status 130); so does SIGTERM,
which asks to be started again (status 75). On many hosts the same command runs on each (see kimi_jax.hosts).
"""

import os
import signal
import sys
from typing import Any

from absl import app

from kimi_jax import cli


def main(_: list[str]) -> int:
    """Settings from the command line; the exit status of the run."""
    from kimi_jax import hosts
    from kimi_jax.config import ConfigError  # here: jax is slow to import, and signals are handled before
    from kimi_jax.data import DataError
    from kimi_jax.sharding import ShardingError
    from kimi_jax.train import loop
    from kimi_jax.train.checkpoint import CheckpointUnavailable

    try:
        return loop.run(cli.settings())
    except (hosts.HostMissing, CheckpointUnavailable, loop.StorageUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.RESTART
    except (ConfigError, DataError, ShardingError, loop.Diverged, loop.StorageError) as error:
        sys.exit(f"error: {error}")


def _stop(number: int, frame: Any) -> None:
    """SIGTERM while the program is being loaded: nothing to save, start it again (kimi_jax.hosts.RESTART)."""
    os.write(2, b"stopping before the run has begun\n")
    os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    app.run(main, flags_parser=cli.parse)
