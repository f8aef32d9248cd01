"""The tasks: what is asked, how it is scored, what chance and the controls are. One registry, `TASKS`.

Columns are those of the paper's Table 1 (section 2.2; it does not name its benchmarks) at the scale of the demo, plus
video and held-out text. All questions come from validation splits of `kimi_jax.data.sources.demo`.

A control asks the same questions with the evidence taken away. A score that its control reaches as well was not earned
by looking (or reading). Every text of a task stands in its `doc`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kimi_jax.data.example import Image, Text, Video

Part = Text | Image | Video

COLUMNS = (
    "vision_knowledge", "vision_reasoning", "ocr", "text_knowledge", "text_reasoning", "code", "video",
    "language_modelling", "long_context",
)  # fmt: skip
METRICS = {
    "choice": ("accuracy",),
    "generate": ("exact_match", "edit_similarity"),
    "text": ("bits_per_byte",),
}
SEED = 7


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    context:  what the model is given.
    choices:  answers to choose from as they would be written (likelihood); () for a generated or scored text.
    gold:     the right answer: one of `choices`, the text to generate, or the text to score.
    shown:    the question in words, for the report.
    cluster:  questions with the same cluster are not independent.
    """

    context: tuple[Part, ...]
    gold: str
    choices: tuple[str, ...] = ()
    shown: str = ""
    cluster: str = ""


@dataclass(frozen=True)
class Control:
    """A way to take the evidence away: `change(question, index) -> question`, or a `score` that takes no model.

    `other_answers` scores each question with the answer that the model gave to the next one.
    """

    name: str
    change: Callable[[Question, int], Question] | None = None
    score: Callable[[Sequence[Question]], float] | None = None
    other_answers: bool = False


@dataclass(frozen=True)
class EvalTask:
    """One row of the results. `doc` gives source and protocol; `controls[0]` is the one printed beside the score.

    kind: "choice" (likelihood), "generate" (greedy), "text" (bits per byte). `modality`: text, image or video.
    metrics: one row of the results each. build(limit) -> the first `limit` questions of a fixed order.
    chance(questions, metric): expected score without any knowledge.
    only_by_name: not one of "all", because its questions take longer rows than most runs have.
    """

    name: str
    column: str
    modality: str
    kind: str
    metrics: tuple[str, ...]
    doc: str
    build: Callable[[int], list[Question]]
    chance: Callable[[Sequence[Question], str], float]
    controls: tuple[Control, ...]
    by_length: bool = False  # compare choices by log-likelihood a byte
    max_new_tokens: int = 0
    report_majority: bool = False
    only_by_name: bool = False


TASKS: dict[str, EvalTask] = {}


def register(task: EvalTask) -> EvalTask:
    """Adds a task to TASKS. Raises ValueError for a name that is taken, an unknown column or metric, or no control."""
    if task.name in TASKS:
        raise ValueError(f"there is a task {task.name!r} already")
    if task.column not in COLUMNS:
        raise ValueError(f"task {task.name!r}: no column {task.column!r}; there are: {', '.join(COLUMNS)}")
    if not set(task.metrics) <= set(METRICS[task.kind]):
        raise ValueError(f"task {task.name!r}: kind {task.kind!r} has the metrics {METRICS[task.kind]}")
    if not task.controls:
        raise ValueError(f"task {task.name!r} has no control: a score alone says nothing")
    TASKS[task.name] = task
    return task


def resolve(names: str | Sequence[str]) -> list[EvalTask]:
    """Tasks by name; "all" is every task but those `only_by_name`. Names may be joined by commas.

    Raises KeyError with the known names.
    """
    load()
    wanted = names.split(",") if isinstance(names, str) else list(names)
    if wanted == ["all"]:
        return [task for task in TASKS.values() if not task.only_by_name]
    for name in wanted:
        if name not in TASKS:
            raise KeyError(f"no task is called {name!r}; there are: {', '.join(TASKS)}")
    return [TASKS[name] for name in wanted]


def load() -> None:
    """Fills TASKS; the data itself is opened when questions are built."""
    from kimi_jax.eval import task_long, task_text, task_vision  # noqa: F401


def shuffled(items: Sequence, limit: int) -> list:
    """The first `limit` of `items` in an order that is always the same."""
    order = np.random.default_rng(SEED).permutation(len(items))[:limit]
    return [items[k] for k in order]


# ------------------------------------------------------------------------------------------------------------- controls


def _map(question: Question, kind: type, change: Callable) -> Question:
    parts = tuple(change(p) if isinstance(p, kind) else p for p in question.context)
    return dataclasses.replace(question, context=parts)


def blank_image(question: Question, index: int) -> Question:
    """Every image becomes plain white, of the same size."""
    return _map(question, Image, lambda p: Image(np.full_like(np.asarray(p.image), 255)))


def single_frame(question: Question, index: int) -> Question:
    """Every video becomes its first frame."""
    return _map(question, Video, lambda p: Video(p.frames[:1], p.timestamps[:1]))


def shuffled_frames(question: Question, index: int) -> Question:
    """The frames of every video in an order that has as many pairs the right way round as the wrong way.

    The number of pairs is even for 4 frames; with an odd number (2, 3 frames) there is one more on a side.
    """

    def change(video: Video) -> Video:
        order = balanced_order(len(video.frames), np.random.default_rng((SEED, index)))
        return Video([video.frames[k] for k in order], video.timestamps)

    return _map(question, Video, change)


def balanced_order(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation of n whose inversions number n(n-1)/4, rounded either way."""
    pairs = n * (n - 1) // 2
    while True:
        order = rng.permutation(n)
        inversions = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
        if abs(2 * inversions - pairs) <= 1:
            return order
