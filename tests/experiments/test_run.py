"""Running experiments: what is missing is run once, failures do not stop the others, and a killed run ends the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import harness, run
from kimi_jax.config import TrainConfig
from tests.environment import REPO
from tests.experiments.test_harness import experiment


class Instant:
    """Stands in for the process of a run: ends at once, with records of a made-up score; seed 3 of `null` fails."""

    started: list[tuple[str, int]] = []

    def __init__(self, command, **kwargs):
        name, row, seed, scale, runs = command[-5:]
        self.returncode = 1 if (row, seed) == ("null", "3") else 0
        self.started.append((row, int(seed)))
        config = experiment().config(row, int(seed), scale, runs)
        record = {"row": row, "seed": int(seed), "config": harness.config_hash(config), "commit": "c",
                  "task": "task/accuracy", "step": 1, "score": 0.5, "n": 1}  # fmt: skip
        Path(config.workdir, "records.json").write_text(json.dumps({"results": [record], "curves": []}))

    def poll(self):
        return self.returncode

    def terminate(self):
        raise AssertionError("a run that has ended was stopped")


@pytest.fixture
def instant(monkeypatch):
    monkeypatch.setattr(run.subprocess, "Popen", Instant)
    monkeypatch.setattr(run, "POLL", 0.0)
    monkeypatch.setattr(Instant, "started", [])
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def missing(of, cores=(0, 1), **changes):
    return run.run_missing(of, "cpu", cores=cores, **changes)


def test_run_missing_runs_each_once_and_goes_on_after_a_failure(instant, tmp_path):
    of, places = experiment(), {"runs": str(tmp_path / "runs"), "folder": tmp_path / "results"}
    failed = missing(of, **places)
    assert sorted(Instant.started) == sorted(of.runs())
    assert len(failed) == 1 and failed[0].startswith("null, seed 3 ended with status 1")
    assert harness.missing(harness.read_table(of, "cpu", places["folder"])) == [("null", 3)]
    Instant.started.clear()
    missing(of, **places)
    assert Instant.started == [("null", 3)]


def test_run_missing_keeps_to_the_rows_and_the_number_asked_for(instant, tmp_path):
    places = {"runs": str(tmp_path / "runs"), "folder": tmp_path / "results"}
    missing(experiment(), cores=(0,), only=("planted",), limit=2, **places)
    assert Instant.started == [("planted", 0), ("planted", 1)]


def test_plan_says_what_is_done_and_how_long_the_rest_takes(instant, tmp_path):
    of, folder = experiment(), tmp_path / "results"
    assert "from the first finished one on" in list(run.rows_of_plan(of, "cpu", 2, folder))[-1]
    missing(of, cores=(0,), only=("plain",), runs=str(tmp_path / "runs"), folder=folder)
    seconds = {"row": "plain", "seed": 0, "commit": "c", "task": "seconds", "step": 1, "score": 120.0, "n": 1}
    seconds["config"] = harness.config_hash(of.config("plain", 0, "cpu"))
    harness.add_records(of, "cpu", "plain", 0, "results", [seconds], folder)
    lines = list(run.rows_of_plan(of, "cpu", 2, folder))
    assert lines[0] == "planted, scale cpu: 5 of 15 runs done"
    assert lines[-1] == "  a run takes about 120 s; the rest about 10 min, 2 at a time"


def test_untrained_row_is_scored_as_it_begins(monkeypatch, tmp_path):
    """With the weights that it names and its own settings; the workdir that is measured is that of the weights."""
    rows = {"start": {"init_from.path": "elsewhere", "optimizer.peak_lr": 5e-4}}
    measured = []
    of = experiment(
        rows=rows, untrained=("start",), measure=lambda workdir: measured.append(workdir) or {"seen": (0.25, 4)}
    )
    scored = []
    monkeypatch.setattr(run, "_train", lambda config: pytest.fail("an untrained row was trained"))
    monkeypatch.setattr("kimi_jax.train.adapters.load_run", lambda path: (TrainConfig(), f"weights of {path}", None))
    monkeypatch.setattr(
        "kimi_jax.eval.runner.evaluate", lambda params, config, *rest, **more: scored.append((params, config)) or []
    )
    Path(of.config("start", 1, "cpu", str(tmp_path)).workdir).mkdir(parents=True)
    assert run.run_one(of, "start", 1, "cpu", str(tmp_path)) == 0
    ((params, config),) = scored
    assert params == "weights of elsewhere" and config.optimizer.peak_lr == 5e-4 and measured == [Path("elsewhere")]
    found = json.loads((tmp_path / "planted" / "cpu" / "start" / "1" / "records.json").read_text())
    assert [(r["task"], r["score"], r["step"]) for r in found["results"]] == [("seen", 0.25, 0)]


@pytest.mark.slow  # three processes that load jax and compile: half a minute to some minutes
def test_run_that_was_killed_ends_with_the_same_records(tmp_path):
    def start(runs):
        command = [sys.executable, "-m", "experiments.run", "fusion_timing", "late", "0", "smoke", str(tmp_path / runs)]
        one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # the tests' own flags make eight
        return subprocess.Popen(command, cwd=REPO, env={**os.environ, **one_device})

    def records(runs):
        text = (tmp_path / runs / "fusion_timing" / "smoke" / "late" / "0" / "records.json").read_text()
        return [r for kind in json.loads(text).values() for r in kind if r["task"] != "seconds"]

    assert start("whole").wait() == 0
    killed = start("killed")
    checkpoint = tmp_path / "killed" / "fusion_timing" / "smoke" / "late" / "0" / "checkpoints" / "4"
    while not checkpoint.exists() and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert start("killed").wait() == 0
    assert records("killed") == records("whole")
