"""Held-out problems of a run's tasks, answered greedily, beside the same problems with white images.

Called by the training loop in the place of `eval.runner.evaluate`; its rows are that one's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.config import TrainConfig
from kimi_jax.data.example import Image, Text
from kimi_jax.eval.runner import SAMPLES, EvalSample, Row
from kimi_jax.rl.episode import transcript
from kimi_jax.rl.pending import PendingGroup
from kimi_jax.rl.rollout import settings
from kimi_jax.rl.tasks import Problem, blank, open_task
from kimi_jax.rl.worker import RolloutWorker


def evaluate(
    worker: RolloutWorker,
    params: Any,
    config: TrainConfig,
    tasks: Sequence[str],
    limit: int,
    *,
    samples: list[EvalSample] | None = None,
    frozen: Any = None,
) -> list[Row]:
    """A row for each named task of `config.rl.tasks` ("all": every one), up to `limit` held-out problems each.

    score: the mean reward of greedy answers; control: with white images (for text the answer to the next problem);
    chance: always giving the most common truth. frozen: unused, for the loop. Raises KeyError for an unknown task.
    """
    rl = settings(config)
    names = list(rl.tasks) if "all" in tasks else list(tasks)
    worker.set_params(params, 0)
    rows = []
    for name in names:
        task = open_task(rl.tasks[name], "validation")
        problems = [task[i] for i in range(min(limit, len(task)))]
        answers, shown = _answer(worker, name, problems)
        has_images = any(isinstance(part, Image) for part in problems[0].parts)
        if has_images:
            control, shown_control = _answer(worker, name, [blank(problem) for problem in problems])
        else:
            control, shown_control = answers[1:] + answers[:1], shown[1:] + shown[:1]
        rewards = _rewards(problems, answers)
        truth, _ = Counter(str(problem.truth) for problem in problems).most_common(1)[0]
        rows.append(
            Row(
                name, rl.tasks[name].kind, "image" if has_images else "text", "reward", float(rewards.mean()),
                float(rewards.std(ddof=1) / math.sqrt(len(rewards))) if len(rewards) > 1 else 0.0,
                float(_rewards(problems, control).mean()), "white image" if has_images else "next answer",
                float(_rewards(problems, [truth] * len(problems)).mean()), len(problems),
            )
        )  # fmt: skip
        if samples is not None:
            correct = (rewards >= 1.0).tolist()
            each = zip(problems[:SAMPLES], shown, shown_control, correct, strict=False)
            samples += [_shown(name, *one) for one in each]
    worker.take_metrics()  # those of the log are of rollouts
    return rows


def _answer(worker: RolloutWorker, name: str, problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    """What the answers say, and the same for people: with the calls of tools before it."""
    groups: list[PendingGroup] = [worker.begin(name, i, problem, 1, 0) for i, problem in enumerate(problems)]
    worker.draw(groups, greedy=True)
    texts = [worker.text(group, group.answers[0]) for group in groups]
    return texts, [transcript(group.answers[0].calls, text) for group, text in zip(groups, texts, strict=True)]


def _rewards(problems: Sequence[Problem], answers: Sequence[str]) -> np.ndarray:
    return np.array([problem.reward(answer) for problem, answer in zip(problems, answers, strict=True)])


def _shown(name: str, problem: Problem, answer: str, control: str, correct: bool) -> EvalSample:
    question, media = question_of(problem), images_of(problem)
    return EvalSample(name, question, str(problem.truth), answer.strip(), control.strip(), correct, media)


def question_of(problem: Problem) -> str:
    """The text of a problem."""
    return "".join(part.text for part in problem.parts if isinstance(part, Text)).strip()


def images_of(problem: Problem) -> tuple[np.ndarray, ...]:
    """The images of a problem, uint8 [h, w, 3]."""
    return tuple(np.asarray(part.image) for part in problem.parts if isinstance(part, Image))
