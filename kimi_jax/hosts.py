"""Many hosts as one run: who takes part, how they find each other, and what they have to agree on.

`python -m kimi_jax.hosts` starts like a run and adds a one from every device: the sum must be the number of
devices (tpu_setup.sh asks this before anything else).

Hosts find each other in one of these ways, in this order:
  $KIMI_HOSTS, $KIMI_HOST      addresses of all hosts, separated by commas, and the number of this one, from 0
  $TPU_WORKER_HOSTNAMES, ...   what GKE gives a TPU pod; $MEGASCALE_* where a run spans several slices
  the metadata of a TPU VM     where the machine has TPU chips
  otherwise                    one host

jax itself waits for hosts in silence and then aborts without saying whose fault it is. So there is a roll call before:
host 0 listens on the coordinator's port until every host has called, and tells all of them who did not. Only then does
jax take over the same port; one open port (8476, or $KIMI_PORT) between the hosts is all that is needed.

n hosts
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kimi_jax.config import ConfigError

PORT = 8476  # jax's own default, 8482, is blocked between some TPU VMs (jax issue 35905)
RESTART = 75  # exit status: nothing is lost, start me again (EX_TEMPFAIL); tpu_setup.sh does
START_SECONDS = 300.0  # what a host may take to come
_BARRIERS = itertools.count()  # a barrier's name may be used once
HEARTBEAT_SECONDS = 100  # a host silent for so long is lost: jax ends the others, naming it


class HostMissing(RuntimeError):
    """Not all hosts came in time; the message names those that did not."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a run in order; `this` is the number of this one. `coordinator`: address of host 0, and port."""

    names: tuple[str, ...]
    this: int
    coordinator: tuple[str, int]

    def name(self, number: int) -> str:
        """For messages."""
        return f"host {number} ({self.names[number]})"


def find(env: Mapping[str, str] = os.environ) -> Hosts | None:
    """The hosts that the environment describes, None for a single one. Raises ConfigError if it contradicts itself."""
    port = int(env.get("KIMI_PORT", PORT))
    slices, slice_id, first = 1, 0, ""
    if env.get("KIMI_HOSTS"):
        workers, worker = env["KIMI_HOSTS"].split(","), env.get("KIMI_HOST", "")
    elif env.get("TPU_WORKER_HOSTNAMES"):
        workers, worker = env["TPU_WORKER_HOSTNAMES"].split(","), env.get("TPU_WORKER_ID", "")
        slices, slice_id = int(env.get("MEGASCALE_NUM_SLICES") or 1), int(env.get("MEGASCALE_SLICE_ID") or 0)
        first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0]
    elif _has_tpu() and "TPU_SKIP_MDS_QUERY" not in env:
        server = env.get("GCE_METADATA_HOST", "metadata.google.internal")
        # either addresses, or triples name:number:address
        workers = [w.split(":")[-1] for w in _metadata(server, "worker-network-endpoints").split(",")]
        worker = _metadata(server, "agent-worker-number")
        tpu = dict(line.split(":", 1) for line in _metadata(server, "tpu-env").splitlines() if ":" in line)
        tpu = {key.strip(): value.strip().strip("'") for key, value in tpu.items()}
        slices, slice_id = int(tpu.get("MEGASCALE_NUM_SLICES") or 1), int(tpu.get("MEGASCALE_SLICE_ID") or 0)
        first = tpu.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0]
    else:
        return None
    if not worker.isdigit() or int(worker) >= len(workers):
        raise ConfigError(f"this host is number {worker!r} of {len(workers)}: {','.join(workers)}; set KIMI_HOST")
    if slices == 1:
        names = tuple(workers)
    else:
        names = tuple(f"slice {s} worker {w}" for s in range(slices) for w in range(len(workers)))
    if len(names) == 1:
        return None
    return Hosts(names, slice_id * len(workers) + int(worker), (first or workers[0], port))


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _metadata(server: str, key: str) -> str:
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read().decode()
    except OSError as error:
        raise ConfigError(f"{url} does not answer ({error}); name the hosts in KIMI_HOSTS and KIMI_HOST") from error


