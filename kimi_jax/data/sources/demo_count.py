"""Rendered images of discs to be counted: made by a rule, so that an answer can be checked and no image comes twice."""

from __future__ import annotations

import numpy as np

from kimi_jax.data.example import Example, Image, Text
from kimi_jax.data.sources.demo_base import check_split, generator

MAX_COUNT = 5  # discs of an image
SIDE, CELL = 56, 14  # pixels of an image, and of the cell that a disc lies in
QUESTION = "\nhow many?"
LENGTH = 1 << 20  # of the source: as good as endless


def render_blobs(count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: `count` discs of random colour and size, each in a cell of its own, on a light ground."""
    side = SIDE // CELL
    ground = rng.integers(200, 256, 3)
    image = np.tile(ground.astype(np.uint8), (SIDE, SIDE, 1))
    y, x = np.mgrid[:CELL, :CELL]
    for cell in rng.choice(side * side, count, replace=False):
        radius = rng.uniform(3.5, 5.0)
        centre = CELL / 2 - 0.5 + rng.uniform(-1, 1, 2)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
        top, left = CELL * (cell // side), CELL * (cell % side)
        image[top : top + CELL, left : left + CELL][inside] = rng.integers(0, 140, 3)
    return image


def draw_count(name: str, split: str, index: int) -> tuple[int, np.random.Generator]:
    """(how many discs item `index` has, 1 to MAX_COUNT, the random numbers of its image)."""
    rng = generator(name, split, index)
    return int(rng.integers(1, MAX_COUNT + 1)), rng


class Counting:
    """An image, the question, and the number as a digit."""

    def __init__(self, split: str):
        self.split = check_split(split)

    def __len__(self) -> int:
        return LENGTH

    def record(self, index: int) -> Example:
        """The example without its image."""
        count, _ = draw_count("count", self.split, index)
        return Example((Text(QUESTION, 0.0), Text(f" {count}")), f"count/{self.split}/{index}")

    def __getitem__(self, index: int) -> Example:
        image = render_blobs(*draw_count("count", self.split, index))
        record = self.record(index)
        return Example((Image(image), *record.parts), record.key)
