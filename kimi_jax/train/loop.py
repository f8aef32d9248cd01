"""The training loop: settings in, checkpoints and a log out. Reads from top to bottom.

A run is its `workdir`: the same command started again goes on from the newest checkpoint, on the same numbers as if it
had never stopped.
  config.json               the settings
  checkpoints/N             the run after N steps (kimi_jax.train.checkpoint)
  metrics.jsonl, eval.jsonl one row a log interval, one an evaluation (kimi_jax.train.metrics); tensorboard/ the same
  results.json, samples/    the final evaluation
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import textwrap
import threading
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_jax import cli, sharding
from kimi_jax.config import PRESETS, ConfigError, TrainConfig, diff, preset
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.train import state as state_lib
from kimi_jax.train.checkpoint import Checkpoints
from kimi_jax.train.metrics import Log, Meter, measure_matmul_rate, parameter_table, progress_line, write_atomic
from kimi_jax.train.state import TrainState
from kimi_jax.train.step import make_optimizer, make_train_step

MAX_SKIPPED_IN_ROW = 10  # a run whose loss stays non-finite for so many steps will not recover by itself


class Diverged(RuntimeError):
    """The loss was not finite for many steps in a row."""


def run(config: TrainConfig) -> int:
    """Trains, evaluates and saves. Returns the exit status: 0 when complete, 128 + signal number when stopped by one.

    Raises CheckpointMismatch (the workdir holds another model), Diverged, and whatever the data or the settings raise.
    """
    cli.enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(_Reporter(config.steps))
        say(*describe(config))
        _check(config)

        # ------------------------------------------------------------------------------ devices, model, optimizer
        mesh = sharding.make_mesh(config.mesh)
        init_state, train_step = make_train_step(config, mesh)
        abstract = state_lib.abstract(config.model, make_optimizer(config), mesh)
        say(parameter_table(state_lib.infos(config.model), abstract.params))

        # -------------------------------------------------------------------------------- where the run stands
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(config.workdir, config.checkpoint)))
        restored = checkpoints.restore(abstract, config)
        step = restored.step if restored else 0
        state = restored.state if restored else init_state()
        host = restored.host if restored else {"data": None, "meter": None}
        if restored:
            say(f"going on from the checkpoint of step {step}")
            changes = [line.replace("(default ", "(was ") for line in diff(config, restored.config)]
            say(*(f"  changed since then: {line}" for line in changes))
        log = stack.enter_context(contextlib.closing(Log(config.workdir, step)))
        write_atomic(epath.Path(config.workdir) / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        meter = Meter(config.model, config.log_interval, config.steps, host["meter"])
        stop = stack.enter_context(_Stop())
        this = _Run(config, mesh, checkpoints, log, meter, stop, say)

        # ------------------------------------------------------------------------------------------- train, end
        if step < config.steps:
            if _evaluation_due(config, step) and step not in log.evaluated():  # killed in the middle of it
                this.evaluate(state, config.eval.limit)
            rate = measure_matmul_rate(mesh, config.model.dtype)  # while no data worker competes
            devices = f"{mesh.size} x {jax.devices()[0].device_kind}"
            say(f"{devices}: plain {config.model.dtype} matmuls reach {rate / 1e9:,.0f} GFLOP/s (MFU 100 %)")
            stream = stack.enter_context(BatchStream(config.data, config.model, config.steps, state=host["data"]))
            state, step = _train(this, train_step, stream, state, step, rate)
            checkpoints.wait()
        if stop.signal:
            say(f"stopped at step {step} of {config.steps}; saved. The same command goes on from there.")
            return 128 + stop.signal
        _evaluate_at_end(this, state)
        say(f"done: {step} steps, in {config.workdir}. For more, raise --config.steps and run again.")
        return 0


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every part of the loop uses."""

    config: TrainConfig
    mesh: Mesh
    checkpoints: Checkpoints
    log: Log
    meter: Meter
    stop: _Stop
    say: _Reporter

    def evaluate(self, state: TrainState, limit: int, samples: list | None = None) -> list[Any]:
        """Runs the tasks of the settings, prints and logs the scores; returns the rows of `kimi_jax.eval.runner`."""
        from kimi_jax.eval.runner import evaluate

        step, before = int(state.step), time.perf_counter()
        self.say(f"step {step}: evaluating {', '.join(self.config.eval.tasks)}, up to {limit} questions each")
        rows = evaluate(state.params, self.config, self.config.eval.tasks, limit, samples=samples)
        self.log.evaluation(step, [dataclasses.asdict(row) for row in rows])
        for row in rows:
            scored = f"{row.metric:<16}{row.score:.3f} +- {row.stderr:.3f}"
            self.say(f"  {row.task:<28}{scored}  {row.control_name} {row.control:.3f}  chance {row.chance:.3f}")
        self.say(f"  in {time.perf_counter() - before:.0f} s")
        return rows


# ---------------------------------------------------------------------------------------------------------------- steps


