"""No fault loses work: each is caused for real, in processes that train on made-up batches (fault_program.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest

from kimi_jax.config import RecoveryConfig
from kimi_jax.hosts import RESTART
from kimi_jax.train import spikes
from kimi_jax.train.console import Interrupted, Stop, exit_status
from kimi_jax.train.state import TrainState
from tests.environment import REPO
from tests.train.processes import environment

PROGRAM = REPO / "tests" / "train" / "fault_program.py"
STEPS = 10
SMALL_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
SMALL_DISK += ['mount -t tmpfs -o size=4m tmpfs "$0" && SMALL_DISK=1 exec "$@"']


def launch(runs: list[dict], before: tuple[str, ...] = ()) -> tuple[list[dict], int, str]:
    """What the runs of one process returned, its status, and its errors."""
    command = [*before, sys.executable, str(PROGRAM), json.dumps(runs)]
    out = subprocess.run(command, cwd=REPO, env=environment(1), capture_output=True, text=True, timeout=900)
    lines = [line.removeprefix("RESULT ") for line in out.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines], out.returncode, out.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def found(folder):
    """The runs of one process: one without faults, and those whose fault the process outlives."""
    runs = {
        "healthy": {},
        "nan": {"nan": [4]},
        "spike": {"spike": [7]},
        "rollback": {"nan": [5, 6, 7]},
        "diverged": {"nan": [2, 3, 4, 5, 6, 7, 8, 9]},
    }
    results, status, errors = launch([{"workdir": str(folder / name)} | fault for name, fault in runs.items()])
    assert status == 0, errors
    return dict(zip(runs, results, strict=True))


def steps(result: dict) -> list[int]:
    return [row["step"] for row in result["rows"]]


@pytest.mark.slow
def test_batch_that_is_not_finite_leaves_no_trace_in_the_weights(found):
    result = found["nan"]
    assert result["status"] == 0 and steps(result) == list(range(1, STEPS + 1))
    assert [row["skipped"] for row in result["rows"]] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert any("step 5: loss or gradient is not finite; its update is left out" in line for line in result["said"])


@pytest.mark.slow
def test_loss_that_spikes_is_skipped_and_said(found):
    result = found["spike"]
    assert result["status"] == 0
    assert [row["spikes"] for row in result["rows"]] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert any("step 8: the loss spikes to" in line for line in result["said"])
    assert sum(row["skipped"] for row in found["healthy"]["rows"]) == 0  # the same judgement lets a healthy run pass


@pytest.mark.slow
def test_many_bad_batches_take_the_run_back_to_a_checkpoint_once(found):
    """Three in a row (steps 6 to 8), known after step 9: weights of step 4, the counters go on, no row twice."""
    result = found["rollback"]
    assert result["status"] == 0 and steps(result) == list(range(1, STEPS + 1))
    assert result["rows"][-1]["rollbacks"] == 1
    assert any("going back to the weights of step 4 (1 of 1 times allowed); the 5 batches" in s for s in result["said"])


@pytest.mark.slow
def test_going_back_is_bounded(found):
    assert "3 steps in a row, the last one step" in found["diverged"]["status"]
    assert "go on with a lower --config.optimizer.peak_lr" in found["diverged"]["status"]


@pytest.mark.slow
def test_killed_anywhere_a_run_continues_bit_for_bit(found, folder):
    """SIGTERM once, SIGKILL at four places among the file operations of the run, the newest checkpoint cut in half."""
    workdir = str(folder / "killed")
    (stopped,), status, errors = launch([{"workdir": workdir, "stop": 2}])
    assert status == 0 and stopped["status"] == RESTART and stopped["checkpoints"][-1] == 3, errors
    total = found["healthy"]["operations"]
    for kill in (5, total // 4, total // 3, total // 2):
        results, status, errors = launch([{"workdir": workdir, "kill": kill}])
        assert status == -signal.SIGKILL or results[0]["status"] == 0, errors  # 0: it was done before
    newest = max((p for p in Path(workdir, "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    for path in (newest / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (last,), status, errors = launch([{"workdir": workdir}])
    assert status == 0 and last["status"] == 0, errors
    assert any(f"checkpoints/{newest.name} cannot be read" in line for line in last["said"]), last["said"]
    assert last["rows"] == found["healthy"]["rows"]  # none twice, none missing
    assert last["digest"] == found["healthy"]["digest"]


@pytest.mark.slow
def test_full_disk_is_said_and_training_goes_on(found, folder):
    """Full while batches 3 to 6 are made: the checkpoint of step 4 is lost, no row and no later one, and it is said.

    Those of steps 2 and 6 are written while training goes on: lost too and said, or written while there is room.
    """
    disk = folder / "disk"
    disk.mkdir()
    mounts = shutil.which("unshare") and subprocess.run([*SMALL_DISK, str(disk), "true"]).returncode == 0
    before = (*SMALL_DISK, str(disk)) if mounts else ()
    (result,), status, errors = launch([{"workdir": str(disk / "run"), "disk": [3, 7]}], before)
    assert status == 0 and result["status"] == 0, errors
    assert result["rows"] == found["healthy"]["rows"]
    lost = {2, 4, 6, 8, 10} - set(result["checkpoints"])
    assert {4} <= lost <= {2, 4, 6} and result["digest"] == found["healthy"]["digest"]
    warned = [line for line in result["said"] if "was NOT saved" in line]
    assert all(any(f"step {step} " in line for line in warned) for step in lost), result["said"]


# ------------------------------------------------------------------------------------------------------------- signals


def test_machine_going_away_asks_for_a_restart_and_ctrl_c_does_not():
    assert exit_status(signal.SIGTERM) == RESTART == 75
    assert exit_status(signal.SIGINT) == 130


@pytest.mark.parametrize("patience", [0.0, 0.05])
def test_signal_ends_what_need_not_be_finished(patience):
    """An evaluation at once, the wait for a batch after a while: both could outlast the grace time of a machine."""
    with Stop() as stop:
        with pytest.raises(Interrupted):
            with stop.raising(patience):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(60)  # not signal.pause: the alarm may ring just before it
        assert stop.signal == signal.SIGTERM
        with stop.raising(None):  # and never a step or a save
            pass


def test_signal_meanwhile_does_not_disturb_what_comes_in_time():
    with Stop() as stop:
        with stop.raising(60.0):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and signal.getitimer(signal.ITIMER_REAL)[0] == 0


# -------------------------------------------------------------------------------------------------------------- spikes


def judge(losses: list[float], **changes) -> list[bool]:
    config = RecoveryConfig(**{"spike_sigmas": 4.0, "spike_after": 10} | changes)
    zero = jnp.int32(0)
    state = TrainState(zero, zero, zero, jnp.float32(0), jnp.float32(0), params=None, opt_state=None)
    found = []
    for loss in losses:
        found.append(bool(spikes.is_spike(config, state, jnp.float32(loss))))
        if not found[-1]:
            mean, square = spikes.advance(state, jnp.float32(loss))
            state = state.replace(step=state.step + 1, loss_mean=mean, loss_square=square)
    return found


def test_spike_is_far_above_the_running_mean_only():
    noise = [3.0 + 0.1 * (-1) ** i for i in range(30)]
    assert judge([*noise, 3.3, 3.8, 3.0, 2.0]) == [False] * 30 + [False, True, False, False]
    assert not any(judge([*noise, 9.0], spike_sigmas=0.0))  # off
    assert not any(judge([*noise[:9], 9.0]))  # too early to say
    assert judge([2.0] * 20 + [2.05, 2.2]) == [False] * 21 + [True]  # without any noise: 1 % stands for it
