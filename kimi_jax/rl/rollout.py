"""Rollouts as the source of a run's batches: an iteration draws groups of answers, scores them, and packs them.

Source: Kimi K2.5 report (arXiv 2602.02276) sections 5.1 and 5.4; Kimi k1.5 report (arXiv 2501.12599) section 2.6.2
(partial rollouts); AReaL (arXiv 2505.24298) section 5.1 (the bound of staleness). docs/rl.md section 8.

eta `max_staleness`   B `prompts`

Rollouts and updates take turns on the same devices. At the beginning of an iteration the sampler gets the weights; new
groups are begun as long as at most (eta + 1) B of them are being drawn or wait to be trained on, so that none is older
than eta iterations then (AReaL's bound for batches that are always full); then answers are drawn until B groups are
complete. Answers that are longer than `tokens_per_iteration` go on in the next
iteration, over its weights: every token carries the version that drew it.

Nothing depends on the clock, and everything that an iteration begins with is in the checkpoint: groups that are being
drawn, complete ones that wait, the next problem of each task, budgets and phases. A run that is killed anywhere goes on
to the same weights, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from kimi_jax.config import ConfigError, RLConfig, TaskConfig, TrainConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.packing import PackShape
from kimi_jax.packed_batch import PackedBatch
from kimi_jax.rl import record, shaping
from kimi_jax.rl.pending import PendingAnswer
from kimi_jax.rl.types import Group, TrainingSample, pack, samples, staleness
from kimi_jax.train.batches import HostState

Ready = tuple[Group, list[float]]  # a complete group and its advantages
MAX_DROPPED = 1000  # prompts in a row that cannot be used before the run stops


@runtime_checkable
class Problems(Protocol):
    """What a worker makes groups of, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@runtime_checkable