def _train(
    this: _Run, train_step: Any, stream: BatchStream, state: TrainState, step: int, rate: float
) -> tuple[TrainState, int]:
    """Steps until the end or a signal; returns the state and its step, both saved."""
    config, meter = this.config, this.meter
    compiled = None
    while step < config.steps and not this.stop.signal:
        before = time.perf_counter()
        batch = next(stream)
        meter.waited(time.perf_counter() - before)
        batch = sharding.put_batch(batch, this.mesh)
        if compiled is None:
            compiled = _compile(train_step, state, batch, this.say)
            meter.restart_clock()
        state, metrics = compiled(state, batch)
        step += 1
        _record(this, meter.push(step, metrics, _about_data(stream) if meter.due(step) else {}), rate)
        this.say.advance(step)

        interval = config.checkpoint.interval
        if (interval and step % interval == 0) or step == config.steps or this.stop.signal:
            _record(this, meter.flush(), rate)
            this.checkpoints.save(state, {"data": stream.state(), "meter": meter.state()}, config)
        if _evaluation_due(config, step) and not this.stop.signal:
            _record(this, meter.flush(), rate)
            this.evaluate(state, config.eval.limit)
            meter.restart_clock()
    return state, step


def _compile(train_step: Any, state: TrainState, batch: Any, say: _Reporter) -> Any:
    before = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    say(f"training step compiled in {time.perf_counter() - before:.1f} s")
    return compiled


def _about_data(stream: BatchStream) -> dict[str, Any]:
    report = stream.report()
    return {"token_fill": report["token_fill"], "vision_ratio": report["ratio"], "data": report}


def _record(this: _Run, row: dict[str, Any] | None, rate: float) -> None:
    """Logs a row if there is one. Raises Diverged after too many steps without a finite loss."""
    if this.meter.skipped_now:
        this.say(f"WARNING: loss or gradient of step {this.meter.fetched_step} is not finite; its update is left out")
    if this.meter.skipped_in_row >= MAX_SKIPPED_IN_ROW:
        raise Diverged(
            f"loss or gradient not finite for {this.meter.skipped_in_row} steps in a row, the last one step "
            f"{this.meter.fetched_step}. The weights in the checkpoints of {this.config.workdir} are sound; go on with "
            f"a lower --config.optimizer.peak_lr, or look at the batches with python -m kimi_jax.data inspect"
        )
    if row is not None:
        row["mfu"] = row["flops_per_s"] / rate
        this.log.train(row)
        this.say.row(row)


def _evaluation_due(config: TrainConfig, step: int) -> bool:
    """In the course of training; the end has its own."""
    every = config.eval.interval
    return bool(config.eval.tasks) and every > 0 and 0 < step < config.steps and step % every == 0


def _evaluate_at_end(this: _Run, state: TrainState) -> None:
    results = epath.Path(this.config.workdir) / "results.json"
    if this.config.eval.tasks and not (results.exists() and this.config.steps in this.log.evaluated()):
        from kimi_jax.eval.__main__ import write_rows, write_samples

        samples: list[Any] = []
        rows = this.evaluate(state, this.config.eval.final_limit, samples)
        write_samples(samples, results.parent / "samples")
        write_rows(rows, results)


def _check(config: TrainConfig) -> None:
    """Raises ConfigError now for what would otherwise fail an hour later."""
    if config.eval.tasks:
        from kimi_jax.eval.tasks import resolve

        try:
            resolve(config.eval.tasks)
        except KeyError as error:
            raise ConfigError(f"config.eval.tasks: {error.args[0]}") from error
    if config.log_interval < 1 or config.checkpoint.interval < 0 or config.checkpoint.keep < 1:
        raise ConfigError("config.log_interval and checkpoint.keep must be at least 1, checkpoint.interval at least 0")


# ------------------------------------------------------------------------------------------------- talking and stopping


def describe(config: TrainConfig) -> list[str]:
    """What sets this run apart, as lines: the preset its model is nearest to, and every setting off its default."""
    name = min(PRESETS, key=lambda n: len(diff(config.model, preset(n))))
    lines = diff(config, TrainConfig(model=preset(name)))
    return [f"config.model = preset {name!r}", *(textwrap.shorten(line, 160, placeholder=" ...") for line in lines)]


class _Reporter(contextlib.AbstractContextManager):
    """Prints lines; on a terminal with a progress bar below them, elsewhere with one line a log interval."""

    def __init__(self, steps: int):
        self._steps, self._start = steps, time.monotonic()
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(highlight=False))
        self._task = self._bar.add_task("", total=steps)
        self._live = self._bar.console.is_terminal

    def __enter__(self) -> _Reporter:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, *lines: str) -> None:
        for line in lines:
            if self._live:
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                print(line, flush=True)

    def advance(self, step: int) -> None:
        if self._live:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        line = progress_line(row)
        if self._live:
            self._bar.update(self._task, description=line)
        else:
            print(f"{row['step']:>{len(str(self._steps))}}/{self._steps}  {line}", flush=True)


class _Stop(contextlib.AbstractContextManager):
    """Turns the first SIGINT or SIGTERM into a request to stop after this step; the second one acts at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self.signal = 0

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _request(self, number: int, frame: Any) -> None:
        self.__exit__()
        self.signal = number
        # print() may be what was interrupted, and it must not be entered twice
        os.write(2, b"\nstopping: saving after this step; once more to stop at once without saving\n")
