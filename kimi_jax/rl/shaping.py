"""From rewards to advantages: group mean, Toggle, budget control, groups that say nothing, annealed weights.

Source: Kimi K2.5 report (arXiv 2602.02276), sections 5.1 (mean baseline) and 5.4 (Toggle); Kimi K2 report (arXiv
2507.20534), section 3.2.3 (budget control); docs/paper_notes.md section 5.4 for the readings.

K samples of a prompt   m iterations of a Toggle phase   t learning iteration, counted in the checkpoint

Everything that depends on time depends on the step in `ShapingState`, which a run keeps in its checkpoint: a run that
is killed resumes in the same phase, with the same budgets and the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.rl.types import Group

MAX_PROMPTS = 1 << 22  # whose budgets a state holds
CORRECT = 1 - 1e-6  # a reward from here on counts as a correct answer


def advantages(rewards: Sequence[float] | np.ndarray, baseline: str = "mean", deviation: bool = False) -> np.ndarray:
    """float64 [K]: rewards minus their mean (K2.5), or minus the mean of the *other* samples ("leave_one_out").

    deviation: also divide by the standard deviation, as GRPO does; a group of equal rewards stays 0.
    Raises ValueError for an unknown baseline, an empty group or a reward that is not finite.
    """
    r = np.asarray(rewards, np.float64)
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'baseline={baseline!r} must be "mean" or "leave_one_out"')
    if r.ndim != 1 or not len(r) or not np.isfinite(r).all():
        raise ValueError(f"a group has one finite reward for each sample, not {r}")
    if (r == r[0]).all():
        return np.zeros_like(r)  # exactly: the mean of equal numbers may differ from them in the last bit
    a = r - r.mean()
    if baseline == "leave_one_out":
        a *= len(r) / (len(r) - 1)
    return a / r.std() if deviation else a


@dataclass(frozen=True)
class Anneal:
    """A weight that falls linearly from `start` at step 0 to `end` at step `steps` and stays there (PARL's lambdas)."""

    start: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"{self}: finite weights and at least one step")

    def at(self, step: int) -> float:
        """The weight of a step."""
        return self.start + (self.end - self.start) * min(max(step, 0) / self.steps, 1.0)


@dataclass(frozen=True)
class Toggle:
    """Alternates between a length budget and none (section 5.4, equation 2). The report gives no values.

    period:     m, learning iterations of a phase; the one with budgets comes first.
    threshold:  lambda; a prompt whose mean reward is below it has no budget in this iteration.
    percentile: rho, 0..100, of the lengths of correct answers, which is the budget.
    """

    period: int = 10
    threshold: float = 0.875
    percentile: float = 90.0

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.percentile <= 100 or not math.isfinite(self.threshold):
            raise ValueError(f"{self}: period is at least 1, percentile 0..100, threshold a number")

    def has_budget(self, step: int) -> bool:
        """Whether iteration t is in phase 0, floor(t / m) mod 2 = 0."""
        return step // self.period % 2 == 0

    def measure(self, rewards: Sequence[float], lengths: Sequence[int]) -> float | None:
        """The budget of a prompt from its samples; None if none of them is correct."""
        right = [n for r, n in zip(rewards, lengths, strict=True) if r >= CORRECT]
        return float(np.percentile(right, self.percentile)) if right else None


