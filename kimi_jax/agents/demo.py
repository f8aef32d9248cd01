"""python -m kimi_jax.agents.demo [--items=16] [--max_parallel=8] [--out=runs/swarm_demo]: one agent beside a swarm.

One wide question over real documents (World Factbook and Wikipedia leads, from the packages of the extra `demo`), no
network and no model: a script (`researcher.py`) searches and reads by the real runtime, three times. Alone; alone
within the critical steps that the swarm needed; and as a swarm. Prints the scores beside what they cost, and writes a
journal and a trace page of each run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
from absl import app, flags

from kimi_jax import cli
from kimi_jax.agents import critical, trace
from kimi_jax.agents.budget import Budget
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.corpus import Corpus
from kimi_jax.agents.evals import TableScore
from kimi_jax.agents.events import Event
from kimi_jax.agents.families import Knobs, SwarmTask, facts, make, sections, write_corpus
from kimi_jax.agents.journal import read_run
from kimi_jax.agents.model import Prices
from kimi_jax.agents.researcher import Researcher
from kimi_jax.agents.swarm import Swarm, SwarmResult

PRICES = Prices(0.6, 2.5)  # US dollars for a million tokens of prompts and of answers, as an example
ROW = "{:<24}{:>8}{:>8}{:>5}{:>5}{:>10}{:>5}{:>11}{:>9}{:>9}{:>7}"


@dataclass(frozen=True)
class Played:
    """One run: its name, score, result and record, and the slots that it had."""

    name: str
    score: TableScore
    result: SwarmResult
    events: tuple[Event, ...]
    slots: int

    def row(self) -> str:
        """A line of the table that is printed."""
        graph = critical.from_events(self.events)
        return ROW.format(
            self.name, f"{self.score.item_f1:.3f}", f"{self.score.row_f1:.3f}", critical.work(graph),
            critical.span(graph), self.result.critical_steps, critical.makespan(graph, self.slots),
            f"{self.result.usage.tokens:,}", f"{new_tokens(self.events):,}", f"${self.result.usage.cost:.3f}",
            f"{max(event.time for event in self.events):.1f}",
        )  # fmt: skip


def new_tokens(events: Iterable[Event]) -> int:
    """Tokens that no earlier turn of the same agent had: what is computed where every prefix is cached."""
    seen: dict[str, int] = {}
    total = 0
    for event in events:
        if event.kind == "step":
            total += max(event.usage.tokens - seen.get(event.agent, 0), 0)
            seen[event.agent] = event.usage.tokens
    return total


def question(items: int, distractors: int, countries: int, seed: int = 0) -> SwarmTask:
    """A wide task of so many rows. distractors: Wikipedia leads, countries: entries of others, beside what it needs."""
    task = make("wide", seed, Knobs(items=items, distractors=distractors))
    documents = {document.name: document for document in task.documents}
    for name in sorted(facts())[:countries]:
        documents |= {document.name: document for document in sections(name).values()}
    return replace(task, documents=tuple(documents[name] for name in sorted(documents)))


def play(name: str, task: SwarmTask, corpus: Corpus, config: SwarmConfig, out: Path, latency: float) -> Played:
    """One run by the real runtime; writes `name`.sqlite and `name`.html, in the place of older ones."""
    file = out / name.replace(" ", "_")
    for old in out.glob(f"{file.name}.sqlite*"):
        old.unlink()
    journal = file.with_suffix(".sqlite")
    swarm = Swarm(Researcher(latency, config.prices), corpus.tools(), config, journal)
    try:
        result = anyio.run(swarm.run, task.question)
    finally:
        swarm.close()
    meta, events = read_run(journal)
    file.with_suffix(".html").write_text(trace.page(meta, events), encoding="utf-8")
    return Played(name, task.verify(result.answer), result, tuple(events), config.max_parallel)


def compare(task: SwarmTask, corpus: Corpus, out: Path, slots: int, latency: float) -> list[Played]:
    """[alone, alone in the swarm's critical steps, swarm]."""
    alone = SwarmConfig(max_depth=0, max_parallel=1, orchestrator_steps=1000, prices=PRICES)
    together = SwarmConfig(max_parallel=slots, prices=PRICES)
    swarm = play("swarm", task, corpus, together, out, latency)
    short = replace(alone, budget=Budget(critical_steps=swarm.result.critical_steps))
    return [
        play("alone", task, corpus, alone, out, latency),
        play("alone in as many steps", task, corpus, short, out, latency),
        swarm,
    ]


def report(runs: list[Played]) -> str:
    """The table, and what it says."""
    alone, short, swarm = runs
    header = ROW.format(
        "run", "item F1", "row F1", "T1", "T∞", "critical", f"T{swarm.slots}", "tokens", "new", "cost", "s"
    )
    ratio = alone.result.critical_steps / swarm.result.critical_steps
    points = [(played.result.critical_steps, played.score.item_f1) for played in (alone, short)]
    reached = critical.speedup_at_quality(
        points, [(swarm.result.critical_steps, swarm.score.item_f1)], swarm.score.item_f1
    )
    graph = critical.from_events(swarm.events)
    tokens = critical.token_cost_ratio(swarm.result.usage.tokens, alone.result.usage.tokens)
    new = critical.token_cost_ratio(new_tokens(swarm.events), new_tokens(alone.events))
    return "\n".join(
        [
            header,
            *(played.row() for played in runs),
            "",
            f"critical steps of one agent over the swarm's: {ratio:.2f}"
            + (" at equal or better item F1" if reached else ", at a lower item F1"),
            f"the swarm's own parallelism T1 / T∞: {critical.parallelism(graph):.2f};"
            f" efficiency with {swarm.slots} slots: {critical.efficiency(graph, swarm.slots):.2f}",
            f"tokens of the swarm over those of one agent, whose context holds all that it has read: {tokens:.2f};"
            f" of new tokens, as with a prefix cache: {new:.2f}",
        ]
    )


def main(argv: list[str]) -> None:
    """Runs the command line."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    out = Path(values.out)
    task = question(values.items, values.distractors, values.countries)
    write_corpus(task, out / "corpus")
    corpus = Corpus(out / "corpus")
    print(f"{task.question}\n\n{len(corpus.documents):,} documents in {out / 'corpus'}\n")
    runs = compare(task, corpus, out, values.max_parallel, values.latency)
    print(runs[-1].result.answer.split("\n\n")[0], report(runs), sep="\n\n")
    print("\npages:", *sorted(str(path) for path in out.glob("*.html")))


if __name__ == "__main__":
    flags.DEFINE_integer("items", 16, "Rows that the question asks for.", 1, 60)
    flags.DEFINE_integer("max_parallel", 8, "Subagents that run at a time.", 1)
    flags.DEFINE_integer("distractors", 2000, "Wikipedia leads among the documents.", 0)
    flags.DEFINE_integer(
        "countries", 1000, "Countries whose entries are among the documents; what there is, at most.", 0
    )
    flags.DEFINE_float("latency", 0.2, "Seconds that every answer of the scripted model takes.", 0)
    flags.DEFINE_string("out", "runs/swarm_demo", "Folder of documents, journals and pages.")
    app.run(main, flags_parser=cli.parse_plain)
