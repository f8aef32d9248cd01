"""The training loop: settings in, checkpoints and a log out. Reads from top to bottom.

A run is its `workdir`: the same command started again goes on from the newest checkpoint, on the same numbers as if it
had never stopped.
  config.json, tokenizer/   the settings, a copy of the tokenizer (kimi_jax.train.inputs)
  run.lock                  who trains here now (kimi_jax.train.lock)
  checkpoints/N             the run after N steps (kimi_jax.train.checkpoint)
  metrics.jsonl, eval.jsonl one row a log interval, one an evaluation (kimi_jax.train.log); tensorboard/ the same
  quarantine.jsonl          the records that could not be used
  results.json, samples/    the final evaluation
  xprof/                    a trace of some steps, if `config.profile` asks for one
  xla/                      compiled programs, with several hosts

What is minimised and where batches come from are values handed to it (kimi_jax.train.objective, .batches): SFT and
reinforcement learning are this same loop.

With several hosts (kimi_jax.hosts) all of them run this same file on their part of the batch; host 0 alone prints
and writes the log, and whatever could differ between them (a signal, a file just written) is agreed on first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from kimi_jax import cli, hosts, sharding
from kimi_jax.config import PRESETS, ConfigError, TrainConfig, check, diff, preset
from kimi_jax.config_check import check_run
from kimi_jax.train import adapters, init_from, inputs, lock, xla_flags
from kimi_jax.train import state as state_lib
from kimi_jax.train.batches import BatchSource, OpenBatches, SourceUnavailable, open_stream
from kimi_jax.train.checkpoint import Checkpoints
from kimi_jax.train.console import Interrupted, Reporter, Stop, exit_status
from kimi_jax.train.fill import FillWatch
from kimi_jax.train.goodput import Goodput, Idle
from kimi_jax.train.log import Log, write_atomic
from kimi_jax.train.metrics import Meter, measure_matmul_rate, parameter_table
from kimi_jax.train.objective import Objective
from kimi_jax.train.state import TrainState
from kimi_jax.train.step import make_optimizer, make_train_step
from kimi_jax.train.xprof import Trace

NOT_SAVED = 74  # exit status: training is done, but its end could not be written (EX_IOERR)
DATA_PATIENCE = 5.0  # seconds that a run asked to stop still waits for the batch it is waiting for


class Diverged(RuntimeError):
    """The loss was not finite, or spiked, for many steps in a row, and going back did not help."""


class StorageError(RuntimeError):
    """The workdir cannot be written when the run starts."""


class StorageUnavailable(StorageError):
    """It cannot be written just now: the disk is full, read-only or fails. A later start may succeed."""


# of the disk or the machine, not of the settings
PASSING = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE,
    errno.ENFILE, errno.ESTALE,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a run is made of beside its settings; None: as in pre-training."""

    objective: Objective | None
    batches: OpenBatches
    evaluate: Callable[..., list[Any]] | None


def run(
    config: TrainConfig,
    *,
    objective: Objective | None = None,
    batches: OpenBatches | None = None,
    evaluate: Callable[..., list[Any]] | None = None,
) -> int:
    """Trains, evaluates and saves. Returns the exit status.

    objective: what is minimised, default `objective.next_token()`. batches: opens the source of batches, default the
    data stream of `config.data`; also called when a run goes on, with the source's state in the checkpoint. evaluate:
    called as `eval.runner.evaluate` and in its place, for `config.eval.tasks` of its own.

    0 complete; 75 stopped by SIGTERM, saved, to be started again; 130 stopped by Ctrl-C, saved; 74 complete but the
    end is not saved. Raises CheckpointMismatch (the workdir holds another model), NoCheckpoint, CheckpointUnavailable,
    WorkdirBusy, StorageError, Diverged, HostMissing, SourceUnavailable (saved), and whatever the data or the settings
    raise.
    """
    with Stop() as stop:
        try:
            return _run(config, _Given(objective, batches or open_stream, evaluate), stop)
        except Interrupted:  # before the first step, or in an evaluation, which the next start makes again
            return exit_status(stop.signal)


