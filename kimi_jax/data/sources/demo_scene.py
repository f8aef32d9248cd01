"""Rendered scenes and clips with captions: what the ViT stage learns from, and what asks where something stands.

Five scenes in six hold two coloured shapes of which one stands left of, right of, above or below the other: "a red
circle above a blue square". One in six is a printed digit: "the number 7". Images have 112 to 168 pixels a side, 16 to
36 tokens. A clip has one coloured shape that moves over four to eight frames: "a red circle moves left". The first
frame shows it anywhere, whatever the direction; from there it may leave the image.

Item i of a split depends on the split and i only. Licence of the data: generated.

h, w  pixels of a frame
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from kimi_jax.data.example import Example, Image, Text, Video
from kimi_jax.data.sources.demo_base import generator

COLOURS = {
    "red": (214, 48, 38), "green": (38, 150, 62), "blue": (40, 74, 204), "yellow": (238, 202, 34),
    "purple": (142, 60, 168), "black": (24, 24, 24),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left": "right", "right": "left", "above": "below", "below": "above"}
SIDES = (112, 140, 168)
DIGITS = tuple("0123456789")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CLIP_SIDES = (56, 84)
LENGTH = 16384  # scenes of the source; 1,024 are held out


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
        draw_shape(draw, centre, int(side), shape, COLOURS[colour])
    link = f"{relation} of" if along == 0 else relation
    return Scene(image, ("a", first, shapes[0], link, "a", second, shapes[1]))


def _digit(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> tuple[str, ...]:
    digit = str(rng.choice(DIGITS))
    font = ImageFont.load_default(size=int(rng.integers(64, 96)))
    place = (width / 2 + rng.uniform(-8, 8), height / 2 + rng.uniform(-8, 8))
    draw.text(place, digit, fill=COLOURS["black"], font=font, anchor="mm")
    return ("the", "number", digit)


def draw_shape(
    draw: ImageDraw.ImageDraw, centre: np.ndarray, side: int, shape: str, colour: tuple[int, int, int]
) -> None:
    """Draws a shape of so many pixels a side around a centre (x, y)."""
    x, y = float(centre[0]), float(centre[1])
    half = side / 2
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)


def clip(split: str, i: int) -> tuple[list[np.ndarray], str]:
    """Frames uint8 [h, w, 3] of clip i, four to eight, and its caption."""
    rng = generator("demo/scene_clips", split, i)
    w, h = (int(side) for side in rng.choice(CLIP_SIDES, size=2))
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    direction = str(rng.choice(list(DIRECTIONS)))
    side, ground = int(rng.integers(18, 27)), tuple(int(v) for v in rng.integers(222, 256, size=3))
    centre = rng.uniform(side / 2, np.array([w, h]) - side / 2)
    step = rng.uniform(6, 11) * np.array(DIRECTIONS[direction])
    frames = []
    for _ in range(int(rng.integers(4, 9))):
        frame = PILImage.new("RGB", (w, h), ground)
        draw_shape(ImageDraw.Draw(frame), centre, side, shape, COLOURS[colour])
        frames.append(np.asarray(frame))
        centre = centre + step
    return frames, f"a {colour} {shape} moves {direction}"


@dataclass(frozen=True)
class Scenes:
    """Images and their captions. The caption alone is learned."""

    split: str

    def __len__(self) -> int:
        return LENGTH if self.split == "train" else LENGTH // 16

    def __getitem__(self, i: int) -> Example:
        shown = scene(self.split, i)
        return Example((Image(shown.image), *_caption(shown.caption)), f"scenes/{self.split}/{i}")

    def record(self, i: int) -> Example:
        """The text of item i."""
        return Example(_caption(scene(self.split, i).caption), f"scenes/{self.split}/{i}")


@dataclass(frozen=True)
class SceneClips:
    """Clips and their captions. The caption alone is learned."""

    split: str

    def __len__(self) -> int:
        return LENGTH if self.split == "train" else LENGTH // 16

    def __getitem__(self, i: int) -> Example:
        frames, caption = clip(self.split, i)
        seconds = [0.5 * k for k in range(len(frames))]
        return Example((Video(frames, seconds), *_caption(caption)), f"scene_clips/{self.split}/{i}")

    def record(self, i: int) -> Example:
        """The text of item i."""
        return Example(_caption(clip(self.split, i)[1]), f"scene_clips/{self.split}/{i}")


def _caption(words: str) -> tuple[Text, Text]:
    return Text("\n", 0.0), Text(words)
