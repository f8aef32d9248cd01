"""python -m experiments.agent_swarm: a swarm that shares out its context beside one agent that drops it.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6: subagents keep their own context (sharding), where one agent has
to discard its history once its window is full.

A script (`kimi_jax.agents.researcher`) answers wide questions over the World Factbook by the real runtime, on virtual
time. Nothing is drawn but the questions, so a second run writes the same file. It writes context.jsonl here, from which
the README's table is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.context import ContextConfig
from kimi_jax.agents.corpus import Corpus
from kimi_jax.agents.events import Event
from kimi_jax.agents.families import Knobs, SwarmTask, make
from kimi_jax.agents.orchestration import write_corpus
from kimi_jax.agents.researcher import Researcher
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.virtual_time import VirtualTimeLoop
from kimi_jax.train.log import read_rows, write_atomic

RESULTS = Path(__file__).parent / "context.jsonl"
CORPUS = Path("runs/experiments/agent_swarm/context")
SEEDS = range(10)  # questions of each size
ITEMS = (4, 8, 16, 32)  # rows that a question asks for
WINDOW = 24_000  # tokens after which a history is replaced
STEPS_A_ROW = 8  # that one agent may take; a row costs about 5

Row = dict[str, Any]


def policies(items: int) -> Mapping[str, SwarmConfig]:
    """Name -> settings of a swarm for questions of so many rows."""
    alone = SwarmConfig(max_depth=0, max_parallel=1, orchestrator_steps=STEPS_A_ROW * items)
    discard, summary = (ContextConfig(policy, WINDOW) for policy in ("discard_all", "summary"))
    return {
        "one agent, no limit": alone,
        "one agent, discard_all": replace(alone, context=discard),
        "one agent, summary": replace(alone, context=summary),
        "swarm, sharding": SwarmConfig(max_parallel=64, context=discard),
    }


def play(task: SwarmTask, corpus: Corpus, config: SwarmConfig) -> Row:
    """One run: item F1, critical steps, tokens of all agents, the largest request of any."""
    events: list[Event] = []

    async def run() -> Any:
        swarm = Swarm(Researcher(1.0), corpus.tools(), config, observers=[events.append])
        try:
            return await swarm.run(task.question)
        finally:
            swarm.close()

    result = anyio.run(run, backend_options={"loop_factory": VirtualTimeLoop})
    largest = max(event.usage.tokens for event in events if event.kind == "step")
    return {
        "item_f1": task.verify(result.answer).item_f1, "critical_steps": result.critical_steps,
        "tokens": result.usage.tokens, "largest": largest,
    }  # fmt: skip


def sweep(corpus: Corpus, sizes: tuple[int, ...] = ITEMS, seeds: range = SEEDS) -> Iterator[Row]:
    """A row for each number of items, question and policy."""
    for items in sizes:
        for seed in seeds:
            task = make("wide", seed, Knobs(items=items, distractors=0))
            for name, config in policies(items).items():
                yield {"items": items, "seed": seed, "policy": name, **play(task, corpus, config)}


def section(rows: list[Row]) -> str:
    """The table of the README; "" without rows."""
    if not rows:
        return ""
    lines = [
        "## Sharding the context against discarding it",
        "",
        f"Written by `python -m experiments.agent_swarm`: a script answers {len(SEEDS)} wide questions of each "
        f"size by the real runtime. A window has {WINDOW:,} tokens (bytes / 4). `discard_all` drops all but the task "
        "when it is full, `summary` keeps the rows so far, and the agents of the swarm have a window each. Mean ± "
        "standard deviation over questions. The script looks up rows in their order, so one that has lost its history "
        "begins with the first row again; a model might not.",
        "",
        "| rows | policy | item F1 | critical steps | tokens | largest request |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for items in dict.fromkeys(row["items"] for row in rows):
        for name in policies(items):
            mine = [row for row in rows if row["items"] == items and row["policy"] == name]
            cells = [_cell(mine, key, digits) for key, digits in
                     (("item_f1", 3), ("critical_steps", 1), ("tokens", 0), ("largest", 0))]  # fmt: skip
            lines.append(f"| {items} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Row], key: str, digits: int) -> str:
    values = np.array([row[key] for row in rows], float)
    return f"{values.mean():,.{digits}f} ± {values.std(ddof=1):,.{digits}f}"


def main(argv: list[str]) -> None:
    """Makes all runs; less than five minutes."""
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    rows = sweep(write_corpus(CORPUS))
    write_atomic(RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    print(section(read_rows(RESULTS)))
