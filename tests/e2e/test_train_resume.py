"""The command `python -m kimi_jax.train` as a process: killed and started again it gives the same run, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from kimi_jax.train import checkpoint
from kimi_jax.train.metrics import TIMED
from tests.e2e.corpus import write_config, write_corpus
from tests.environment import COMPILE_FAST, REPO

STEPS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return write_config(folder, steps=STEPS, log_interval=10)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    output, status = finish(start(config, workdir))
    assert status == 0, output
    return workdir


# `python -m kimi_jax.train ...` that sends a signal to itself, or its whole group, when it reports a step: another
# process that reads along might be too late
RINGING = """
import os, runpy, sys
from kimi_jax.train.console import Reporter
step, number, group = map(int, sys.argv.pop(1).split(","))
report = Reporter.row
def row(self, found):
    report(self, found)
    if found["step"] == step:
        (os.killpg if group else os.kill)(os.getpid(), number)
Reporter.row = row
runpy.run_module("kimi_jax.train", run_name="__main__", alter_sys=True)
"""


def start(config, workdir, *overrides, program=("-m", "kimi_jax.train")):
    """The command on one device, its output readable line by line."""
    environment = os.environ | {"XLA_FLAGS": COMPILE_FAST, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *program, f"--config={config}", f"--config.workdir={workdir}"]
    # an interval that is no multiple of the log interval, so that sums over half an interval are resumed too
    command += ["--config.checkpoint.interval=17", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=REPO, env=environment, text=True, start_new_session=True, **pipes)


def finish(process):
    output, _ = process.communicate(timeout=900)
    return output, process.returncode


def stop_at(config, workdir, step, signal_number, *overrides, group=False):
    """The command gets the signal when it reports `step`; `group`: its workers too, as a terminal does on Ctrl-C."""
    program = ("-c", RINGING, f"{step},{int(signal_number)},{int(group)}")
    return finish(start(config, workdir, *overrides, program=program))


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    assert [row["step"] for row in rows(a)] == list(range(10, STEPS + 1, 10))  # and none twice
    first, second = (checkpoint.load(str(workdir))[1] for workdir in (a, b))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


def test_kill_and_ctrl_c_leave_no_trace_in_the_run(config, uninterrupted, tmp_path):
    output, status = stop_at(config, tmp_path, 40, signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    output, status = stop_at(config, tmp_path, 60, signal.SIGINT, group=True)
    assert status == 128 + signal.SIGINT, output
    # 34, or 17 if the kill came before that one was whole
    assert "going on from the checkpoint of step 34" in output or "checkpoint of step 17" in output, output
    assert "The same command goes on from there" in output and "Traceback" not in output
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert stopped in (61, 62)  # a row is reported while the step after it is under way
    output, status = finish(start(config, tmp_path))
    assert status == 0 and f"going on from the checkpoint of step {stopped}" in output, output
    assert_same_run(uninterrupted, tmp_path)
    output, status = finish(start(config, tmp_path))  # and once more: nothing is left to do
    assert status == 0 and rows(tmp_path) == rows(uninterrupted), output


@pytest.mark.slow
def test_worker_process_gives_the_same_run_killed_or_not(config, uninterrupted, tmp_path):
    worker = "--config.data.num_workers=1"
    output, status = stop_at(config, tmp_path, 40, signal.SIGKILL, worker)
    assert status == -signal.SIGKILL, output
    output, status = stop_at(config, tmp_path, 60, signal.SIGINT, worker, group=True)
    assert status == 128 + signal.SIGINT and "Traceback" not in output, output
    output, status = finish(start(config, tmp_path, worker))
    assert status == 0, output
    assert_same_run(uninterrupted, tmp_path)


def test_run_learns_and_drops_nothing(uninterrupted):
    found = rows(uninterrupted)
    assert found[-1]["loss_text"] < 0.7 * found[0]["loss_text"]
    assert found[-1]["loss_image"] < 0.7 * found[0]["loss_image"]
    assert all(row["dropped"] == 0 and row["skipped"] == 0 for row in found)


def test_what_is_printed_says_what_runs(config, uninterrupted):
    written = json.loads((uninterrupted / "config.json").read_text())
    assert written["steps"] == STEPS and written["model"]["hidden_size"] == 32
    assert any((uninterrupted / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.optimizer.peak_rl=1e-3", "unknown setting config.optimizer.peak_rl (did you mean 'peak_lr'?)"),
        ("--config.steps=many", "config.steps"),
        ("--config.eval.tasks=nonsense", "config.eval.tasks: no task is called 'nonsense'"),
        ("--config.model.hidden_size=64", "config.model.hidden_size = 64 (default 32)"),
    ],
)
def test_mistakes_end_with_one_line_that_helps(config, uninterrupted, override, message):
    output, status = finish(start(config, uninterrupted, override))
    assert status not in (0, None) and message in output and "Traceback" not in output, output
