"""One process of the tests of faults: training runs on made-up batches, with a fault caused for real in each.

argv: a JSON list of runs. A run is a dict:
  workdir     where; runs with the same one continue each other
  steps       10 unless given
  nan, spike  batch numbers (from 0) whose weights are NaN, whose targets are ids that never occur otherwise
  disk        [from, to): the disk that holds the workdir is full while these batches are made
  stop        a SIGTERM comes with this batch
  kill        SIGKILL just before this file operation (of those that Python makes inside the workdir)
Each prints `RESULT` and JSON: status, rows, checkpoints, digest (of the newest checkpoint, host state included),
operations, said (warnings that the run printed).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from kimi_jax.config import CheckpointConfig, RecoveryConfig, TrainConfig
from kimi_jax.train import loop
from kimi_jax.train.log import read_rows
from kimi_jax.train.metrics import TIMED
from tests.train.tiny import CONFIG, MODEL, make_batch

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
SMALL = dataclasses.replace(
    MODEL,
    num_hidden_layers=2,
    moe=dataclasses.replace(MODEL.moe, n_routed_experts=2, num_experts_per_tok=1),
    vision=dataclasses.replace(MODEL.vision, num_hidden_layers=1),
)
# one program for all runs
RECOVERY = RecoveryConfig(spike_sigmas=2.0, spike_after=4, max_skipped_in_row=3, max_rollbacks=1)
OPTIMIZER = dataclasses.replace(CONFIG.optimizer, newton_schulz_steps=1)


class Watch:
    """Counts the file operations inside a folder, and kills this process at one of them."""

    def __init__(self) -> None:
        self.folder, self.count, self.kill = "\0", 0, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in OPERATIONS and isinstance(arguments[0], str) and arguments[0].startswith(self.folder):
            self.count += 1
            if self.count == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Fills the disk of a folder and frees it again. Where nobody may mount a small one, files may not grow instead."""

    def __init__(self, folder: Path):
        self._filler = folder / "filler" if os.environ.get("SMALL_DISK") else None

    def fill(self) -> None:
        if self._filler is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        if self._filler is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        else:
            self._filler.unlink(missing_ok=True)


def make_source(fault: dict, disk: Disk) -> type:
    class Source:
        """Batches whose numbers come out of an array of the state alone, beside arrays of other kinds."""

        def __init__(self, config, packs, state):
            state = state or {"left": np.arange(2**40, 2**40 + 1000), "kinds": [{"none": np.zeros((0, 3), bool)}]}
            self.left, self.kinds = state["left"], state["kinds"]
            assert self.left.dtype == np.int64 and self.kinds[0]["none"].shape == (0, 3)

        @property
        def at(self):
            return 1000 - len(self.left)

        def __next__(self):
            at, batch = self.at, make_batch(int(self.left[0] - 2**40))
            if at in fault.get("nan", ()):
                batch.loss_weights[0, 0] = np.nan
            if at in fault.get("spike", ()):
                batch.targets[:] = 5
            begin, end = fault.get("disk", (-1, -1))
            if at == begin:
                disk.fill()
            if at == end:
                disk.free()
            if at == fault.get("stop", -1):
                os.kill(os.getpid(), signal.SIGTERM)
            self.left = self.left[1:]
            return batch

        def state(self):
            return {"left": self.left, "kinds": self.kinds}

        def report(self):
            return {"token_fill": 0.9, "ratio": 0.1, "batches": self.at}

        def update(self, params, step):
            assert step == self.at

        def close(self):
            disk.free()

    return Source


def digest(workdir: Path) -> str:
    """Of the files' meaning, not their bytes: every array and the host state of the newest checkpoint."""
    import orbax.checkpoint as ocp

    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    host = json.loads((newest / "host" / "metadata").read_text())
    host["meter"].pop("time_s")
    host.pop("goodput")
    total = hashlib.sha256(json.dumps(host, sort_keys=True).encode())
    for item in ("params", "optimizer", "host_arrays"):
        for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(newest / item)):
            total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def run(fault: dict, watch: Watch) -> dict:
    workdir = Path(fault["workdir"])
    workdir.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        TrainConfig(), workdir=str(workdir), steps=10, log_interval=1, model=SMALL, data=CONFIG.data,
        optimizer=OPTIMIZER, recovery=RECOVERY, checkpoint=CheckpointConfig(interval=2, keep=5),
    )  # fmt: skip
    watch.folder, watch.count, watch.kill = str(workdir), 0, fault.get("kill", 0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            status = loop.run(config, batches=make_source(fault, Disk(workdir)))
        except loop.Diverged as error:
            status = str(error)
    watch.folder = "\0"
    return {
        "status": status,
        "rows": [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(workdir / "metrics.jsonl")],
        "checkpoints": sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()),
        "digest": digest(workdir),
        "operations": watch.count,
        "said": [line for line in said.getvalue().splitlines() if "WARNING" in line or "going on from" in line],
    }  # fmt: skip


if __name__ == "__main__":
    hook = Watch()
    for each in json.loads(sys.argv[1]):
        print("RESULT", json.dumps(run(each, hook)), flush=True)
