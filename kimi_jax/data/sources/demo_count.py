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
    picture = np.tile(ground.astype(np.uint8), (SIDE, SIDE, 1))
    y, x = np.mgrid[:CELL, :CELL]
    for cell in rng.choice(side * side, count, replace=False):
        radius = rng.uniform(3.5, 5.0)
        centre = CELL / 2 - 0.5 + rng.uniform(-1, 1, 2)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
        top, left = CELL * (cell // side), CELL * (cell % side)
        picture[top : top + CELL, left : left + CELL][inside] = rng.integers(0, 140, 3)
    return picture


def counted(name: str, split: str, index: int) -> tuple[np.ndarray, int]:
    """(image, how many discs are in it, 1 to MAX_COUNT) of one item."""
    rng = generator(name, split, index)
    count = int(rng.integers(1, MAX_COUNT + 1))
    return render_blobs(count, rng), count


class Counting:
    """An image, the question, and the number as a digit."""

    def __init__(self, split: str):
        self.split = check_split(split)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Example:
        picture, count = counted("count", self.split, index)
        parts = Image(picture), Text(QUESTION, 0.0), Text(f" {count}")
        return Example(parts, f"count/{self.split}/{index}")