def _run(config: TrainConfig, given: _Given, stop: Stop) -> int:
    clock = Goodput()
    with stop.raising(0.0):
        hosts.start()
    # jax lets host 0 alone write the cache, so several hosts need one that all of them see
    cache = cli.enable_compilation_cache(config.workdir if jax.process_count() > 1 else None)
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Reporter(config.steps, quiet=not hosts.is_first()))
        # until there is something to save a signal ends the run at once; several hosts agree on it after a step
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(stop.raising(0.0 if jax.process_count() == 1 else None))
        _check(config, own_tasks=given.evaluate is not None)
        _lock(config, stack, console)
        mesh = sharding.make_mesh(config.mesh)
        config, base = adapters.load_base(config, mesh)
        console(*describe(config), f"compiled programs are kept in {cache}")

        # --------------------------------------------------------------------------------------- model, optimizer
        optimizer = make_optimizer(config, mesh)
        init_state, train_step = make_train_step(config, mesh, given.objective, optimizer)
        abstract = state_lib.abstract(config.model, optimizer, mesh, config.lora)
        console(parameter_table(state_lib.infos(config.model, config.lora, config.freeze), abstract.params))

        # -------------------------------------------------------------------------------- where the run stands
        with _storage(config):
            checkpoints = stack.enter_context(
                contextlib.closing(Checkpoints(config.workdir, config.checkpoint, console))
            )
        with clock.spend("restore"):
            restored = checkpoints.restore(abstract, config)
        step = restored.step if restored else 0
        state = dataclasses.replace(restored.state if restored else init_state(), frozen=base)
        if not restored:
            with clock.spend("restore"):
                state = dataclasses.replace(state, params=init_from.start(config, state.params, mesh, console))
        host = restored.host if restored else {"data": None, "meter": None}
        fed = inputs.fingerprint(config.data)
        if restored:
            inputs.check(restored.config, host.get("inputs"), config, fed)
            console(f"going on from the checkpoint of step {step}")
            changes = [line.replace("(default ", "(was ") for line in diff(config, restored.config)]
            console(*(f"  changed since then: {line}" for line in changes))
            clock.restore(restored.host.get("goodput"))
        with _storage(config):
            log = stack.enter_context(contextlib.closing(Log(config.workdir, step, console, hosts.is_first())))
        if hosts.is_first():
            with _storage(config):
                write_atomic(
                    epath.Path(config.workdir) / "config.json", json.dumps(dataclasses.asdict(config), indent=1)
                )
                inputs.keep_tokenizer(config)
        meter = Meter(config.model, config.log_interval, config.steps, host["meter"])
        idle = stack.enter_context(contextlib.closing(Idle()))
        trace = stack.enter_context(Trace(config.profile, config.workdir, console))
        fill = FillWatch(host.get("fill"))
        this = _Run(config, given, mesh, checkpoints, log, meter, clock, idle, trace, stop, console, fill, fed)

        # ------------------------------------------------------------------------------------------- train, end
        starting.close()
        return _work(this, train_step, abstract, state, step, host["data"])


@contextlib.contextmanager
def _storage(config: TrainConfig) -> Iterator[None]:
    """Makes an OSError inside a StorageError: a workdir that cannot be written when a run starts."""
    try:
        yield
    except OSError as error:
        kind = StorageUnavailable if error.errno in PASSING else StorageError
        raise kind(
            f"the workdir {config.workdir} cannot be written ({error}); make room, or use another --config.workdir"
        ) from error


