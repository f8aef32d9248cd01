"""The scenes of `kimi_jax.data.sources.demo_scene` as a JSONL file with PNG files beside it, and tasks about others.

An example is mostly vision tokens, so that a vision ratio of a half can be reached.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kimi_jax.data.example import Image, Text
from kimi_jax.data.sources.demo_scene import COLOURS, DIGITS, RELATIONS, SHAPES, scene
from kimi_jax.eval.tasks import Control, EvalTask, Question, blank_image, register
from kimi_jax.train.log import write_atomic

BLANK = Control("blank image", change=blank_image)


def write(folder: Path, count: int) -> Path:
    """Writes the first `count` training scenes to `folder`; returns the JSONL file, which is whole or not there."""
    file = folder / "scenes.jsonl"
    if file.exists() and len(file.read_text().splitlines()) == count:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        shown = scene("train", i)
        shown.image.save(folder / f"{i}.png")
        parts = [{"image": f"{i}.png"}, {"text": "\n", "loss": 0}, {"text": shown.caption}]
        lines.append(json.dumps({"id": f"scene-{i}", "parts": parts}) + "\n")
    write_atomic(file, "".join(lines))
    return file


# ---------------------------------------------------------------------------------------------------------------- tasks


def _questions(answer_at: int, choices: tuple[str, ...], digits: bool) -> Callable[[int], list[Question]]:
    """Held-out scenes whose caption is given up to word `answer_at`; the next word is chosen from `choices`."""

    def build(limit: int) -> list[Question]:
        asked: list[Question] = []
        i = 0
        while len(asked) < limit:
            if (i % 6 == 5) == digits:
                shown = scene("validation", i)
                before = " ".join(shown.words[:answer_at])
                gold = shown.words[answer_at].removesuffix(" of")
                # either shape may come first in a caption, so the colour of the other one would be right as well
                other = shown.words[5:6]
                offered = tuple(f" {choice}" for choice in choices if choice not in other)
                context = (Image(shown.image), Text("\n" + before, 0.0))
                asked.append(Question(context, f" {gold}", offered, before + " …", f"scene {i}"))
            i += 1
        return asked

    return build


def _register(name: str, column: str, doc: str, answer_at: int, choices: tuple[str, ...], digits: bool = False) -> None:
    register(
        EvalTask(
            name=name,
            column=column,
            modality="image",
            kind="choice",
            metrics=("accuracy",),
            doc=doc,
            build=_questions(answer_at, choices, digits),
            chance=lambda questions, metric: float(np.mean([1 / len(q.choices) for q in questions])),
            controls=(BLANK,),
            report_majority=True,
        )
    )


@functools.cache
def register_tasks() -> None:
    """Adds the tasks of this module to `kimi_jax.eval.tasks`, once."""
    captioned = "Held-out rendered scenes, captioned as far as the word asked for; likelihood of the next word."
    _register("scene_colour", "vision_knowledge", f"{captioned} Colour of the first shape.", 1, tuple(COLOURS))
    _register("scene_shape", "vision_knowledge", f"{captioned} Shape of the first one.", 2, SHAPES)
    _register("scene_relation", "vision_reasoning", f"{captioned} Where the first stands.", 3, tuple(RELATIONS))
    _register("scene_digit", "ocr", "Held-out printed digits; likelihood of the ten.", 2, DIGITS, digits=True)
