"""Runs what an experiment lacks: one process a run, each on a core of its own, with one display of all.

`python -m experiments.run NAME ROW SEED SCALE` is the process of one run: it trains (or goes on), scores the final
weights, and leaves `records.json` in the workdir, from which the parent takes them. Killed at any point and started
again it ends with the same records.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import harness
from experiments.harness import Experiment, Record
from kimi_jax.config import ConfigError, TrainConfig, nearest, override
from kimi_jax.train.log import read_rows, write_atomic

NAMES = ("fusion_timing", "muon_adamw", "token_clip", "long_context", "zero_vision_sft", "agent_swarm",
         "frozen_subagents")  # fmt: skip
SMOKE_LIMIT = 8  # questions a task at the scale that only says that everything runs
POLL = 0.5  # seconds between two looks at the running processes
REPO = harness.HERE.parent


def load(name: str) -> Experiment:
    """The experiment of that name. Raises ConfigError with the nearest one."""
    if name not in NAMES:
        raise ConfigError(f"no experiment {name!r}{nearest(name, NAMES)}; there are: {', '.join(NAMES)}")
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


# ------------------------------------------------------------------------------------------------------------- one run


def run_one(experiment: Experiment, row: str, seed: int, scale: str, runs: str) -> int:
    """Trains, scores and writes `records.json` into the workdir; the exit status of the training loop."""
    from kimi_jax import cli
    from kimi_jax.eval.runner import evaluate
    from kimi_jax.train import adapters

    config, code = experiment.config(row, seed, scale, runs), harness.commit()
    experiment.prepare(config)
    cli.enable_compilation_cache()
    trains = row not in experiment.untrained
    if trains and (status := _train(config)):
        return status
    workdir = Path(config.workdir if trains else config.init_from.path)
    saved, params, frozen = adapters.load_run(str(workdir))
    if not trains:  # the weights of another run, the settings of this one
        saved = config
    limit = min(SMOKE_LIMIT, experiment.limit) if scale == "smoke" else experiment.limit
    scored = evaluate(params, override(saved, experiment.scoring), experiment.tasks, limit, frozen=frozen)
    results: dict[str, tuple[float, int]] = {}
    for found in scored:
        results[f"{found.task}/{found.metric}"] = (found.score, found.n)
        results[f"{found.task}/{found.metric}/{found.control_name}"] = (found.control, found.n)
    results |= experiment.measure(workdir)
    if trains:
        seconds = read_rows(workdir / "metrics.jsonl")[-1]["seconds"]
        results["seconds"] = (round(sum(seconds.values()), 1), 1)
    about = {"row": row, "seed": seed, "config": harness.config_hash(config), "commit": code}
    records = [
        {**about, "task": task, "step": config.steps if trains else 0, "score": score, "n": n}
        for task, (score, n) in results.items()
    ]
    curves = [
        {**about, "task": f"{r['task']}/{r['metric']}", "step": line["step"], "score": r["score"], "n": r["n"]}
        for line in (read_rows(workdir / "eval.jsonl") if trains else [])
        for r in line["rows"]
        if f"{r['task']}/{r['metric']}" in experiment.curves
    ]
    write_atomic(Path(config.workdir) / "records.json", json.dumps({"results": records, "curves": curves}))
    return 0


def _train(config: TrainConfig) -> int:
    """Trains, or goes on; the exit status of the loop."""
    from kimi_jax.rl import run as rl_run
    from kimi_jax.train import loop

    return rl_run.run(config) if config.rl is not None else loop.run(config)


# ------------------------------------------------------------------------------------------------------------ all runs


class _Process:
    """A running process of one run, on one core."""

    def __init__(self, experiment: Experiment, row: str, seed: int, scale: str, runs: str, core: int):
        self.row, self.seed, self.core = row, seed, core
        self.config = experiment.config(row, seed, scale, runs)
        self.workdir = Path(self.config.workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.run", experiment.name, row, str(seed), scale, runs]
        with (self.workdir / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT, preexec_fn=self._pin, start_new_session=True
            )

    def _pin(self) -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {self.core})

    def step(self) -> int:
        """The last step that is in the log."""
        rows = read_rows(self.workdir / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def records(self) -> dict[str, list[Record]]:
        """What the finished run measured. Raises RuntimeError, with the end of its output, if it failed."""
        if self.process.returncode:
            tail = (self.workdir / "output.txt").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.row}, seed {self.seed} ended with status {self.process.returncode}:\n{tail}")
        return json.loads((self.workdir / "records.json").read_text())


def run_missing(experiment: Experiment, scale: str, *, cores: Sequence[int], runs: str = "runs/experiments",
                only: Sequence[str] = (), limit: int = 0, folder: Path | None = None) -> list[str]:  # fmt: skip
    """Runs what has no records yet, as many at a time as there are cores, at most `limit` (0: all), of the rows `only`
    if there are any.

    Returns a line for each run that failed; the others go on. Ctrl-C and SIGTERM stop them all, saved.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    waiting = harness.missing(harness.read_table(experiment, scale, folder))
    waiting = [run for run in waiting if not only or run[0] in only][: limit or None]
    running: list[_Process] = []
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(_Display(len(waiting)))
        stack.callback(_stop, running)
        free = list(cores)
        while waiting or running:
            while waiting and free:
                running.append(_Process(experiment, *waiting.pop(0), scale, runs, free.pop(0)))
                show.start(running[-1])
            time.sleep(POLL)
            for process in list(running):
                show.update(process)
                if process.process.poll() is None:
                    continue
                running.remove(process)
                free.append(process.core)
                show.end(process)
                try:
                    records = process.records()
                except (RuntimeError, OSError, ValueError) as error:
                    failed.append(str(error))
                    continue
                for kind, found in records.items():
                    harness.add_records(experiment, scale, process.row, process.seed, kind, found, folder)
    return failed


