"""Rollouts of an orchestrator (PARL): each answer is a run of the swarm runtime, and its record is the trajectory.

Source: Kimi K2.5 report (arXiv 2602.02276), sections 6.1 to 6.3: the orchestrator is trained, subagents are frozen and
what they say is an observation, runs are limited by critical steps. docs/rl.md sections 11 and 12.

Subagents are scripts, or a model: the weights that the run began with, or the policy itself, which then is trained on
what it wrote in their place too, each context a sequence with the advantage of its run.

K samples of a group

All runs of an iteration go on at the same time on virtual time, and turns are sampled together
(`agents.batched_model`); nothing of a run outlives its iteration, so a run of training that is killed begins the
iteration again, with the same samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.agents import critical, detectors, finder, searcher
from kimi_jax.agents.batched_model import BatchedModel, EpisodeModel
from kimi_jax.agents.corpus import Corpus, CorpusError
from kimi_jax.agents.events import ROOT
from kimi_jax.agents.finder import FAMILIES, Finder, FinderQuestion, Orchestrator, question
from kimi_jax.agents.orchestration import FinishedRun, PlannedRun, play, settings
from kimi_jax.config import ConfigError, MeshConfig, RLConfig, TaskConfig, TrainConfig
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.eval.runner import SAMPLES, EvalSample, Row
from kimi_jax.rl import parl
from kimi_jax.rl.shaping import Anneal
from kimi_jax.rl.swarm_trajectory import trajectory
from kimi_jax.rl.types import Group
from kimi_jax.rl.worker import open_engine
from kimi_jax.train import init_from

HELD_OUT = 1 << 30  # number of the first question that no training asks
NUM_QUESTIONS = 1 << 24


@dataclass(frozen=True)
class Questions:
    """Questions of one family, as a task of a run. lines: of each."""

    family: str
    lines: int
    split: str = "train"

    @classmethod
    def of_path(cls, path: str, split: str) -> Questions:
        """`wide/4`: family and lines. Raises ConfigError for anything else."""
        family, _, lines = path.partition("/")
        if family not in FAMILIES or not lines.isdecimal() or not 1 <= int(lines) <= 8:
            raise ConfigError(
                f"a task of an orchestrator is FAMILY/LINES, one of {FAMILIES} and 1 to 8, not {path!r:.60}"
            )
        return cls(family, int(lines), split)

    def __len__(self) -> int:
        return NUM_QUESTIONS

    def __getitem__(self, index: int) -> FinderQuestion:
        return question(self.family, index + (0 if self.split == "train" else HELD_OUT), self.lines)


@dataclass
class RunGroup:
    """K runs with the same question. task, index: which question of which task; trains_subagents: whether the
    policy is trained on their tokens too; runs: [] until they are made."""

    task: str
    index: int
    problem: FinderQuestion
    seeds: list[str]
    trains_subagents: bool = False
    runs: list[FinishedRun] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the runs are made."""
        return bool(self.runs)

    @property
    def failed(self) -> bool:
        """Whether a run has nothing that the policy wrote."""
        return any(not any(e.kind == "step" and e.agent == ROOT for e in run.events) for run in self.runs)

    def group(self, rewards: Sequence[float]) -> Group:
        """The records as trajectories with these rewards."""
        made = [trajectory(run.events, lambda agent: agent == ROOT or self.trains_subagents) for run in self.runs]
        each = zip(made, rewards, strict=True)
        return Group(self.problem.key, tuple(dataclasses.replace(t, reward=reward) for t, reward in each))