def start(hosts: Hosts | None = None, timeout: float | None = None) -> None:
    """Joins this process to the others, once, before any use of a device; nothing to do for a single host.

    Raises HostMissing after `timeout` seconds ($KIMI_START_SECONDS, 300), ConfigError for hosts that do not match.
    """
    hosts = hosts or find()
    if hosts is None or jax.distributed.is_initialized():
        return
    if timeout is None:
        timeout = float(os.environ.get("KIMI_START_SECONDS", START_SECONDS))
    roll_call(hosts, timeout)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the training loop
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, port = hosts.coordinator
    jax.distributed.initialize(
        f"{address}:{port}",
        len(hosts.names),
        hosts.this,
        initialization_timeout=max(30, int(timeout)),
        heartbeat_timeout_seconds=int(os.environ.get("KIMI_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)),
        shutdown_timeout_seconds=30,
        cluster_detection_method="deactivate",
    )


# ------------------------------------------------------------------------------------------------------------ roll call


def roll_call(hosts: Hosts, timeout: float) -> None:
    """Returns on every host once all of them have called. Raises HostMissing, ConfigError as `start`."""
    deadline = time.monotonic() + timeout
    hello = {"host": hosts.this, "of": len(hosts.names), "jax": jax.__version__}
    verdict = _listen(hosts, hello, deadline) if hosts.this == 0 else _call(hosts, hello, deadline)
    if verdict["missing"]:
        missing = ", ".join(hosts.name(n) for n in verdict["missing"])
        raise HostMissing(
            f"{missing} did not come within {timeout:.0f} s (port {hosts.coordinator[1]} of {hosts.name(0)}). Does the "
            "program run there, and is the port open between the hosts?"
        )
    if verdict["odd"]:
        raise ConfigError(
            f"hosts differ: {'; '.join(verdict['odd'])}; host 0 has {verdict['first']}. Set them up alike"
        )


def _listen(hosts: Hosts, hello: dict, deadline: float) -> dict[str, Any]:
    """Host 0: takes every host's call, then answers all with the same verdict."""
    callers: dict[int, tuple[socket.socket, dict]] = {}
    with socket.create_server(("", hosts.coordinator[1]), backlog=1024, reuse_port=True) as server:
        while len(callers) < len(hosts.names) - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(10)
                said = json.loads(connection.makefile().readline())
                callers[said["host"]] = connection, said
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours, or gone again: it will call once more
        odd = [f"host {n} has {said}" for n, (_, said) in sorted(callers.items()) if said | {"host": 0} != hello]
        missing = sorted(set(range(1, len(hosts.names))) - set(callers))
        verdict = {"missing": missing, "odd": odd[:3], "first": hello}
    for connection, _ in callers.values():  # after the port is free again
        with connection:
            try:
                connection.sendall(json.dumps(verdict).encode() + b"\n")
            except OSError:
                continue  # that host will miss the others
    return verdict


def _call(hosts: Hosts, hello: dict, deadline: float) -> dict[str, Any]:
    """Another host: calls host 0 until it answers."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(hosts.coordinator, timeout=min(left, 10)) as connection:
                connection.sendall(json.dumps(hello).encode() + b"\n")
                connection.settimeout(left + 10)  # host 0 may have started later than this one
                return json.loads(connection.makefile().readline())
        except (OSError, ValueError):
            time.sleep(min(left, 0.2))
    return {"missing": [0], "odd": []}


# ------------------------------------------------------------------------------------------------------------ agreement


def is_first() -> bool:
    """Whether this is host 0, which alone prints and writes logs."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every host passed (JSON), in their order, on every host. All of them must call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    room = max(1024, 1 << int(sizes.max() - 1).bit_length())  # few different sizes, so few compilations
    texts = np.asarray(multihost_utils.process_allgather(np.pad(text, (0, room - text.size))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def wait_for_all(name: str, seconds: float = 3600.0) -> None:
    """Returns when every host has come to the point of this name. Raises HostMissing, naming those that did not come.

    Unlike a sum over devices it does not mind hosts that are minutes apart, as after compiling.
    """
    if jax.process_count() > 1:
        from jax._src import distributed  # jax has no public barrier without devices

        try:
            distributed.global_state.client.wait_at_barrier(f"{name} {next(_BARRIERS)}", int(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise HostMissing(f"not all hosts came to {name!r} within {seconds:.0f} s: {error}") from error


class Vote:
    """The largest number any host holds, the same on all hosts after the same step, without waiting for the devices.

    A host may see a signal at any time, but all must act on it between the same two steps, or they wait for each other
    in different collectives. `ask` starts a maximum over the devices behind the step just dispatched; `answer` reads
    the one before, which is there when that step's metrics are.
    """

    def __init__(self) -> None:
        self._pending: list[Any] = []
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
            self._placement = NamedSharding(mesh, PartitionSpec("all"))
            whole = NamedSharding(mesh, PartitionSpec())
            self._largest = jax.jit(lambda x: x.max(), out_shardings=whole)

    def ask(self, value: int) -> None:
        """Enters this host's number for the step just dispatched."""
        if jax.process_count() > 1:
            mine = np.full(jax.local_device_count(), value, np.int32)
            self._pending.append(self._largest(jax.make_array_from_process_local_data(self._placement, mine)))
        else:
            self._pending.append(value)
            del self._pending[:-1]

    def answer(self) -> int:
        """Of the step before the last one that was asked after; with one host of that one itself; 0 before any."""
        if jax.process_count() == 1:
            return self._pending[-1] if self._pending else 0
        return int(self._pending.pop(0)) if len(self._pending) > 1 else 0


# ---------------------------------------------------------------------------------------------------------------- check


def check() -> str:
    """A sum of ones over all devices of all hosts, as a line. Raises RuntimeError if it is not their number."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",), axis_types=(AxisType.Auto,))
    spec, whole = PartitionSpec("all"), PartitionSpec()
    add = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=whole)
    mine = np.ones(jax.local_device_count(), np.int32)
    ones = jax.make_array_from_process_local_data(NamedSharding(mesh, spec), mine)
    total = int(jax.jit(add)(ones)[0])
    found = f"{devices} x {jax.devices()[0].device_kind}, {jax.process_count()} hosts: sum {total}"
    if total != devices or jax.local_device_count() * jax.process_count() != devices:
        raise RuntimeError(f"the devices do not add up: {found}, {jax.local_device_count()} of them here")
    return found


def main() -> int:
    """Starts, checks, prints; the exit status."""
    try:
        start()
        line = check()
    except HostMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return RESTART
    except (ConfigError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
