"""python -m experiments.swarm_robustness.run: the sweep, its results, the page and the plots.

    --report    only write the page and the plots again, from results.jsonl

Every number is a function of families, seeds and settings below: a second run writes the same file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import statistics
from experiments.swarm_robustness import figures, page
from experiments.swarm_robustness.simulate import FAULTS, POLICIES, Result, simulate
from kimi_jax.agents.families import FAMILIES, Knobs, Task, make
from kimi_jax.train.log import write_atomic

HERE = Path(__file__).parent
SEEDS = range(20)  # tasks of a family; paired between policies, faults and levels
ITEMS, SLOTS = 12, 8
FAULT_FAMILIES = ("wide", "mixed", "trap")
SLOT_COUNTS = (1, 2, 4, 8, 16, 32)
ITEM_COUNTS = (2, 4, 8)
Row = dict[str, Any]


def cell(tasks: list[Task], alone: list[Result], run: Callable[[Task], Result]) -> Row:
    """One line of results: a setting over all tasks, beside the sequential runs of the same tasks.

    gain: sequential time over time, the geometric mean; f1_change: of item F1. Both with the 95 % interval over tasks
    and the smallest effect that so many tasks would show. work_ratio: steps over sequential steps, for tokens.
    time_used, work_used: in multiples of a task's T1, the largest of all tasks. peak: most subagents at once.
    """
    runs = [run(task) for task in tasks]
    pairs = list(zip(runs, alone, strict=True))
    gain = statistics.estimate([math.log(other.time / one.time) for one, other in pairs])
    change = statistics.estimate([one.score.item_f1 - other.score.item_f1 for one, other in pairs])
    n = len(runs)
    values = {
        "gain": math.exp(gain.mean),
        "gain_low": math.exp(gain.low),
        "gain_high": math.exp(gain.high),
        "gain_smallest": math.exp(gain.smallest),
        "item_f1": sum(one.score.item_f1 for one in runs) / n,
        "row_f1": sum(one.score.row_f1 for one in runs) / n,
        "success": sum(one.score.success for one in runs) / n,
        "f1_change": change.mean,
        "f1_low": change.low,
        "f1_high": change.high,
        "f1_smallest": change.smallest,
        "work_ratio": sum(one.work for one in runs) / sum(other.work for other in alone),
        "critical_steps": sum(one.critical_steps for one in runs) / n,
        "time": sum(one.time for one in runs) / n,
        "oracle_parallelism": sum(task.work / task.span for task in tasks) / n,
        "time_used": max(one.time / task.work for one, task in zip(runs, tasks, strict=True)),
        "work_used": max(one.work / task.work for one, task in zip(runs, tasks, strict=True)),
        "peak": max(one.peak for one in runs),
    }
    return {"n": n} | {name: round(value, 6) for name, value in values.items()}


def sweep(seeds: range = SEEDS) -> Iterator[Row]:
    """All lines of results, one setting after the other."""
    for family in FAMILIES:
        for items in (*ITEM_COUNTS, ITEMS):
            tasks = [make(family, seed, Knobs(items=items)) for seed in seeds]
            alone = [simulate(task, "sequential") for task in tasks]
            for slots in SLOT_COUNTS if items == ITEMS else (SLOTS,):
                for policy in POLICIES[1:]:
                    row = cell(tasks, alone, lambda task, p=policy, s=slots: simulate(task, p, slots=s))
                    yield {"sweep": "scale", "family": family, "policy": policy, "items": items, "slots": slots, **row}
        if family in FAULT_FAMILIES:
            yield from faults(family, tasks, alone)


def faults(family: str, tasks: list[Task], alone: list[Result]) -> Iterator[Row]:
    """Every fault at every level, one at a time."""
    for fault, (_, levels) in FAULTS.items():
        for level in levels:
            for policy in POLICIES[1:]:
                row = cell(
                    tasks,
                    alone,
                    lambda task, p=policy, f=fault, x=level: simulate(task, p, fault=f, level=x, slots=SLOTS),
                )
                yield {"sweep": "fault", "family": family, "policy": policy, "fault": fault, "level": level, **row}


def read() -> list[Row]:
    """The lines of results.jsonl."""
    return [json.loads(line) for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if not flags.FLAGS.report:
        write_atomic(HERE / "results.jsonl", "".join(json.dumps(row) + "\n" for row in sweep()))
    rows = read()
    write_atomic(HERE / "README.md", page.render(rows))
    figures.draw(rows, HERE)


if __name__ == "__main__":
    flags.DEFINE_bool("report", False, "Only write the page and the plots again.")
    app.run(main)