class OrchestratorWorker:
    """Plays runs with the weights that it was last given.

    Raises ConfigError for settings that no run can be made with.
    """

    def __init__(self, config: TrainConfig, rl: RLConfig, mesh: Mesh | None = None):
        assert rl.orchestrator is not None
        if config.lora is not None:
            raise ConfigError("config.lora: reinforcement learning trains whole weights; leave the adapters out")
        if rl.rollout.max_staleness or rl.rollout.replay_experts:
            raise ConfigError(
                "config.rl.orchestrator: runs are not continued, so leave max_staleness and replay_experts off"
            )
        if rl.orchestrator.subagents == "frozen" and not config.init_from.path:
            raise ConfigError(
                "config.rl.orchestrator.subagents = 'frozen': subagents keep the weights that the run began with, so "
                "name them in config.init_from.path, or use 'script' or 'trained'"
            )
        try:
            self._corpus = Corpus(rl.orchestrator.corpus)
        except CorpusError as error:
            raise ConfigError(
                f"config.rl.orchestrator.corpus: {error}; kimi_jax.agents.orchestration makes one"
            ) from error
        self._config, self._rl, self._settings = config, rl, rl.orchestrator
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._batch: BatchedModel | None = None
        self._frozen: BatchedModel | None = None  # of subagents, with an engine of its own
        self._script = Finder if self._settings.subagents == "script" else searcher.Searcher
        self._tools = Corpus.tools if self._settings.subagents == "script" else searcher.tools
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._made: list[tuple[FinishedRun, parl.Rewards]] = []

    def open_task(self, config: TaskConfig, split: str = "train") -> Questions:
        """The questions of a task, kind "orchestrate". Raises ConfigError for another kind."""
        if config.kind != "orchestrate":
            raise ConfigError(
                f"with config.rl.orchestrator every task is of the kind 'orchestrate', not {config.kind!r}"
            )
        return Questions.of_path(config.path, split)

    def set_params(self, params: Any, version: int) -> None:
        """Sample with these weights from now on; `version`, the iteration, is noted at every token."""
        if self._batch is None:
            self._batch = self._open(params)
            if self._settings.subagents == "frozen":
                # not `params`: a run that goes on after a kill is handed those of a later iteration
                copies = jax.tree.map(lambda x: x.copy(), params)
                mesh = self._mesh or sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
                self._frozen = self._open(init_from.start(self._config, copies, mesh, lambda *lines: None))
        self._batch.engine.set_params(params, version)

    def _open(self, params: Any) -> BatchedModel:
        engine = open_engine(self._config, self._rl.rollout, params, self._mesh)
        length = self._config.data.sequence_length
        return BatchedModel(engine, self._tokenizer, length, self._rl.policy.temperature)

    def begin(self, task: str, index: int, problem: FinderQuestion, samples: int, seed: int) -> RunGroup:
        """A group whose runs are not made yet."""
        seeds = [f"{seed}/{task}/{index}/{k}" for k in range(samples)]
        return RunGroup(task, index, problem, seeds, self._settings.subagents == "trained")

    def draw(self, groups: Sequence[RunGroup], most: int = 0) -> None:
        """Makes all runs of groups that have none, to their ends. most: 0, because runs are not continued."""
        assert self._batch is not None, "set_params comes first"
        waiting = [(group, seed) for group in groups if not group.complete for seed in group.seeds]
        reliability = self._settings.reliability_at(self._batch.engine.version)
        runs = [self._plan(group.problem, i, seed, reliability) for i, (group, seed) in enumerate(waiting)]
        for (group, _), played in zip(waiting, self.play(runs), strict=True):
            group.runs.append(played)

    def _plan(
        self, asked: FinderQuestion, number: int, seed: str, reliability: float, greedy: bool = False
    ) -> PlannedRun:
        """A run of the policy. reliability: of subagents that are scripts."""
        assert self._batch is not None
        policy = EpisodeModel(self._batch, number, seed, greedy)
        if self._settings.subagents == "script":
            return PlannedRun(asked, policy, Finder(reliability, self._config.seed))
        frozen = self._frozen and EpisodeModel(self._frozen, number, seed, greedy)
        return PlannedRun(asked, policy, frozen or policy)

    def play(self, runs: Sequence[PlannedRun], critical_steps: int | None = None) -> list[FinishedRun]:
        """Runs within the limits of these settings, or with another limit of critical steps."""
        steps = critical_steps or self._settings.critical_steps
        limits = settings(steps, self._settings.turns, self._rl.rollout.max_new_tokens)
        return play(runs, self._corpus, limits, self._tools)

    def answer(
        self, asked: Sequence[FinderQuestion], reliability: float = 1.0, critical_steps: int | None = None
    ) -> list[FinishedRun]:
        """A run with the most probable turns for each question; scripted subagents have that reliability."""
        assert self._batch is not None, "set_params comes first"
        runs = [self._plan(each, i, "", reliability, greedy=True) for i, each in enumerate(asked)]
        return self.play(runs, critical_steps)

    def one_by_one(self, asked: Sequence[FinderQuestion], critical_steps: int | None = None) -> list[FinishedRun]:
        """Of each question the run of a script that assigns one task in a turn, with reliable subagents."""
        runs = [PlannedRun(q, Orchestrator(q, parallel=False), self._script()) for q in asked]
        return self.play(runs, critical_steps)

    def rewards(self, group: RunGroup, iteration: int) -> list[float]:
        """Of each run: the outcome, and the auxiliary terms by the weights of this iteration."""
        limits = self._settings
        terms = [
            parl.rewards(run.events, run.item_f1, finder.used(run.events), limits.width, limits.reward_useless)
            for run in group.runs
        ]
        self._made += zip(group.runs, terms, strict=True)
        weights = [
            Anneal(start, limits.anneal).at(iteration) if limits.anneal else start
            for start in (limits.lambda_parallel, limits.lambda_finish)
        ]
        return [each.total(*weights) for each in terms]

    def take_metrics(self) -> dict[str, float]:
        """Means over the runs since the last time, and the detectors' shares."""
        made, self._made = self._made, []
        if not made:
            return {}
        window = [episode(run, terms) for run, terms in made]
        return {
            **means([run for run, _ in made]),
            **(entropies([run for run, _ in made]) if self._settings.subagents != "script" else {}),
            "r_parallel": float(np.mean([e.r_parallel for e in window])),
            "r_finish": float(np.mean([e.r_finish for e in window])),
            "collapsed": detectors.collapsed_share(window),
            **detectors.useless(window),
        }

    def close(self) -> None:
        """Nothing is held outside the process."""