class Worker(Protocol):
    """What makes groups, and what those are: `rl.worker` draws answers, `rl.orchestrator` makes runs of a swarm."""

    def open_task(self, config: TaskConfig) -> Problems: ...

    def set_params(self, params: Any, version: int) -> None: ...

    def begin(self, task: str, index: int, problem: Any, samples: int, seed: int) -> Any: ...

    def draw(self, groups: Sequence[Any], most: int = 0) -> None: ...

    def rewards(self, group: Any, iteration: int) -> list[float]: ...

    def take_metrics(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class RolloutSource:
    """A `train.batches.BatchSource` of rollouts; see the module.

    show: told of the groups of every iteration with their shaped rewards, for a page. Raises ConfigError for settings
    without `rl`, or tasks that cannot be opened.
    """

    def __init__(
        self,
        config: TrainConfig,
        packs: Sequence[int],
        state: HostState | None,
        worker: Worker,
        show: Callable[[int, Sequence[Group], Sequence[Sequence[float]]], None] | None = None,
    ):
        rl = settings(config)
        if jax.process_count() > 1:
            raise ConfigError("rollouts of several hosts are not supported yet: run on one host")
        self._config, self._rl, self._worker, self._show = config, rl, worker, show
        self._packs = len(packs)
        self._shape = PackShape.of(config.data, config.model, routed_experts=rl.rollout.replay_experts)
        self._tasks = {name: worker.open_task(task) for name, task in rl.tasks.items()}
        self._params: Any = None
        self._held: Any = None  # weights of the last hand-over, where they are older than `_params`
        self._queue: list[PackedBatch] = []
        self._ready: list[Ready] = []
        self._pending: list[Any] = []
        self._iteration = self._delivered = 0
        self._drawn = dict.fromkeys(rl.tasks, 0)
        self._shaping = shaping.ShapingState()
        self._counts = {"dropped": 0, "failed": 0, "unfit": 0}
        self._metrics: dict[str, Any] = {}
        if state is not None:
            self._restore(state)

    # ------------------------------------------------------------------------------------------------- as a BatchSource

    def __next__(self) -> PackedBatch:
        """The next batch; makes rollouts when those of the last iteration are used up."""
        if not self._queue:
            self._queue = self._iterate()
        self._delivered += 1
        return self._queue.pop(0)

    def update(self, params: Any, step: int) -> None:
        """The weights that the next iteration draws with."""
        self._params = params

    def state(self) -> HostState:
        """Everything but the weights; and those too, if the sampler still has older ones."""
        return {
            "iteration": self._iteration, "delivered": self._delivered, "drawn": dict(self._drawn),
            "shaping": self._shaping.to_json(), "counts": dict(self._counts),
            "metrics": dict(self._metrics),
            "pending": [
                {"task": g.task, "index": g.index, "answers": [a.state() for a in g.answers]} for g in self._pending
            ],
            "ready": [{"group": record.dump(g).decode(), "advantages": a} for g, a in self._ready],
            "queue": [batch.as_dict() for batch in self._queue],
            "held": None if self._held is None else jax.device_get(jax.tree.leaves(self._held)),
        }  # fmt: skip

    def _restore(self, state: HostState) -> None:
        if set(state["drawn"]) != set(self._tasks):
            raise ConfigError(
                f"this run was trained on the tasks {', '.join(state['drawn'])} and goes on with the same ones only, "
                f"not {', '.join(self._tasks)}; use another workdir"
            )
        self._iteration, self._delivered = state["iteration"], state["delivered"]
        self._drawn, self._counts = dict(state["drawn"]), dict(state["counts"])
        self._shaping, self._metrics = shaping.ShapingState.from_json(state["shaping"]), dict(state["metrics"])
        self._pending = [self._reopen(each) for each in state["pending"]]
        self._ready = [(record.load(each["group"].encode()), list(each["advantages"])) for each in state["ready"]]
        self._queue = [PackedBatch.from_dict(batch) for batch in state["queue"]]
        self._held = state["held"]

    def _reopen(self, saved: Mapping[str, Any]) -> Any:
        name, index = saved["task"], saved["index"]
        group = self._worker.begin(name, index, self._problem(name, index), 0, 0)
        group.answers = [PendingAnswer.of_state(answer) for answer in saved["answers"]]
        return group

    def report(self) -> dict[str, Any]:
        """Batches delivered, and the last iteration: rewards, lengths, staleness, seconds of each part."""
        return {"batches": self._delivered, "iteration": self._iteration, **self._counts, **self._metrics}

    def close(self) -> None:
        """Ends the worker's interpreters."""
        self._worker.close()

    # ------------------------------------------------------------------------------------------------------- iteration

    def _iterate(self) -> list[PackedBatch]:
        """The batches of one iteration."""
        clock = [time.perf_counter()]
        self._hand_over()
        clock.append(time.perf_counter())
        finished, metrics = self._draw()
        clock.append(time.perf_counter())
        chosen, self._ready = self._ready[: self._rl.rollout.prompts], self._ready[self._rl.rollout.prompts :]
        if not chosen:  # every answer of every group had the same reward: nothing to learn but tau's pull
            chosen = [(group, [0.0] * len(group.trajectories)) for group in finished[: self._rl.rollout.prompts]]
        ages = staleness([group for group, _ in chosen], self._iteration)
        batches = self._pack(chosen)
        sampled = int(ages.sum())
        self._metrics = {
            **metrics, **self._worker.take_metrics(), "groups": len(chosen), "pending": len(self._pending),
            "waiting": len(self._ready),
            "turns_mean": _turns_mean([group for group, _ in chosen]),
            "staleness": {str(age): int(count) / max(sampled, 1) for age, count in enumerate(ages)},
            "sync_seconds": clock[1] - clock[0], "rollout_seconds": clock[2] - clock[1],
            "pack_seconds": time.perf_counter() - clock[2],
        }  # fmt: skip
        self._iteration += 1
        self._shaping = self._shaping.advance()
        return batches * self._rl.rollout.passes

    def _hand_over(self) -> None:
        """The sampler gets the newest weights, or keeps those of the last hand-over; it forgets its prefixes in any
        case, so that a run that goes on here reads prompts in the same pieces."""
        interval = self._rl.rollout.sync_interval
        if self._iteration % interval == 0:
            # a copy only if these weights are needed after the training step has been given theirs
            self._held = jax.tree.map(lambda x: x.copy(), self._params) if interval > 1 else None
        elif isinstance(self._held, list):  # from a checkpoint
            leaves = zip(self._held, jax.tree.leaves(self._params), strict=True)
            placed = [jax.device_put(saved, now.sharding) for saved, now in leaves]
            self._held = jax.tree.unflatten(jax.tree.structure(self._params), placed)
        version = self._iteration - self._iteration % interval
        self._worker.set_params(self._params if self._held is None else self._held, version)

    def _draw(self) -> tuple[list[Group], dict[str, Any]]:
        """Draws until enough groups are ready; all groups that were completed, and metrics of them."""
        rollout = self._rl.rollout
        draws_left = math.ceil((rollout.max_draws + rollout.max_staleness) * rollout.prompts)
        finished: list[Group] = []
        while True:
            missing = (rollout.max_staleness + 1) * rollout.prompts - len(self._pending) - len(self._ready)
            new = max(min(missing, draws_left), 0)
            self._pending += [self._begin() for _ in range(new)]
            draws_left -= new
            self._worker.draw(self._pending, rollout.tokens_per_iteration)
            finished += self._collect()
            if len(self._ready) >= rollout.prompts or (draws_left <= 0 and not self._pending):
                break
        return finished, shaping.drop_uninformative(finished)[1]

    def _begin(self) -> Any:
        """The next prompt: of a task drawn by weight, its next problem that can be used."""
        names = list(self._tasks)
        weights = np.array([self._rl.tasks[name].weight for name in names])
        for _ in range(MAX_DROPPED):
            rng = np.random.default_rng((self._config.seed, sum(self._drawn.values())))
            name = names[rng.choice(len(names), p=weights / weights.sum())]
            index = self._drawn[name]
            self._drawn[name] += 1
            try:
                problem = self._problem(name, index)
                return self._worker.begin(name, index, problem, self._rl.rollout.samples, self._config.seed)
            except BadRecord as bad:
                self._counts["unfit"] += 1
                last = bad
        raise ConfigError(f"{MAX_DROPPED} problems in a row cannot be used; the last one: {last}")

    def _problem(self, name: str, index: int) -> Any:
        """Problem `index` of a task, which begins again in another order when all have been drawn."""
        task = self._tasks[name]
        epoch, place = divmod(index, len(task))
        if len(task) <= 1 << 20:
            place = int(np.random.default_rng((self._config.seed, epoch)).permutation(len(task))[place])
        return task[place]

    def _collect(self) -> list[Group]:
        """Scores the complete groups, in the order in which they were begun; those that say something become ready."""
        done = [group for group in self._pending if group.complete]
        self._pending = [group for group in self._pending if not group.complete]
        failed = [group for group in done if group.failed]
        self._counts["failed"] += len(failed)
        groups = [group.group(self._worker.rewards(group, self._iteration)) for group in done if not group.failed]
        shaped = self._shape_rewards(groups)
        for group, rewards in zip(groups, shaped, strict=True):
            if self._rl.rollout.drop_uninformative and not shaping.is_informative(rewards):
                self._counts["dropped"] += 1
            else:
                self._ready.append((group, shaping.advantages(rewards, deviation=self._rl.policy.deviation).tolist()))
        if self._show:
            self._show(self._iteration, groups, [list(map(float, rewards)) for rewards in shaped])
        return groups

    def _shape_rewards(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Toggle, then the penalty of truncated answers."""
        rewards = [np.array([t.reward for t in group.trajectories], np.float64) for group in groups]
        if self._rl.toggle is not None:
            toggle = shaping.Toggle(self._rl.toggle.period, self._rl.toggle.threshold, self._rl.toggle.percentile)
            scored = [
                shaping.ScoredGroup(g.key, r.tolist(), [t.num_sampled() for t in g.trajectories])
                for g, r in zip(groups, rewards, strict=True)
            ]
            rewards, self._shaping = shaping.apply_toggle(toggle, self._shaping, scored)
        penalty = self._rl.rollout.truncation_penalty
        if penalty is not None:
            for group, values in zip(groups, rewards, strict=True):
                values[[t.finish == "length" for t in group.trajectories]] = penalty
        return rewards

    def _pack(self, chosen: Sequence[Ready]) -> list[PackedBatch]:
        """The groups in `updates` batches of about equally many groups. What does not fit is an error: half a group
        would have another mean."""
        updates, batches = self._rl.rollout.updates, []
        for part in np.array_split(np.arange(len(chosen)), updates):
            items: list[TrainingSample] = []
            for i in part:
                group, advantages = chosen[i]
                items += samples(group, advantages, self._config.model.media_placeholder_token_id)
            try:
                batch, left = pack(items, self._shape, self._packs)
            except ValueError as problem:
                raise ConfigError(f"a rollout does not fit an empty pack: {problem}") from problem
            if left:
                raise ConfigError(
                    f"{len(left)} of {len(items)} answers found no room in {self._packs} packs of "
                    f"{self._shape.rows} rows x {self._shape.sequence_length} tokens and the bins {self._shape.bins}: "
                    "raise config.data.num_packs, rows_per_pack or vision_bins, or lower config.rl.rollout.prompts"
                )
            batches.append(batch)
        return batches


def _turns_mean(groups: Sequence[Group]) -> float:
    """Replies of the model in an answer."""
    answers = [t for group in groups for t in group.trajectories]
    turns = sum(bool(segment.sampled.any()) for t in answers for segment in t.segments)
    return turns / max(len(answers), 1)


def settings(config: TrainConfig) -> RLConfig:
    """The section `rl`. Raises ConfigError if it is off or names no task."""
    if config.rl is None or not config.rl.tasks:
        raise ConfigError(
            "config.rl.tasks is empty: add one with --config.rl.tasks.NAME.kind=copy, or use a file of configs/rl"
        )
    return config.rl
