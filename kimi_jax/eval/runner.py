"""Runs tasks on a model: questions in, rows of the results out. `evaluate` is the entry.

Every task is run once as it is and once for each control that changes its questions (see `kimi_jax.eval.tasks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimi_jax.config import TrainConfig
from kimi_jax.data.example import Image, Video
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.eval import scorers
from kimi_jax.eval.packed import Apply, Scorer
from kimi_jax.eval.tasks import EvalTask, Question, resolve

SAMPLES = 8  # of each task, for the report


@dataclass(frozen=True)
class Row:
    """One line of the results. `control` is the primary one; `controls` holds all by name."""

    task: str
    column: str
    modality: str
    metric: str
    score: float
    stderr: float
    control: float
    control_name: str
    chance: float
    n: int
    majority: float | None = None
    controls: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSample:
    """One question with what was answered, for people to look at. `media`: uint8 [h, w, 3] images or frames."""

    task: str
    question: str
    gold: str
    answer: str
    control_answer: str | None
    correct: bool
    media: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Answered:
    """Outcome of one question: the answer in words, and (numerator, denominator) of each metric."""

    text: str
    values: dict[str, tuple[float, float]]


# ---------------------------------------------------------------------------------------------------------------- tasks


def evaluate(
    params: Any,
    config: TrainConfig,
    tasks: str | Sequence[str],
    limit: int,
    *,
    tokenizer: Tokenizer | None = None,
    apply: Apply | None = None,
    samples: list[EvalSample] | None = None,
    frozen: Any = None,
) -> list[Row]:
    """Rows of the named tasks ("all": every one), at most `limit` questions each, in the shapes of `config.data`.

    `samples`, if given, receives the first questions of each task with their answers. frozen: with `config.lora` the
    weights; `params` are then its adapters. Tasks with images or video are left out for a model without vision. Raises
    KeyError for an unknown task.
    """
    scorer = Scorer(params, config, tokenizer, apply, frozen)
    chosen = [t for t in resolve(tasks) if config.model.vision or t.modality == "text"]
    return [row for task in chosen for row in run_task(scorer, task, limit, samples)]


def run_task(scorer: Scorer, task: EvalTask, limit: int, samples: list[EvalSample] | None = None) -> list[Row]:
    """Rows of one task, one a metric."""
    questions = task.build(limit)
    answered = answer(scorer, task, questions)
    controls: dict[str, list[Answered] | float] = {}
    for control in task.controls:
        if control.change:
            changed = [control.change(q, i) for i, q in enumerate(questions)]
            controls[control.name] = answer(scorer, task, changed)
        elif control.score:
            controls[control.name] = control.score(questions)
        elif control.other_answers:
            others = [a.text for a in answered[1:] + answered[:1]]
            controls[control.name] = [
                _generated(text, q.gold, task.metrics) for text, q in zip(others, questions, strict=True)
            ]
    primary = controls[task.controls[0].name]
    if samples is not None:
        against = primary if isinstance(primary, list) and task.controls[0].change else None
        samples += _samples(task, questions, answered, against)
    rows = []
    for metric in task.metrics:
        score, stderr = _estimate(answered, questions, metric)
        levels = {k: v if isinstance(v, float) else _estimate(v, questions, metric)[0] for k, v in controls.items()}
        name = task.controls[0].name
        chance = float(task.chance(questions, metric))
        majority = scorers.majority_rate([q.gold for q in questions]) if task.report_majority else None
        rows.append(
            Row(
                task.name, task.column, task.modality, metric, score, stderr, levels[name], name, chance,
                len(questions), majority, levels,
            )
        )  # fmt: skip
    return rows


def answer(scorer: Scorer, task: EvalTask, questions: Sequence[Question]) -> list[Answered]:
    """What the model answers to each question, with the values that the task's metrics sum up."""
    if task.kind == "choice":
        picked = scorer.choose(questions, task.by_length)
        answers = [q.choices[k] for k, q in zip(picked, questions, strict=True)]
        return [
            Answered(a.strip(), {"accuracy": (float(a == q.gold), 1.0)})
            for a, q in zip(answers, questions, strict=True)
        ]
    if task.kind == "generate":
        texts = scorer.generate([scorer.encode(q.context) for q in questions], task.max_new_tokens)
        return [_generated(t, q.gold, task.metrics) for t, q in zip(texts, questions, strict=True)]
    pieces = [scorer.bits(q.gold) for q in questions]
    scored = iter(scorer.score([piece for group in pieces for piece in group]))
    answered = []
    for group in pieces:
        nll = sum(next(scored).nll for _ in group)
        n = sum(scorer.tokenizer.token_bytes(piece.tokens[1:].tolist()) for piece in group)
        answered.append(Answered(f"{nll / np.log(2) / max(n, 1):.2f}", {"bits_per_byte": (nll / np.log(2), float(n))}))
    return answered


def _generated(text: str, gold: str, metrics: Sequence[str]) -> Answered:
    functions = {"exact_match": scorers.exact_match, "edit_similarity": scorers.edit_similarity}
    return Answered(text.strip(), {m: (functions[m](text, gold), 1.0) for m in metrics})


def _estimate(answered: Sequence[Answered], questions: Sequence[Question], metric: str) -> tuple[float, float]:
    values = [a.values[metric] for a in answered]
    clusters = [q.cluster or str(i) for i, q in enumerate(questions)]
    return scorers.ratio_estimate([v[0] for v in values], [v[1] for v in values], clusters)


def _samples(
    task: EvalTask, questions: Sequence[Question], answered: Sequence[Answered], controls: Sequence[Answered] | None
) -> list[EvalSample]:
    if task.kind == "text":
        return []
    found = []
    for i, (question, given) in enumerate(zip(questions[:SAMPLES], answered[:SAMPLES], strict=True)):
        media: list[np.ndarray] = []
        for part in question.context:
            if isinstance(part, Image):
                media.append(np.asarray(part.image))
            elif isinstance(part, Video):
                media += [np.asarray(frame) for frame in part.frames]
        control = controls[i].text if controls else None
        correct = given.values[task.metrics[0]][0] == 1.0
        gold = question.gold.strip()
        found.append(EvalSample(task.name, question.shown, gold, given.text, control, correct, tuple(media)))
    return found
