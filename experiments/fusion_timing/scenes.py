"""Rendered scenes with captions, as a JSONL file with PNG files beside it, and the tasks that ask about held-out ones.

Five scenes in six hold two coloured shapes of which one stands left of, right of, above or below the other: "a red
circle above a blue square". One in six is a printed digit: "the number 7". Images have 112 to 168 pixels a side, 16 to
36 tokens, so that an example is mostly vision tokens and a vision ratio of a half can be reached.

Scene i of a split depends on the split and i only. Licence of the data: generated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from kimi_jax.data.example import Image, Text
from kimi_jax.data.sources.demo_base import generator
from kimi_jax.eval.tasks import Control, Question, Task, blank_image, register
from kimi_jax.train.log import write_atomic

COLOURS = {
    "red": (214, 48, 38), "green": (38, 150, 62), "blue": (40, 74, 204), "yellow": (238, 202, 34),
    "purple": (142, 60, 168), "black": (24, 24, 24),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}
SIDES = (112, 140, 168)
DIGITS = tuple("0123456789")
BLANK = Control("blank image", change=blank_image)


@dataclass(frozen=True)
class Scene:
    """An image (RGB) and its caption in `words`: one element for each answer that a task may ask for."""

    image: PILImage.Image
    words: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The caption as it is trained on."""
        return " ".join(self.words)


def scene(split: str, i: int) -> Scene:
    """Scene i of "train" or "validation"."""
    rng = generator("fusion_timing/scenes", split, i)
    width, height = (int(side) for side in rng.choice(SIDES, size=2))
    image = PILImage.new("RGB", (width, height), tuple(int(v) for v in rng.integers(222, 256, size=3)))
    draw = ImageDraw.Draw(image)
    if i % 6 == 5:
        return Scene(image, _digit(draw, width, height, rng))
    first, second = (str(colour) for colour in rng.choice(list(COLOURS), size=2, replace=False))
    shapes = [str(shape) for shape in rng.choice(SHAPES, size=2)]
    relation = str(rng.choice(list(RELATIONS)))
    size = rng.integers(30, 45, size=2)
    along, across = (0, 1) if relation in ("left", "right") else (1, 0)
    centres = np.zeros((2, 2))
    for k, (low, high) in enumerate(((0.25, 0.29), (0.71, 0.75))):  # the nearer one along the axis, then the other
        centres[k, along] = rng.uniform(low, high) * (width, height)[along]
        centres[k, across] = rng.uniform(0.3, 0.7) * (width, height)[across]
    if relation in ("right", "below"):
        centres = centres[::-1]
    for centre, side, shape, colour in zip(centres, size, shapes, (first, second), strict=True):
        _shape(draw, centre, int(side), shape, COLOURS[colour])
    link = f"{relation} of" if along == 0 else relation
    return Scene(image, ("a", first, shapes[0], link, "a", second, shapes[1]))


def _digit(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> tuple[str, ...]:
    digit = str(rng.choice(DIGITS))
    font = ImageFont.load_default(size=int(rng.integers(64, 96)))
    place = (width / 2 + rng.uniform(-8, 8), height / 2 + rng.uniform(-8, 8))
    draw.text(place, digit, fill=COLOURS["black"], font=font, anchor="mm")
    return ("the", "number", digit)


def _shape(draw: ImageDraw.ImageDraw, centre: np.ndarray, side: int, shape: str, colour: tuple[int, int, int]) -> None:
    x, y = float(centre[0]), float(centre[1])
    half = side / 2
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)


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
        Task(
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