def _stop(running: Sequence[_Process]) -> None:
    """Asks every process still running to save and end, and waits for it."""
    for process in running:
        process.process.terminate()
    for process in running:
        process.process.wait()


class _Display:
    """One progress display of all runs; plain lines where the output is no terminal."""

    def __init__(self, total: int):
        self._console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._all = self._progress.add_task("runs", total=total)
        self._tasks: dict[_Process, tuple[int, float]] = {}

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, process: _Process) -> None:
        """Adds a run."""
        name = f"{process.row} {process.seed} (core {process.core})"
        self._tasks[process] = (self._progress.add_task(name, total=process.config.steps), time.monotonic())

    def update(self, process: _Process) -> None:
        """Shows how far a run is."""
        self._progress.update(self._tasks[process][0], completed=process.step())

    def end(self, process: _Process) -> None:
        """Says how a run ended."""
        task, begun = self._tasks.pop(process)
        self._progress.remove_task(task)
        self._progress.advance(self._all)
        how = "done" if not process.process.returncode else f"FAILED ({process.process.returncode})"
        self._console.print(f"{process.row}, seed {process.seed}: {how} in {time.monotonic() - begun:.0f} s")


def rows_of_plan(experiment: Experiment, scale: str, processes: int, folder: Path | None = None) -> Iterator[str]:
    """What would run and how long it would take, as lines; the time is the mean of the finished runs."""
    table = harness.read_table(experiment, scale, folder)
    left = harness.missing(table)
    seconds = [r["score"] for r in table.records if r["task"] == "seconds"]
    total = len(experiment.runs())
    yield f"{experiment.name}, scale {scale}: {total - len(left)} of {total} runs done"
    for row in experiment.rows:
        done = table.seeds(row)
        yield f"  {row:<24} seeds {', '.join(map(str, experiment.seeds))}; done: {', '.join(map(str, done)) or 'none'}"
    if left and seconds:
        mean = sum(seconds) / len(seconds)
        rest = mean * len(left) / processes / 60
        yield f"  a run takes about {mean:.0f} s; the rest about {rest:.0f} min, {processes} at a time"
    elif left:
        yield "  how long a run takes is known from the first finished one on"


def main(argv: Sequence[str]) -> int:
    """The process of one run."""
    name, row, seed, scale, runs = argv
    return run_one(load(name), row, int(seed), scale, runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
