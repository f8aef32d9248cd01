"""Rollouts of an orchestrator (PARL): each answer is a run of the swarm runtime, and its record is the trajectory.

Source: Kimi K2.5 report (arXiv 2602.02276), sections 6.1 to 6.3: the orchestrator is trained, subagents are frozen and
what they say is an observation, runs are limited by critical steps. docs/rl.md section 11.

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

import numpy as np
from jax.sharding import Mesh

from kimi_jax.agents import critical, detectors, finder
from kimi_jax.agents.batched_model import BatchedModel, EpisodeModel
from kimi_jax.agents.corpus import Corpus, CorpusError
from kimi_jax.agents.events import ROOT
from kimi_jax.agents.finder import FAMILIES, Finder, FinderQuestion, Orchestrator, question
from kimi_jax.agents.orchestration import FinishedRun, PlannedRun, play, settings
from kimi_jax.config import ConfigError, RLConfig, TaskConfig, TrainConfig
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.eval.runner import SAMPLES, EvalSample, Row
from kimi_jax.rl import parl
from kimi_jax.rl.shaping import Anneal
from kimi_jax.rl.swarm_trajectory import trajectory
from kimi_jax.rl.types import Group
from kimi_jax.rl.worker import open_engine

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
    """K runs with the same question. task, index: which question of which task; runs: [] until they are made."""

    task: str
    index: int
    problem: FinderQuestion
    seeds: list[str]
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
        each = zip(self.runs, rewards, strict=True)
        return Group(self.problem.key, tuple(dataclasses.replace(trajectory(r.events), reward=x) for r, x in each))


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
        try:
            self._corpus = Corpus(rl.orchestrator.corpus)
        except CorpusError as error:
            raise ConfigError(
                f"config.rl.orchestrator.corpus: {error}; kimi_jax.agents.orchestration makes one"
            ) from error
        self._config, self._rl, self._settings = config, rl, rl.orchestrator
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._batch: BatchedModel | None = None
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
            engine = open_engine(self._config, self._rl.rollout, params, self._mesh)
            length = self._config.data.sequence_length
            self._batch = BatchedModel(engine, self._tokenizer, length, self._rl.policy.temperature)
        self._batch.engine.set_params(params, version)

    def begin(self, task: str, index: int, problem: FinderQuestion, samples: int, seed: int) -> RunGroup:
        """A group whose runs are not made yet."""
        return RunGroup(task, index, problem, [f"{seed}/{task}/{index}/{k}" for k in range(samples)])

    def draw(self, groups: Sequence[RunGroup], most: int = 0) -> None:
        """Makes all runs of groups that have none, to their ends. most: 0, because runs are not continued."""
        assert self._batch is not None, "set_params comes first"
        waiting = [(group, seed) for group in groups if not group.complete for seed in group.seeds]
        subagent = Finder(self._settings.reliability_at(self._batch.engine.version), self._config.seed)
        runs = [
            PlannedRun(group.problem, EpisodeModel(self._batch, i, seed), subagent)
            for i, (group, seed) in enumerate(waiting)
        ]
        for (group, _), played in zip(waiting, self.play(runs), strict=True):
            group.runs.append(played)

    def play(self, runs: Sequence[PlannedRun], critical_steps: int | None = None) -> list[FinishedRun]:
        """Runs within the limits of these settings, or with another limit of critical steps."""
        steps = critical_steps or self._settings.critical_steps
        return play(runs, self._corpus, settings(steps, self._settings.turns, self._rl.rollout.max_new_tokens))

    def answer(
        self, asked: Sequence[FinderQuestion], reliability: float = 1.0, critical_steps: int | None = None
    ) -> list[FinishedRun]:
        """A run with the most probable turns for each question, with subagents of that reliability."""
        assert self._batch is not None, "set_params comes first"
        subagent = Finder(reliability, self._config.seed)
        models = [EpisodeModel(self._batch, i, "", greedy=True) for i in range(len(asked))]
        return self.play([PlannedRun(q, m, subagent) for q, m in zip(asked, models, strict=True)], critical_steps)

    def one_by_one(self, asked: Sequence[FinderQuestion], critical_steps: int | None = None) -> list[FinishedRun]:
        """Of each question the run of a script that assigns one task in a turn, with reliable subagents."""
        return self.play([PlannedRun(q, Orchestrator(q, parallel=False), Finder()) for q in asked], critical_steps)

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
    """item_f1, critical_steps, width (of subagents at work at once) and subagents, over runs; {} for none."""
    if not runs:
        return {}
    columns: dict[str, list[float]] = {
        "item_f1": [run.item_f1 for run in runs],
        "critical_steps": [run.result.critical_steps for run in runs],
        "width": [critical.mean_width(critical.from_events(run.events)) for run in runs],
        "subagents": [len(run.result.outcomes) - 1 for run in runs],
    }
    return {name: float(np.mean(values)) for name, values in columns.items()}


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
