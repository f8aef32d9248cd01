"""One process of the tests of hosts and faults: joins the others if there are any, then does the tasks it is given.

A process is slow to start and each mesh slow to compile for, so one process does many tasks. A task is a JSON list in
argv; each prints one line `RESULT` with JSON.
  ["run", {changes}, devices]          a training run of the settings with changes, on so many of the devices (0: all)
  ["stop", {changes}, devices, n]      the same, and the last host gets a SIGTERM with its batch number n
  ["gather", value]                    what `hosts.gather` returns
  ["die"]                              the last host kills itself without a word, the others wait for it
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")

from kimi_jax import config as c  # noqa: E402
from kimi_jax import hosts, sharding  # noqa: E402
from kimi_jax.train import loop  # noqa: E402

MAKE_MESH, PUT_BATCH = sharding.make_mesh, sharding.put_batch


def settings(path: str, changes: dict) -> c.TrainConfig:
    scope: dict = {}
    exec(compile(Path(path).read_text(), path, "exec"), scope)
    values = scope["get_config"]()
    values.update_from_flattened_dict(changes)
    return c.freeze(values)


def run(config: c.TrainConfig, devices: int, stop: int = 0) -> int:
    """A run on the first `devices` devices; this process gets a SIGTERM with batch `stop` of this part of the run."""
    left = [stop]

    def put_batch(batch, mesh):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return PUT_BATCH(batch, mesh)

    sharding.put_batch = put_batch
    sharding.make_mesh = lambda mesh: MAKE_MESH(mesh, jax.devices()[: devices or None])
    return loop.run(config)


def main(path: str, *tasks: str) -> None:
    hosts.start()
    for text in tasks:
        name, *arguments = json.loads(text)
        if name == "gather":
            result = hosts.gather([jax.process_index(), *arguments])
        elif name == "die":
            if jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = hosts.wait_for_all("the end")
            except hosts.HostMissing as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(hosts.RESTART)  # the ordinary way out would wait for the dead
        elif name == "run" or jax.process_index() < jax.process_count() - 1:
            result = run(settings(path, arguments[0]), arguments[1])
        else:
            result = run(settings(path, arguments[0]), *arguments[1:])
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
