"""python -m kimi_jax.rl.orchestrator_page --before=runs/orchestrator_sft --after=runs/orchestrator_rl

What PARL has changed. Held-out questions of every task of the later run are answered, with the most probable turns and
reliable subagents, by a script that assigns one task in a turn, by the model before, and by the model after. Prints and
writes OUT/orchestrator.json with scores and cost, OUT/orchestrator.html with the same questions side by side, and
OUT/orchestrator_{alone,before,after}.html: the trace page of the first question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from kimi_jax import sharding
from kimi_jax.agents import trace
from kimi_jax.agents.finder import FinderQuestion
from kimi_jax.agents.orchestration import FinishedRun
from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.eval import before_after
from kimi_jax.rl.orchestrator import OrchestratorWorker, means
from kimi_jax.rl.rollout import settings
from kimi_jax.train import checkpoint

ALONE = "one after the other"
NAMES = (ALONE, "before", "after")
SHOWN = 4  # questions of each task on the page
METRICS = ("item_f1", "critical_steps", "width", "subagents", "tokens")

Runs = dict[str, dict[str, list[FinishedRun]]]  # task -> name of NAMES -> its runs


def compare(before: str, after: str, limit: int) -> Runs:
    """The runs of two workdirs, and of the script; the later one has the tasks.

    Raises ConfigError, OSError, ValueError for a folder that is no such workdir.
    """
    mesh = sharding.make_mesh(MeshConfig(1))
    config, weights = checkpoint.load(after, mesh=mesh)
    rl = settings(config)
    if rl.orchestrator is None:
        raise ConfigError(f"{after} is no run of an orchestrator: use python -m kimi_jax.rl.page")
    worker = OrchestratorWorker(config, rl, mesh)
    asked: dict[str, list[FinderQuestion]] = {}
    for name, task in rl.tasks.items():
        questions = worker.open_task(task, "validation")
        asked[name] = [questions[i] for i in range(limit)]
    runs: Runs = {name: {ALONE: worker.one_by_one(each)} for name, each in asked.items()}
    for who, params in (("before", checkpoint.load(before, mesh=mesh)[1]), ("after", weights)):
        worker.set_params(params, 0)
        for name, each in asked.items():
            runs[name][who] = worker.answer(each)
    return runs


def scores(runs: Runs) -> list[dict[str, Any]]:
    """A row for each task and each of NAMES: means over its questions. tokens: of all agents of a run."""
    return [
        {
            "task": task, "model": who, "n": len(made), **means(made),
            "tokens": float(np.mean([run.result.usage.tokens for run in made])),
        }
        for task, by_name in runs.items()
        for who, made in by_name.items()
    ]  # fmt: skip


def page(rows: Sequence[dict[str, Any]], runs: Runs) -> str:
    """The page: the table, and the first questions of each task with every answer, its item F1 and critical steps."""
    table = before_after.table(
        ("task", "model", *(name.replace("_", " ") for name in METRICS), "n"),
        [(row["task"], row["model"], *(row[name] for name in METRICS), row["n"]) for row in rows],
    )
    problems = []
    for by_name in runs.values():
        for i in range(min(SHOWN, len(by_name[ALONE]))):
            question = by_name[ALONE][i].asked
            answers = [
                before_after.ShownAnswer(
                    who, by_name[who][i].result.answer, by_name[who][i].item_f1 == 1.0,
                    f" item F1 {by_name[who][i].item_f1:.2f}, {by_name[who][i].result.critical_steps:g} critical steps",
                )
                for who in NAMES
            ]  # fmt: skip
            gold = ", ".join(f"{country} {area}" for country, area in question.gold.rows)
            problems.append(before_after.question([], question.text, gold, before_after.answers(answers)))
    body = f"{table}<h2>The first held-out questions</h2><p>An answer cites calls by number.</p>{''.join(problems)}"
    return before_after.document("PARL", "What the reward has taught an orchestrator", body)


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    runs = before_after.compared(argv, compare)
    rows = scores(runs)
    table = Table("task", "model", *(name.replace("_", " ") for name in METRICS), "n")
    for row in rows:
        numbers = (f"{row[name]:,.3f}" if name == "item_f1" else f"{row[name]:,.1f}" for name in METRICS)
        table.add_row(row["task"], row["model"], *numbers, str(row["n"]))
    Console().print(table)
    out = f.out or f.after
    path = before_after.write(out, "orchestrator", rows, page(rows, runs))
    for who, made in next(iter(runs.values())).items():
        name = "alone" if who == ALONE else who
        meta = {"question": made[0].asked.text, "model": f"{who}, with scripted finders"}
        Path(out, f"orchestrator_{name}.html").write_text(trace.page(meta, made[0].events), encoding="utf-8")
    print(f"{path}: questions side by side; orchestrator_{{alone,before,after}}.html: the first one as a trace")


if __name__ == "__main__":
    before_after.define_flags("runs/orchestrator_sft", "runs/orchestrator_rl", 64, "Held-out questions a task.")
    app.run(main)
