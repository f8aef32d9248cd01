"""Many runs of small orchestrators at once, and the conversations of scripted ones, which a policy first learns from.

    python -m kimi_jax.agents.orchestration --out=runs/orchestrator --count=3000

writes the corpus (World Factbook), and one conversation a line as `kind="chat"` sources read it; with --subagents also
those of the subagents, so that one model learns both parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np
from absl import app, flags

from kimi_jax import cli
from kimi_jax.agents import finder, searcher
from kimi_jax.agents.budget import Budget
from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.corpus import Corpus
from kimi_jax.agents.events import ROOT, Event
from kimi_jax.agents.finder import FAMILIES, FINDER, Finder, FinderQuestion, Orchestrator, question
from kimi_jax.agents.model import AgentModel, Message, ModelRequest, Response
from kimi_jax.agents.swarm import Swarm, SwarmResult
from kimi_jax.agents.tools import Tool
from kimi_jax.agents.virtual_time import VirtualTimeLoop

SYSTEM_PROMPT = "Assign tasks to finder, then cite the calls."
SUBAGENT_PROMPT = "Find the row of the country that you are asked for."
RELIABILITY = 0.9  # of the subagents in the conversations that are learned from
NO_TIMEOUT = 1e12  # virtual seconds; subagents that a model plays wait for it longer than any that are scripts


@dataclass(frozen=True)
class PlannedRun:
    """A run to make: a question, the model of the orchestrator, and that of its subagents."""

    asked: FinderQuestion
    orchestrator: AgentModel
    subagent: AgentModel


@dataclass(frozen=True)
class FinishedRun:
    """What became of a run. conversations: the last request of each agent that was answered, with its answer."""

    asked: FinderQuestion
    result: SwarmResult
    events: tuple[Event, ...]
    conversations: dict[str, list[Message]]

    @property
    def item_f1(self) -> float:
        """The score of the answer."""
        return finder.verify(self.asked, self.events).item_f1


def settings(critical_steps: float, turns: int, max_tokens: int) -> SwarmConfig:
    """A swarm whose subagents exist already, and whose results are short enough for a small orchestrator."""
    return SwarmConfig(
        max_parallel=64, orchestrator_steps=turns, subagent_steps=16, max_tokens=max_tokens, max_summary=60,
        max_sources=0, child_timeout=NO_TIMEOUT, budget=Budget(critical_steps=critical_steps), max_attempts=1,
        system_prompt=SYSTEM_PROMPT, subagents={FINDER: SUBAGENT_PROMPT},
    )  # fmt: skip


def write_corpus(folder: Path) -> Corpus:
    """The Factbook's entries as files of a folder, and their index."""
    for document in finder.documents():
        path = folder / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")
    return Corpus(folder)


def play(
    runs: Sequence[PlannedRun],
    corpus: Corpus,
    config: SwarmConfig,
    tools: Callable[[Corpus], list[Tool]] = Corpus.tools,
) -> list[FinishedRun]:
    """All runs at the same time, on virtual time: see `batched_model.py`. Each has a journal in memory. tools: over the
    corpus, for the subagents.

    What is no Exception, such as a signal's, ends all runs and comes out as it was raised.
    """
    try:
        return anyio.run(_play, runs, tools(corpus), config, backend_options={"loop_factory": VirtualTimeLoop})
    except BaseExceptionGroup as group:
        _, signals = group.split(Exception)
        while isinstance(signals, BaseExceptionGroup):
            signals = signals.exceptions[0]
        raise signals or group from None


async def _play(runs: Sequence[PlannedRun], tools: list[Tool], config: SwarmConfig) -> list[FinishedRun]:
    played: list[FinishedRun | None] = [None] * len(runs)

    async def one(i: int) -> None:
        events: list[Event] = []
        model = _ByRole(runs[i])
        swarm = Swarm(model, tools, config, observers=[events.append])
        try:
            result = await swarm.run(runs[i].asked.text)
        finally:
            swarm.close()
        played[i] = FinishedRun(runs[i].asked, result, tuple(events), model.conversations)

    async with anyio.create_task_group() as tasks:
        for i in range(len(runs)):
            tasks.start_soon(one, i)
    return [each for each in played if each is not None]


class _ByRole:
    """The orchestrator's model for the orchestrator, the subagents' for the others."""

    def __init__(self, run: PlannedRun):
        self._run = run
        self.name = f"{run.orchestrator.name}, {run.subagent.name}"
        self.conversations: dict[str, list[Message]] = {}

    async def complete(self, request: ModelRequest) -> Response:
        if request.agent != ROOT:
            await anyio.sleep(1.0)  # a step: subagents of one turn are at work at the same time
        response = await (self._run.orchestrator if request.agent == ROOT else self._run.subagent).complete(request)
        self.conversations[request.agent] = [*request.messages, response.message()]
        return response


def conversations(
    count: int, corpus: Corpus, config: SwarmConfig, parallel: float, seed: int, subagents: bool = False
) -> list[list[Message]]:
    """Conversations of scripted orchestrators, families and numbers of lines mixed; `parallel`: the share of those that
    assign tasks at the same time. subagents: beside each the conversation of one of its subagents."""
    runs = []
    script = searcher.Searcher if subagents else Finder
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        asked = question(FAMILIES[i % len(FAMILIES)], 1_000_000 * (seed + 1) + i, int(rng.integers(1, 5)))
        runs.append(PlannedRun(asked, Orchestrator(asked, bool(rng.random() < parallel)), script(RELIABILITY, i)))
    if not subagents:
        return [played.conversations[ROOT] for played in play(runs, corpus, config)]
    found = []
    for i, played in enumerate(play(runs, corpus, config, searcher.tools)):
        others = [messages for name, messages in played.conversations.items() if name != ROOT]
        found += [played.conversations[ROOT], others[i % len(others)]]
    return found


def write(out: Path, count: int = 3000, seed: int = 0, parallel: float = 0.3, critical_steps: float = 14.0,
          turns: int = 6, subagents: bool = False) -> Path:  # fmt: skip
    """Writes the corpus into `out/corpus`, and conversations, of which it gives the file."""
    corpus = write_corpus(out / "corpus")
    made = conversations(count, corpus, settings(critical_steps, turns, 256), parallel, seed, subagents)
    lines = (json.dumps({"messages": messages, "thinking": False}, ensure_ascii=False) for messages in made)
    path, unfinished = out / "conversations.jsonl", out / "conversations.jsonl.part"
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return unfinished.replace(path)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    limits = values.critical_steps, values.turns
    path = write(Path(values.out), values.count, values.seed, values.parallel, *limits, values.subagents)
    print(f"{values.count:,} runs in {path}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "runs/orchestrator", "Folder of the corpus and the conversations.")
    flags.DEFINE_integer("count", 3000, "Runs, each with the conversation of its orchestrator.", 1)
    flags.DEFINE_integer("seed", 0, "Of the questions.", 0)
    flags.DEFINE_float("critical_steps", 14.0, "Limit of critical steps of a run.", 2)
    flags.DEFINE_integer("turns", 6, "Most turns of the orchestrator.", 1)
    flags.DEFINE_float("parallel", 0.3, "Share of conversations that assign tasks at the same time.", 0, 1)
    flags.DEFINE_bool("subagents", False, "Also a conversation of a subagent of each run, which searches by itself.")
    app.run(main, flags_parser=cli.parse_plain)
