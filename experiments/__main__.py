"""python -m experiments NAME [--scale=cpu] [--cores=0,1] [--limit=N] [--list] [--report]

Lists what an experiment would run and how long it takes, runs or goes on with what is missing, and writes its README
and plots from the records.

  --list      only say what there is and what is missing
  --report    only write README and plots again
  --scale     "cpu" (two cores, minutes a run), "smoke" (seconds), "pod" (checked by `plan`, never run from here)
  --cores     the cores to use, one run each; default: all that this process may use
  --rows      only these rows, names joined by commas
  --limit     at most so many runs
"""

import os
import sys
from pathlib import Path

from absl import app, flags

from kimi_jax.config import ConfigError

_SCALE = flags.DEFINE_enum("scale", "cpu", ["smoke", "cpu", "pod"], "Which configurations the rows change.")
_CORES = flags.DEFINE_list("cores", [], "Cores to use, one run each.")
_ROWS = flags.DEFINE_list("rows", [], "Only these rows.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most so many runs; 0: all.", lower_bound=0)
_LIST = flags.DEFINE_bool("list", False, "Only say what there is and what is missing.")
_REPORT = flags.DEFINE_bool("report", False, "Only write README and plots again.")
_RUNS = flags.DEFINE_string("runs", "runs/experiments", "Where workdirs go.")


def main(argv: list[str]) -> int:
    """Runs the command line; exit status 1 if a run failed."""
    from experiments import report, run

    if len(argv) != 2:
        raise SystemExit(f"error: which experiment? One of: {', '.join(run.NAMES)}   (--help for more)")
    try:
        experiment = run.load(argv[1])
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    unknown = sorted(set(_ROWS.value) - set(experiment.rows))
    if unknown:
        raise SystemExit(f"error: no row {unknown[0]!r}; there are: {', '.join(experiment.rows)}")
    if _SCALE.value not in experiment.base:
        raise SystemExit(f"error: {experiment.name} has the scales {', '.join(experiment.base)}, not {_SCALE.value}")
    cores = [int(core) for core in _CORES.value] or sorted(os.sched_getaffinity(0))
    # only the results at the scale of two cores are worth keeping
    folder = experiment.folder if _SCALE.value == report.SCALE else Path(_RUNS.value, experiment.name, _SCALE.value)
    print("\n".join(run.rows_of_plan(experiment, _SCALE.value, len(cores), folder)))
    if _LIST.value:
        return 0
    if _SCALE.value == "pod":
        row = next(row for row in experiment.rows if row not in experiment.untrained)
        name = f"{experiment.name}/{row}/{experiment.seeds[0]}@pod"
        print(f"not run from here; check it with: python -m kimi_jax.plan --config=experiments/config.py:{name} "
              "--topology=v5p:8x8x16, and start each run with python -m kimi_jax.train on the pod")  # fmt: skip
        return 0
    failed = []
    if not _REPORT.value:
        failed = run.run_missing(
            experiment, _SCALE.value, cores=cores, runs=_RUNS.value, only=_ROWS.value, limit=_LIMIT.value,
            folder=folder,
        )  # fmt: skip
        print("\n".join(f"error: {line}" for line in failed))
    print(f"written: {report.write(experiment, _SCALE.value, folder)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.argv[0] = "python -m experiments"
    app.run(main)
