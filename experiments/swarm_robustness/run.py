"""python -m experiments.swarm_robustness.run: the sweep, its results, the page and the plots.

    --report    only write the page and the plots again, from results.jsonl

Every number is a function of families, seeds and settings below: a second run writes the same file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.swarm_robustness import figures, page, verdicts
from experiments.swarm_robustness.simulate import CHILD_LIMIT, FAULTS, POLICIES, Result, simulate
from kimi_jax.agents.families import FAMILIES, Knobs, SwarmTask, make
from kimi_jax.train.log import write_atomic

HERE = Path(__file__).parent
SEEDS = range(100)  # tasks of a family; paired between policies, faults and levels
ITEMS, SLOTS = 12, 8
FAULT_FAMILIES = ("wide", "trap", "mixed")
SLOT_COUNTS = (1, 2, 4, 8, 16, 32)
ITEM_COUNTS = (2, 4, 8, 24, 48)
CHAINED = ("deep", "trap", "mixed")  # the Factbook has no longer walks of all of them than of ITEMS
LIMITS = (6, 12, 20, 40, 80)  # steps after which a subagent is stopped
LIMIT_FAULTS = (("loop", 0.0), ("loop", 0.3), ("loop", 1.0), ("straggler", 10.0))
Row = dict[str, Any]


def settings() -> Iterator[Row]:
    """What identifies a line of results: the arguments of `make` and `simulate`, and the sweep that it belongs to."""

    def line(sweep: str, family: str, policy: str, items: int = ITEMS, slots: int = SLOTS, fault: str = "wrong",
             level: float = 0.0, child_limit: int = CHILD_LIMIT) -> Row:  # fmt: skip
        return {"sweep": sweep, "family": family, "policy": policy, "items": items, "slots": slots, "fault": fault,
                "level": level, "child_limit": child_limit}  # fmt: skip

    swarms = POLICIES[1:]
    for family in FAMILIES:
        counts = [n for n in ITEM_COUNTS if n < ITEMS or family not in CHAINED]
        sizes = [(ITEMS, p) for p in SLOT_COUNTS] + list(itertools.product(counts, (SLOTS, SLOT_COUNTS[-1])))
        for (items, slots), policy in itertools.product(sizes, swarms):
            yield line("scale", family, policy, items, slots)
    for family, fault, policy in itertools.product(FAULT_FAMILIES, FAULTS, swarms):
        for level in FAULTS[fault][1]:
            yield line("fault", family, policy, fault=fault, level=level)
    for (fault, level), limit in itertools.product(LIMIT_FAULTS, LIMITS):
        yield line("limit", "wide", "parallel", fault=fault, level=level, child_limit=limit)


def tasks_of(family: str, items: int, seeds: range = SEEDS) -> tuple[list[SwarmTask], list[Result]]:
    """(tasks, their sequential runs)."""
    tasks = [make(family, seed, Knobs(items=items)) for seed in seeds]
    return tasks, [simulate(task, "sequential") for task in tasks]


def measure(setting: Row, tasks: Sequence[SwarmTask], alone: Sequence[Result]) -> Row:
    """One line of results: a setting over all tasks, beside the sequential runs of the same tasks.

    gain: sequential time over time, the geometric mean; f1_change: of item F1. Both with the 95 % interval over tasks
    and the smallest effect that so many tasks would show. work_ratio: steps over sequential steps, for tokens.
    ideal_gain: sequential time over the oracle's makespan with these slots, for tasks whose hidden graph is known.
    time_used, work_used: in multiples of a task's T1, the largest of all tasks. peak: most subagents at once.
    """
    names = ("policy", "slots", "fault", "level", "child_limit")
    runs = [simulate(task, **{name: setting[name] for name in names}) for task in tasks]
    pairs = list(zip(runs, alone, strict=True))
    n = len(runs)
    values = {
        **verdicts.estimates(
            [math.log(other.time / one.time) for one, other in pairs],
            [one.score.item_f1 - other.score.item_f1 for one, other in pairs],
        ),
        "item_f1": sum(one.score.item_f1 for one in runs) / n,
        "row_f1": sum(one.score.row_f1 for one in runs) / n,
        "success": sum(one.score.success for one in runs) / n,
        "work_ratio": sum(one.work for one in runs) / sum(other.work for other in alone),
        "critical_steps": sum(one.critical_steps for one in runs) / n,
        "time": sum(one.time for one in runs) / n,
        "oracle_parallelism": sum(task.work / task.span for task in tasks) / n,
        "ideal_gain": math.exp(sum(math.log(task.work / task.makespan(setting["slots"])) for task in tasks) / n),
        "time_used": max(one.time / task.work for one, task in zip(runs, tasks, strict=True)),
        "work_used": max(one.work / task.work for one, task in zip(runs, tasks, strict=True)),
        "peak": max(one.peak for one in runs),
    }
    return setting | {"n": n} | {name: round(value, 6) for name, value in values.items()}


def sweep(seeds: range = SEEDS) -> Iterator[Row]:
    """All lines of results, in the order of `settings`."""
    made: tuple[str, int] | None = None
    for setting in settings():
        if made != (setting["family"], setting["items"]):
            made = setting["family"], setting["items"]
            tasks, alone = tasks_of(*made, seeds)
        yield measure(setting, tasks, alone)


def read() -> list[Row]:
    """The lines of results.jsonl."""
    return [json.loads(line) for line in (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def write_report(folder: Path) -> None:
    """Writes README.md and the plots from results.jsonl."""
    rows = read()
    write_atomic(folder / "README.md", page.render(rows))
    figures.draw(rows, folder)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    if not flags.FLAGS.report:
        write_atomic(HERE / "results.jsonl", "".join(json.dumps(row) + "\n" for row in sweep()))
    write_report(HERE)


if __name__ == "__main__":
    flags.DEFINE_bool("report", False, "Only write the page and the plots again.")
    app.run(main)
