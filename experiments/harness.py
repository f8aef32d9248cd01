"""Experiments as data: a question, a base configuration, rows of named overrides, seeds, scores, and claims.

A run is a row at a seed and has a workdir of its own, `RUNS/NAME/SCALE/ROW/SEED`, so that it goes on where it was
stopped, bit for bit, like any other run (kimi_jax.train.loop). What a finished run measured becomes records, one JSON
line each, in the folder of the experiment:

    results/SCALE/ROW.jsonl   scores of finished runs
    curves/SCALE/ROW.jsonl    the same through training

    {"row", "seed", "config" (hash), "commit", "task", "step", "score", "n"}

A run whose records are there with the hash of its present configuration is not run again, on whatever machine they
were made. Claims are functions of the table of records, so that no text can disagree with the numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import statistics
from kimi_jax.config import TrainConfig, diff, override
from kimi_jax.train.log import read_rows, write_atomic

HERE = Path(__file__).parent
CONFIRMED, UNDECIDED, CONTRADICTED = "confirmed at this scale", "not distinguishable", "contradicted"

Record = dict[str, Any]
# Settings of sections that are off by default, which a hash writes out whole, at the defaults that they had when they
# were added: left out, so that records from before keep their hashes.
ADDED = ("subagents='script', ", ", endpoints=(), endpoint_seconds=600.0, endpoint_tries=8")


@dataclass(frozen=True)
class Score:
    """A column of the score table. `task` is `TASK/METRIC` of an evaluation, or a name of `Experiment.measure`."""

    task: str
    label: str
    higher_is_better: bool
    control: str = ""  # the column's control is the record of this task: a score that its control reaches says nothing
    digits: int = 3


@dataclass(frozen=True)
class Verdict:
    """What the table says of a claim, and the estimate that it was judged by (None: too few runs)."""

    outcome: str
    estimate: statistics.Estimate | None


@dataclass(frozen=True)
class Claim:
    """A sentence and the function of the table that judges it."""

    text: str
    judge: Callable[[ResultsTable], Verdict]


@dataclass(frozen=True)
class Experiment:
    """One question and the runs that answer it.

    base: scale ("smoke", "cpu", "pod") -> configuration; rows change it by `kimi_jax.config.override`. A row that
      holds a dict under a scale's name has these changes beside the others at that scale.
    seeds: of data order and initial weights alike, so that rows are paired. by_seed: (configuration, seed) -> what it
      is for this seed where more follows from it, such as the weights that the run begins with.
    untrained: rows that are scored as they begin (`init_from`), without a step of training.
    tasks, limit: scored with the final weights, so many questions each; `scoring` overrides shapes for it.
    prepare: writes data, or the weights, that a run begins with. measure: workdir -> {name: (score, n)} from a run's
      log or its weights; of an untrained row the workdir is that of `init_from`.
    check: table -> sentences about what must hold for rows to be comparable. Raises ValueError where it does not.
    curves: names of evaluations during training that are kept. plots: writes the files of `captions` into a folder.
    """

    name: str
    question: str
    source: str
    setting: str
    base: Mapping[str, Callable[[], TrainConfig]]
    rows: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    scores: tuple[Score, ...]
    claims: tuple[Claim, ...]
    by_seed: Callable[[TrainConfig, int], TrainConfig] = lambda config, seed: config
    untrained: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int = 256
    scoring: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[TrainConfig], None] = lambda config: None
    measure: Callable[[Path], Mapping[str, tuple[float, int]]] = lambda workdir: {}
    check: Callable[[ResultsTable], list[str]] = lambda table: []
    curves: tuple[str, ...] = ()
    plots: Callable[[ResultsTable, Path], None] = lambda table, folder: None
    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""

    @property
    def folder(self) -> Path:
        """Where records, plots and README are."""
        return HERE / self.name

    def config(self, row: str, seed: int, scale: str, runs: str = "runs/experiments") -> TrainConfig:
        """The configuration of a run. Raises KeyError for an unknown row or scale, ConfigError for a bad override."""
        changes = {k: v for k, v in self.rows[row].items() if not isinstance(v, dict)} | self.rows[row].get(scale, {})
        workdir = f"{runs}/{self.name}/{scale}/{row}/{seed}"
        config = override(self.base[scale](), {**changes, "seed": seed, "data.seed": seed, "workdir": workdir})
        return self.by_seed(config, seed)

    def runs(self) -> list[tuple[str, int]]:
        """(row, seed) of every run, seed by seed, so that whatever is finished is as balanced as can be."""
        return [(row, seed) for seed in self.seeds for row in self.rows]


class ResultsTable:
    """The records of an experiment at one scale, those of its present configurations only."""

    def __init__(self, experiment: Experiment, scale: str, records: Sequence[Record], curves: Sequence[Record] = ()):
        self.experiment, self.scale, self.records, self.curves = experiment, scale, list(records), list(curves)

    def values(self, row: str, task: str) -> dict[int, float]:
        """Seed -> score of the finished runs of a row."""
        return {r["seed"]: r["score"] for r in self.records if r["row"] == row and r["task"] == task}

    def curve(self, row: str, seed: int, task: str) -> list[tuple[int, float]]:
        """(step, score) of a run, ascending."""
        found = [r for r in self.curves if (r["row"], r["seed"], r["task"]) == (row, seed, task)]
        return sorted((r["step"], r["score"]) for r in found)

    def seeds(self, row: str) -> list[int]:
        """Seeds of the finished runs of a row."""
        return sorted({r["seed"] for r in self.records if r["row"] == row})


# --------------------------------------------------------------------------------------------------------------- claims


def judge(values: Sequence[float], above: float = 0.0) -> Verdict:
    """Whether the mean of the values is above a bound: the interval lies above it, below it, or holds it."""
    if len(values) < 2:
        return Verdict(UNDECIDED, None)
    found = statistics.estimate(values)
    outcome = CONFIRMED if found.low > above else CONTRADICTED if found.high < above else UNDECIDED
    return Verdict(outcome, found)


def better(
    task: str, row: str, than: str, *, lower: bool = False, by: float = 0.0
) -> Callable[[ResultsTable], Verdict]:
    """Claim that `row` scores better than another in `task` by more than `by`, in paired differences over seeds."""

    def judged(table: ResultsTable) -> Verdict:
        a, b = table.values(row, task), table.values(than, task)
        return judge(statistics.paired(b, a) if lower else statistics.paired(a, b), by)

    return judged


def equivalent(task: str, row: str, other: str, margin: float) -> Callable[[ResultsTable], Verdict]:
    """Claim that two rows differ in `task` by less than `margin`: the whole interval must lie within it."""

    def judged(table: ResultsTable) -> Verdict:
        differences = statistics.paired(table.values(row, task), table.values(other, task))
        if len(differences) < 2:
            return Verdict(UNDECIDED, None)
        found = statistics.estimate(differences)
        outside = found.low > margin or found.high < -margin
        inside = -margin < found.low and found.high < margin
        return Verdict(CONFIRMED if inside else CONTRADICTED if outside else UNDECIDED, found)

    return judged


def above(task: str, row: str, bound: float) -> Callable[[ResultsTable], Verdict]:
    """Claim that a measure of one row is above a bound, over seeds."""
    return lambda table: judge(list(table.values(row, task).values()), bound)


def above_control(score: str, row: str, control: str) -> Callable[[ResultsTable], Verdict]:
    """Claim that a score of one row is above its control, which asks the same questions with other evidence."""

    def judged(table: ResultsTable) -> Verdict:
        return judge(statistics.paired(table.values(row, score), table.values(row, control)))

    return judged


# ------------------------------------------------------------------------------------------------------------ preparing


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, this process alone holds the lock file: runs that prepare the same things wait for the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------------------------------- records


def config_hash(config: TrainConfig) -> str:
    """Names a configuration by what is off its default, without `workdir`: new settings leave old hashes alone."""
    lines = diff(dataclasses.replace(config, workdir=""), TrainConfig(workdir=""))
    named = [line.split(" (default ")[0] for line in lines]
    for setting in ADDED:
        named = [line.replace(setting, "") for line in named]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:12]


def commit() -> str:
    """The commit of the working tree, with a plus sign if files of the package or of `experiments` differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../kimi_jax", "*.py")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def read_table(experiment: Experiment, scale: str, folder: Path | None = None) -> ResultsTable:
    """The records of runs with their present configuration; others are left in their files and not read."""
    folder = folder or experiment.folder
    found: dict[str, list[Record]] = {"results": [], "curves": []}
    for row in experiment.rows:
        hashes = {seed: config_hash(experiment.config(row, seed, scale)) for seed in experiment.seeds}
        for kind, kept in found.items():
            rows = read_rows(folder / kind / scale / f"{row}.jsonl")
            kept += [r for r in rows if hashes.get(r.get("seed")) == r.get("config")]
    return ResultsTable(experiment, scale, found["results"], found["curves"])


def add_records(experiment: Experiment, scale: str, row: str, seed: int, kind: str, records: list[Record],
                folder: Path | None = None) -> None:  # fmt: skip
    """Puts the records of a run into their file, in the place of older ones of that run."""
    path = (folder or experiment.folder) / kind / scale / f"{row}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [r for r in read_rows(path) if r["seed"] != seed] + records
    kept.sort(key=lambda r: (r["seed"], r["task"], r["step"]))
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in kept))


def missing(table: ResultsTable) -> list[tuple[str, int]]:
    """(row, seed) of the runs without records."""
    done = {(r["row"], r["seed"]) for r in table.records}
    return [run for run in table.experiment.runs() if run not in done]
