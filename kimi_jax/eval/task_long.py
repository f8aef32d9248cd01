"""Retrieval of a fact from long text and long video, at the lengths of the demo's stages (configs/pretrain).

A question takes nearly a row of so many tokens, so that these tasks are scored where they are named, with rows that
hold them (`data.sequence_length`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kimi_jax.data.example import Text
from kimi_jax.data.sources import demo_long
from kimi_jax.eval.task_vision import ask
from kimi_jax.eval.tasks import Control, EvalTask, Question, register


def _from_text(tokens: int, i: int, fact: bool = True) -> Question:
    text, question, number = demo_long.needle_text("validation", tokens, i, fact)
    choices = tuple(f" {each}" for each in demo_long.NUMBERS)
    context = (Text(text, 0.0), Text(question, 0.0))
    return Question(context, f" {number}", choices, f"{question.strip()} …", f"text {i}")


def _from_video(tokens: int, i: int, fact: bool = True) -> Question:
    video, colour = demo_long.needle_video("validation", tokens, i, fact)
    return ask(video, demo_long.CARD_QUESTION, colour, demo_long.CARDS, f"video {i}")


def _without(build: Callable[[int, int, bool], Question], tokens: int) -> Callable[[Question, int], Question]:
    """The question about the same document without the fact."""
    return lambda question, i: dataclasses.replace(question, context=build(tokens, i, False).context)


def _register(
    name: str, modality: str, build: Callable[..., Question], tokens: int, choices: int, what: str, control: str
) -> None:
    register(
        EvalTask(
            name=f"{name}_{tokens}",
            column="long_context",
            modality=modality,
            kind="choice",
            metrics=("accuracy",),
            doc=f"{what}, in documents of up to {tokens} tokens; likelihood of {choices} answers. Control: {control}.",
            build=lambda limit: [build(tokens, i) for i in range(limit)],
            chance=lambda questions, metric: 1 / choices,
            controls=(Control(control, change=_without(build, tokens)),),
            report_majority=True,
            only_by_name=True,
        )
    )


for _tokens in demo_long.TOKENS:
    _register(
        "needle_text", "text", _from_text, _tokens, len(demo_long.NUMBERS),
        "A number that held-out Wikipedia leads say somewhere, asked for at the end", "without the sentence",
    )  # fmt: skip
    _register(
        "needle_video", "video", _from_video, _tokens, len(demo_long.CARDS),
        "The colour of one frame of a grey video of a held-out clip, asked for at the end", "without the frame",
    )  # fmt: skip