def episode(run: FinishedRun, terms: parl.Rewards) -> detectors.Episode:
    """What the detectors read of a run."""
    rewards = (terms.parallel, terms.finish, terms.perf)
    return detectors.episode(run.events, run.asked.oracle, rewards, finder.used(run.events))


def means(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """item_f1, critical_steps, width (of subagents at work at once), subagents, and the shares of these that came back
    without a row (`no_row`) or with the row of their brief (`right_row`), over runs; {} for none."""
    if not runs:
        return {}
    columns: dict[str, list[float]] = {
        "item_f1": [run.item_f1 for run in runs],
        "critical_steps": [run.result.critical_steps for run in runs],
        "width": [critical.mean_width(critical.from_events(run.events)) for run in runs],
        "subagents": [len(run.result.outcomes) - 1 for run in runs],
    }
    found = {name: float(np.mean(values)) for name, values in columns.items()}
    rows = [each for run in runs for each in finder.delivered(run.events)]
    found["no_row"] = sum(not row for _, row in rows) / max(len(rows), 1)
    found["right_row"] = sum(bool(row) and row == finder.row_of(brief) for brief, row in rows) / max(len(rows), 1)
    return found


def entropies(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Of the tokens that were sampled, the mean surprise in nats, an estimate of the entropy: those of orchestrators
    (`entropy`) and of subagents (`subagent_entropy`)."""
    parts: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
    for event in (e for run in runs for e in run.events if e.kind == "step"):
        parts[event.agent == ROOT] += (event.detail.get("tokens") or {}).get("logprobs", ())
    return {name: -float(np.sum(parts[root])) / max(len(parts[root]) - 1, 1)
            for name, root in (("entropy", True), ("subagent_entropy", False))}  # fmt: skip


def evaluate(
    worker: OrchestratorWorker,
    params: Any,
    config: TrainConfig,
    tasks: Sequence[str],
    limit: int,
    *,
    samples: list[EvalSample] | None = None,
    frozen: Any = None,
) -> list[Row]:
    """Rows of item F1, critical steps and width for each named task of `config.rl.tasks` ("all": every one).

    The most probable turns over `limit` held-out questions, with subagents that are up to every brief; the control is
    a script that assigns one task in a turn, within the same limits. frozen: unused, for the loop.
    """
    assert config.rl is not None
    worker.set_params(params, 0)
    rows = []
    for name in config.rl.tasks if "all" in tasks else tasks:
        questions = worker.open_task(config.rl.tasks[name], "validation")
        asked = [questions[i] for i in range(limit)]
        runs, serial = worker.answer(asked), worker.one_by_one(asked)
        found, control = means(runs), means(serial)
        for metric in ("item_f1", "critical_steps", "width"):
            values = [means([run])[metric] for run in runs]
            error = float(np.std(values, ddof=1) / math.sqrt(limit)) if limit > 1 else 0.0
            rows.append(
                Row(name, "orchestrate", "text", metric, found[metric], error, control[metric], "one after the other",
                    0.0, limit)
            )  # fmt: skip
        if samples is not None:
            each = zip(runs[:SAMPLES], serial, strict=False)
            samples += [
                EvalSample(
                    name, r.asked.text, str(r.asked.gold.rows), r.result.answer, s.result.answer, r.item_f1 >= 1, ()
                )
                for r, s in each
            ]
    return rows