def _lock(config: TrainConfig, stack: contextlib.ExitStack, console: Reporter) -> None:
    """Host 0 takes the lock of the workdir for all; what it cannot do is raised on every host."""
    problem = None
    if hosts.is_first():
        try:
            with _storage(config):
                stack.enter_context(lock.held(config.workdir, console))
        except (lock.WorkdirBusy, StorageError) as error:
            problem = [type(error).__name__, str(error)]
    problem = hosts.gather(problem)[0]
    if problem:
        kinds = {kind.__name__: kind for kind in (lock.WorkdirBusy, StorageError, StorageUnavailable)}
        raise kinds[problem[0]](problem[1])


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every part of the loop uses."""

    config: TrainConfig
    given: _Given
    mesh: Mesh
    checkpoints: Checkpoints
    log: Log
    meter: Meter
    clock: Goodput
    idle: Idle
    trace: Trace
    stop: Stop
    console: Reporter
    fill: FillWatch
    fed: dict[str, Any]  # fingerprint of the tokenizer and the sources

    def evaluate(self, state: TrainState, limit: int, samples: list | None = None) -> list[Any]:
        """Runs the tasks of the settings, prints and logs the scores; returns the rows of `kimi_jax.eval.runner`.

        Raises Interrupted when a signal comes meanwhile: an evaluation may be long and can be recomputed.
        """
        from kimi_jax.eval.runner import evaluate as evaluate_registered

        evaluate = self.given.evaluate or evaluate_registered
        step, before = int(state.step), time.perf_counter()
        self.console(f"step {step}: evaluating {', '.join(self.config.eval.tasks)}, up to {limit} questions each")
        with self.clock.spend("evaluation"), self.stop.raising(0.0 if jax.process_count() == 1 else None):
            rows = evaluate(
                state.params, self.config, self.config.eval.tasks, limit, samples=samples, frozen=state.frozen
            )
        self.log.evaluation(step, [dataclasses.asdict(row) for row in rows])
        for row in rows:
            scored = f"{row.metric:<16}{row.score:.3f} +- {row.stderr:.3f}"
            self.console(f"  {row.task:<28}{scored}  {row.control_name} {row.control:.3f}  chance {row.chance:.3f}")
        self.console(f"  in {time.perf_counter() - before:.0f} s")
        return rows

    def evaluated(self) -> set[int]:
        """Steps whose evaluation is in the log of host 0."""
        return set(hosts.gather(sorted(self.log.evaluated()) if hosts.is_first() else [])[0])

    def save(self, state: TrainState, source: BatchSource) -> None:
        """Starts a checkpoint; the meter must be flushed."""
        self.log.flush()
        with self.clock.spend("checkpoint"):
            host = {
                "data": source.state(),
                "meter": self.meter.state(),
                "goodput": self.clock.state(),
                "fill": self.fill.state(),
            }
            host["inputs"] = self.fed
            self.checkpoints.save(state, host, self.config)

    def save_and_wait(self, state: TrainState, source: BatchSource) -> None:
        """The same, before an error ends the run."""
        self.save(state, source)
        self.checkpoints.wait()


# ---------------------------------------------------------------------------------------------------------------- steps


def _work(this: _Run, train_step: Any, abstract: TrainState, state: TrainState, step: int, data: dict | None) -> int:
    """From `step` to the end, evaluations included; the exit status. Raises Interrupted from an evaluation."""
    config, console, signal = this.config, this.console, 0
    if step < config.steps:
        if _evaluation_due(config, step) and step not in this.evaluated():  # killed in the middle of it
            this.evaluate(state, config.eval.limit)
        rate = measure_matmul_rate(this.mesh, config.model.dtype)  # while no data worker competes
        devices = f"{this.mesh.size} x {jax.devices()[0].device_kind}"
        console(f"{devices}: plain {config.model.dtype} matmuls reach {rate / 1e9:,.0f} GFLOP/s (MFU 100 %)")
        packs = sharding.local_packs(config.data.num_packs, this.mesh)
        with contextlib.closing(this.given.batches(config, packs, data)) as source:
            with this.clock.spend("steps"):
                state, step, signal = _train(this, train_step, abstract, source, state, step, rate)
    with this.clock.spend("checkpoint"):
        saved = this.checkpoints.wait()
    console(this.clock.line())
    if signal:
        how = "saved" if saved else "NOT saved"
        console(f"stopped at step {step} of {config.steps}; {how}. The same command goes on from there.")
        return exit_status(signal)
    if not saved:
        console(f"step {step} is NOT saved; make room in {config.workdir} and start again")
        return NOT_SAVED
    _evaluate_at_end(this, state)
    console(f"done: {step} steps, in {config.workdir}. For more, raise --config.steps and run again.")
    return 0


def _train(
    this: _Run, train_step: Any, abstract: TrainState, source: BatchSource, state: TrainState, step: int, rate: float
) -> tuple[TrainState, int, int]:
    """Steps until the end or a signal; returns the state and its step, being saved, and the signal if there was one."""
    config, meter = this.config, this.meter
    compiled, vote, stop = None, hosts.Vote(), 0
    while step < config.steps and not stop:
        source.update(state.params, step)
        try:
            batch = _next_batch(this, source)
        except SourceUnavailable:
            _record(this, meter.flush(), rate)
            this.save_and_wait(state, source)
            raise
        if batch is None:
            stop = this.stop.signal
            if source.report()["batches"] == step:  # else the batch that came with the signal would be lost to the run
                _record(this, meter.flush(), rate)
                this.save(state, source)
            break
        batch = sharding.put_batch(batch, this.mesh)
        if compiled is None:
            with this.clock.spend("compile"):
                compiled = _compile(this, train_step, state, batch)
            meter.restart_clock()
        step += 1
        this.trace.begin(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = compiled(state, batch)
        this.idle.watch(metrics)
        this.trace.end(step, metrics)
        vote.ask(this.stop.signal)
        _record(this, meter.push(step, metrics, _about_data(this, source) if meter.due(step) else {}), rate)
        if meter.skipped_in_row >= config.recovery.max_skipped_in_row:
            state = _roll_back(this, abstract, state, step, rate)
        this.console.advance(step)

        stop = vote.answer()
        interval = config.checkpoint.interval
        if (interval and step % interval == 0) or step == config.steps or stop:
            _record(this, meter.flush(), rate)
            this.save(state, source)
        if _evaluation_due(config, step) and not stop:
            _record(this, meter.flush(), rate)
            try:
                this.evaluate(state, config.eval.limit)
            except Interrupted:
                stop = this.stop.signal
                this.save(state, source)
            except SourceUnavailable:  # what draws rollouts answers questions too
                this.save_and_wait(state, source)
                raise
            meter.restart_clock()
    return state, step, stop


def _next_batch(this: _Run, source: BatchSource) -> Any:
    """The next batch, or None if none came in time after a signal."""
    before = time.monotonic()
    try:
        with this.stop.raising(DATA_PATIENCE if jax.process_count() == 1 else None):
            return next(source)
    except Interrupted:
        return None
    finally:
        this.clock.move(this.idle.since(before), "data")
        this.meter.waited(time.monotonic() - before)


def _compile(this: _Run, train_step: Any, state: TrainState, batch: Any) -> Any:
    before = time.perf_counter()
    options = xla_flags.options(list(this.mesh.devices.flat), this.config.xla_preset)
    this.console(*(f"option of the compiler: {name}={value}" for name, value in options.items()))
    compiled = train_step.lower(state, batch).compile(compiler_options=options)
    this.console(f"training step compiled in {time.perf_counter() - before:.1f} s")
    hosts.wait_for_all("training step compiled")
    return compiled


def _about_data(this: _Run, source: BatchSource) -> dict[str, Any]:
    report = source.report()
    this.log.quarantine(report.pop("quarantined", {}))
    this.fill(report, this.config.data, this.config.steps, this.console)
    return {"token_fill": report.get("token_fill"), "vision_ratio": report.get("ratio"), "data": report}


def _record(this: _Run, row: dict[str, Any] | None, rate: float) -> None:
    """Logs a row if there is one, and what went wrong if something did."""
    if this.meter.skipped_now:
        this.console(f"WARNING: step {this.meter.fetched_step}: {this.meter.skipped_now}; its update is left out")
    if row is not None:
        row |= {"mfu": row["flops_per_s"] / rate, **this.clock.row()}
        this.log.train(row)
        this.console.row(row)
        this.checkpoints.check_errors()


def _roll_back(this: _Run, abstract: TrainState, state: TrainState, step: int, rate: float) -> TrainState:
    """Weights and moments from before the trouble, with the counters of now. Raises Diverged if that is not allowed.

    The batches since then count as skipped, so that the learning rate goes on from the updates really made. Data and
    log go on as they are: a step is never repeated, and what upset the run does not come again.
    """
    meter, recovery = this.meter, this.config.recovery
    with this.clock.spend("checkpoint"):
        this.checkpoints.wait()
    found = None
    if meter.rollbacks < recovery.max_rollbacks:
        with this.clock.spend("restore"):
            found = this.checkpoints.restore(abstract, this.config, healthy=True)
    if found is None:
        tried = f", after going back {meter.rollbacks} times" if meter.rollbacks else ""
        raise Diverged(
            f"{recovery.max_skipped_in_row} steps in a row, the last one step {meter.fetched_step}, had a loss or "
            f"gradient that is not finite or spikes{tried}. The weights in the checkpoints of {this.config.workdir} "
            "are healthy; go on with a lower --config.optimizer.peak_lr, allow returns to a checkpoint with "
            "--config.recovery.max_rollbacks, or look at the batches with python -m kimi_jax.data inspect"
        )
    _record(this, meter.flush(), rate)  # of the step under way, which counts as skipped like the others
    meter.rollbacks += 1
    meter.skipped_in_row = 0
    this.console(
        f"WARNING: going back to the weights of step {found.step} ({meter.rollbacks} of {recovery.max_rollbacks} times "
        f"allowed); the {step - found.step} batches since then are left out"
    )
    updates = found.state.step - found.state.skipped
    return dataclasses.replace(found.state, step=state.step, skipped=state.step - updates, frozen=state.frozen)


def _evaluation_due(config: TrainConfig, step: int) -> bool:
    """In the course of training; the end has its own."""
    every = config.eval.interval
    return bool(config.eval.tasks) and every > 0 and 0 < step < config.steps and step % every == 0


def _evaluate_at_end(this: _Run, state: TrainState) -> None:
    results = epath.Path(this.config.workdir) / "results.json"
    if this.config.eval.tasks and not (results.exists() and this.config.steps in this.evaluated()):
        from kimi_jax.eval.__main__ import write_rows, write_samples

        samples: list[Any] = []
        rows = this.evaluate(state, this.config.eval.final_limit, samples)
        if hosts.is_first():
            write_samples(samples, results.parent / "samples")
            write_rows(rows, results)


def _check(config: TrainConfig, own_tasks: bool = False) -> None:
    """Raises ConfigError now for what would otherwise fail an hour later. own_tasks: names that are not registered."""
    check(config)
    check_run(config)
    if config.eval.tasks and not own_tasks:
        from kimi_jax.eval.tasks import resolve

        try:
            tasks = resolve(config.eval.tasks)
        except KeyError as error:
            raise ConfigError(f"config.eval.tasks: {error.args[0]}") from error
        texts = [task.name for task in tasks if task.kind == "generate"]
        lora = config.lora
        if texts and lora is not None and lora.experts == "int4" and "experts" in lora.targets:
            raise ConfigError(
                f"config.eval.tasks: {', '.join(texts)} generate text, which adapters of INT4 experts cannot; "
                "leave these tasks out, or use --config.lora.experts=float"
            )


def describe(config: TrainConfig) -> list[str]:
    """What sets this run apart, as lines: the preset its model is nearest to, and every setting off its default."""
    name = min(PRESETS, key=lambda n: len(diff(config.model, preset(n))))
    lines = diff(config, TrainConfig(model=preset(name)))
    return [f"config.model = preset {name!r}", *(textwrap.shorten(line, 160, placeholder=" ...") for line in lines)]