@dataclass(frozen=True)
class ShapingState:
    """What a checkpoint keeps. step: learning iterations done. budgets: of each prompt, None: it has no budget.

    A prompt is measured when it is met for the first time, and never again: what is measured later would shrink with
    the answers that the budget has shortened.
    """

    step: int = 0
    budgets: Mapping[str, float | None] = field(default_factory=dict)

    def advance(self) -> ShapingState:
        """After one learning iteration."""
        return replace(self, step=self.step + 1)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; `from_json` brings back an equal state."""
        return {"step": self.step, "budgets": dict(self.budgets)}

    @classmethod
    def from_json(cls, value: Any) -> ShapingState:
        """Raises ValueError for anything that `to_json` does not write."""
        if not isinstance(value, dict) or set(value) != {"step", "budgets"}:
            raise ValueError("the state of reward shaping has the fields step and budgets")
        step, budgets = value["step"], value["budgets"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step of the state of reward shaping is {step!r:.60}, not a count")
        if not isinstance(budgets, dict) or len(budgets) > MAX_PROMPTS:
            raise ValueError(f"budgets of the state of reward shaping are an object of at most {MAX_PROMPTS} prompts")
        for key, budget in budgets.items():
            fine = budget is None or (type(budget) in (int, float) and 0 <= budget < math.inf)
            if not isinstance(key, str) or not fine:
                raise ValueError(f"the budget of prompt {key!r:.60} is {budget!r:.60}, not a length or null")
        return cls(step, dict(budgets))


class ScoredGroup(NamedTuple):
    """The samples of one prompt as Toggle sees them: key of the prompt, [K] rewards, [K] lengths in sampled tokens."""

    key: str
    rewards: Sequence[float]
    lengths: Sequence[int]


def apply_toggle(
    toggle: Toggle, state: ShapingState, groups: Sequence[ScoredGroup]
) -> tuple[list[np.ndarray], ShapingState]:
    """(float64 [K] rewards of this iteration for each group, the state with the budgets of all its prompts).

    With a budget a sample keeps its reward only if it is within it, or if the prompt's mean reward is below the
    threshold; a correct answer that is too long then has reward 0, so a negative advantage beside shorter ones.
    """
    new = {g.key: toggle.measure(g.rewards, g.lengths) for g in reversed(groups) if g.key not in state.budgets}
    if new:
        state = replace(state, budgets={**state.budgets, **new})
    shaped = []
    for group in groups:
        r, budget = np.asarray(group.rewards, np.float64), state.budgets[group.key]
        if toggle.has_budget(state.step) and budget is not None and r.mean() >= toggle.threshold:
            r = np.where(np.asarray(group.lengths) <= budget, r, 0.0)
        shaped.append(r)
    return shaped, state


def control_budget(
    rewards: Sequence[float] | np.ndarray, lengths: Sequence[int], budget: int, penalty: float = 0.0
) -> np.ndarray:
    """float64 [K]: K2's budget control. An answer that reached `budget` tokens was cut off: its reward is `penalty`.

    penalty is 0 or less, so that being cut off is never worth more than being wrong.
    """
    if penalty > 0 or budget < 1:
        raise ValueError(f"budget={budget} is at least 1 and penalty={penalty} at most 0")
    return np.where(np.asarray(lengths) >= budget, penalty, np.asarray(rewards, np.float64))


def is_informative(rewards: Sequence[float] | np.ndarray, tolerance: float = 1e-6) -> bool:
    """Whether the samples of a group differ in reward; otherwise every advantage is 0 and only tau would act."""
    return float(np.ptp(np.asarray(rewards, np.float64))) > tolerance


def drop_uninformative(groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    """The groups that say something (dynamic sampling: the caller draws others), and metrics of all of them.

    Metrics: `reward_mean`, `reward_std` (over samples), `solve_none` and `solve_all` (shares of groups whose samples
    are all wrong, or all correct), `length_mean`, `length_max` (sampled tokens), `truncated` (share of samples that
    ended by length). Raises ValueError for an unfinished sample: it has no reward yet.
    """
    kept, rewards, lengths, finishes, none, full = [], [], [], [], 0, 0
    for group in groups:
        r = [_reward(group.key, t.reward) for t in group.trajectories]
        if is_informative(r):
            kept.append(group)
        none, full = none + (max(r) <= 0), full + (min(r) >= CORRECT)
        rewards += r
        lengths += [t.num_sampled() for t in group.trajectories]
        finishes += [t.finish == "length" for t in group.trajectories]
    if not rewards:
        return kept, {}
    metrics: dict[str, Any] = {
        "reward_mean": np.mean(rewards), "reward_std": np.std(rewards), "solve_none": none / len(groups),
        "solve_all": full / len(groups), "length_mean": np.mean(lengths), "length_max": max(lengths),
        "truncated": np.mean(finishes),
    }  # fmt: skip
    return kept, {name: float(value) for name, value in metrics.items()}


def _reward(key: str, reward: float | None) -> float:
    if reward is None:
        raise ValueError(f"group {key}: a sample has no reward; only finished samples can be compared")
    return reward
