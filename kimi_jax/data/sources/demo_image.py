"""Images of the demo at many sizes and shapes: easy-VQA scenes and scanned handwritten digits.

All easy-VQA images are 64 x 64, and the released preprocessing never enlarges (docs/released_model.md section 5): one
size would never exercise native resolution. Training therefore crops, pads and scales them in ways that keep every
answer true; evaluation uses them as they are. A source of its own draws the scenes that fill the demo's largest bin
(256 patches).

h, w  pixels;  one patch is 14 x 14, one token 28 x 28
"""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from kimi_jax.data.example import Example, Image, Text
from kimi_jax.data.sources.demo_base import generator, held_out, package_file, question_parts

TOKEN = 28  # pixels a side of one token
MAX_TOKENS = 16  # of an ordinary image: 64 patches
LIMIT_SHAPES = ((224, 224), (112, 448), (448, 112))  # h, w of exactly 256 patches
DRAWS = 8  # times that each image appears in one pass, each time drawn differently

# ------------------------------------------------------------------------------------------------------------- easy-VQA

VQA_ANSWERS = ("circle", "rectangle", "triangle", "black", "gray", "red", "blue", "yellow", "green", "teal", "brown")
VQA_SHAPES = VQA_ANSWERS[:3]
VQA_COLOURS = VQA_ANSWERS[3:]


@dataclass(frozen=True)
class VQARecord:
    """One image of easy-VQA: its number and its (question, answer) pairs."""

    image: int
    questions: tuple[tuple[str, str], ...]


@functools.cache
def vqa_records(split: str) -> tuple[VQARecord, ...]:
    """All images of the split that have questions; "validation" is the data set's own test split."""
    folder = "train" if split == "train" else "test"
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads(
        package_file("easy_vqa", "easy-vqa", f"data/{folder}/questions.json").read_text()
    ):
        questions.setdefault(image, []).append((question, answer))
    return tuple(VQARecord(k, tuple(v)) for k, v in sorted(questions.items()))


@functools.lru_cache(maxsize=8192)
def vqa_image(split: str, number: int) -> np.ndarray:
    """One scene, uint8 [64, 64, 3]."""
    folder = "train" if split == "train" else "test"
    with PILImage.open(package_file("easy_vqa", "easy-vqa", f"data/{folder}/images/{number}.png")) as image:
        pixels = np.asarray(image.convert("RGB"))
    pixels.setflags(write=False)
    return pixels


def tokens_of(h: int, w: int) -> int:
    """Tokens of an image that is padded to whole tokens."""
    return -(-h // TOKEN) * -(-w // TOKEN)


def resize(pixels: np.ndarray, h: int, w: int) -> np.ndarray:
    """Bicubic resize of uint8 [.., .., 3] to [h, w, 3]."""
    return np.asarray(PILImage.fromarray(pixels).resize((w, h), PILImage.Resampling.BICUBIC))


def _background(pixels: np.ndarray) -> np.ndarray:
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return colours[counts.argmax()]


def _crop(pixels: np.ndarray, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cuts empty margins, never the shape: answers stay true."""
    drawn = np.abs(pixels.astype(int) - colour).max(axis=2) > 8
    window = []
    for used in (drawn.any(axis=1), drawn.any(axis=0)):
        inside = np.flatnonzero(used)
        low, high = (inside[0], inside[-1] + 1) if inside.size else (24, 40)
        first = min(int(rng.integers(0, low + 1)), len(used) - 30)  # keep 30 pixels at least
        window.append(slice(first, max(int(rng.integers(high, len(used) + 1)), first + 30)))
    return pixels[window[0], window[1]]


def _pad(pixels: np.ndarray, colour: np.ndarray, h: int, w: int, rng: np.random.Generator) -> np.ndarray:
    """The scene somewhere on a larger canvas of its own background colour."""
    canvas = np.tile(colour.astype(np.uint8), (h, w, 1))
    top, left = int(rng.integers(0, h - pixels.shape[0] + 1)), int(rng.integers(0, w - pixels.shape[1] + 1))
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene as it is or at a random size, crop and canvas: uint8 [h, w, 3], 1 to MAX_TOKENS tokens."""
    if rng.random() < 0.5:
        return pixels
    colour = _background(pixels)
    if rng.random() < 0.5:
        pixels = _crop(pixels, colour, rng)
    if rng.random() < 0.5:
        h, w = pixels.shape[0] + int(rng.integers(0, 41)), pixels.shape[1] + int(rng.integers(0, 41))
        pixels = _pad(pixels, colour, h, w, rng)
    scale = max(float(np.exp(rng.uniform(np.log(0.6), np.log(1.8)))), TOKEN / min(pixels.shape[:2]))
    h, w = (round(side * scale) for side in pixels.shape[:2])
    while tokens_of(h, w) > MAX_TOKENS:
        h, w = int(h * 0.9), int(w * 0.9)
    return resize(pixels, h, w)


def fill_largest(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene on a canvas of exactly 256 patches, square, wide or tall: uint8 [h, w, 3]."""
    h, w = LIMIT_SHAPES[rng.integers(len(LIMIT_SHAPES))]
    side = int(min(h, w) * rng.uniform(0.75, 1.0))
    return _pad(resize(pixels, side, side), _background(pixels), h, w, rng)


def choose_questions(record: VQARecord, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two or three questions whose earlier answers give away as little as possible of the later ones."""
    order = [record.questions[k] for k in rng.permutation(len(record.questions))]
    shapes = [q for q in order if q[1] in VQA_SHAPES]
    colours = [q for q in order if q[1] in VQA_COLOURS]
    closed = [q for q in order if q[1] in ("yes", "no")]
    # "what is the red shape?" tells the colour, "what color is the circle?" the shape: such a question stands second
    pairs = [pair for s in shapes for c in colours for pair in ((s, c), (c, s)) if pair[1][1] not in pair[0][0]]
    open_questions = list(pairs[rng.integers(len(pairs))]) if pairs else (shapes + colours)[:1]
    closed = closed[: int(rng.integers(2, 4)) - len(open_questions)]
    return open_questions + closed if rng.random() < 0.65 else closed + open_questions


@dataclass(frozen=True)
class EasyVQA:
    """Documents of one image and its questions; `large` draws every training image at the limit of 256 patches."""

    split: str
    large: bool = False

    def __len__(self) -> int:
        return len(vqa_records(self.split)) * (DRAWS if self.split == "train" else 1)

    def __getitem__(self, i: int) -> Example:
        record = self.record(i)
        pixels = vqa_image(self.split, self.vqa(i).image)
        if self.split == "train":
            draw = fill_largest if self.large else augment
            pixels = draw(pixels, generator("easyvqa/pixels", self.split, i))
        return Example((Image(pixels), *record.parts), record.key)

    def record(self, i: int) -> Example:
        """The text of item i."""
        vqa = self.vqa(i)
        asked = choose_questions(vqa, generator("easyvqa", self.split, i))
        parts = [part for pair in asked for part in question_parts(*pair)]
        return Example((Text("\n", 0.0), *parts), f"easyvqa/{self.split}/{vqa.image}/{i}")

    def vqa(self, i: int) -> VQARecord:
        """The image of item i, with all of its questions."""
        records = vqa_records(self.split)
        return records[i % len(records)]


# --------------------------------------------------------------------------------------------------------------- digits

NAME_QUESTION = "what digit is this?"
READ_QUESTION = "what digits are written?"
COMPARE_QUESTION = "which digit is larger, left or right?"
EVAL_CELLS = (28, 35, 42)


@functools.cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scanned handwritten digits of the UCI set inside scikit-learn: uint8 [n, 8, 8] (ink is bright), int [n]."""
    with gzip.open(package_file("sklearn", "scikit-learn", "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    chosen = np.array([held_out(f"digits/{k}", 0.2) for k in range(len(table))]) == (split == "validation")
    pixels = np.round(table[chosen, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, table[chosen, -1].astype(int)


def draw_digits(glyphs: np.ndarray, cell: int, gap: int, dark_ink: bool) -> np.ndarray:
    """Digits [n, 8, 8] in a row, each `cell` pixels a side, `gap` apart: uint8 [cell, n*cell + (n-1)*gap, 3]."""
    n = len(glyphs)
    strip = np.zeros((cell, n * cell + (n - 1) * gap), np.uint8)
    for k, glyph in enumerate(glyphs):
        big = PILImage.fromarray(glyph).resize((cell, cell), PILImage.Resampling.BICUBIC)
        strip[:, k * (cell + gap) : k * (cell + gap) + cell] = np.asarray(big)
    return np.repeat((255 - strip if dark_ink else strip)[..., None], 3, axis=2)


def eval_digits(glyphs: np.ndarray, i: int) -> np.ndarray:
    """The fixed rendering of evaluation: the size goes round EVAL_CELLS, dark and bright ink alternate."""
    return draw_digits(glyphs, EVAL_CELLS[i % len(EVAL_CELLS)], gap=2, dark_ink=i % 2 == 0)


def spell(labels: np.ndarray) -> str:
    """Digits apart, as the model writes them: "4 0 7"."""
    return " ".join(str(label) for label in labels)


@dataclass(frozen=True)
class Digits:
    """Documents of one to three images: one digit to name, a string of two to four to read, two to compare."""

    split: str

    def __len__(self) -> int:
        return len(digits(self.split)[1]) * (DRAWS if self.split == "train" else 1)

    def _image(self, glyphs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        dark_ink = bool(rng.random() < 0.5)
        strip = draw_digits(glyphs, int(rng.integers(28, 43)), int(rng.integers(0, 9)), dark_ink)
        h, w = (side + int(rng.integers(0, 15)) for side in strip.shape[:2])
        return _pad(strip, np.array([255 if dark_ink else 0] * 3), h, w, rng)

    def _asked(self, i: int) -> list[tuple[np.ndarray, list[tuple[str, str]]]]:
        """For each image of item i: numbers of the digits on it, and (question, answer) pairs."""
        rng = generator("digits", self.split, i)
        labels = digits(self.split)[1]
        kind = ("name", "read", "read", "compare")[i % 4]
        images = []
        for _ in range(int(rng.integers(1, 4)) if kind == "name" else 1):
            chosen = rng.integers(len(labels), size={"name": 1, "compare": 2}.get(kind, int(rng.integers(2, 5))))
            while kind == "compare" and labels[chosen[0]] == labels[chosen[1]]:
                chosen = rng.integers(len(labels), size=2)
            asked = [(NAME_QUESTION if kind == "name" else READ_QUESTION, spell(labels[chosen]))]
            if kind == "compare":  # mostly first: later the answer could be read off the text
                side = "left" if labels[chosen[0]] > labels[chosen[1]] else "right"
                asked.insert(int(rng.random() < 0.25), (COMPARE_QUESTION, side))
            images.append((chosen, asked))
        return images

    def _example(self, i: int, with_images: bool) -> Example:
        rng = generator("digits/pixels", self.split, i)
        glyphs = digits(self.split)[0]
        parts: list[Text | Image] = []
        for chosen, asked in self._asked(i):
            if with_images:
                parts.append(Image(self._image(glyphs[chosen], rng)))
            parts += [Text("\n", 0.0), *(part for pair in asked for part in question_parts(*pair))]
        return Example(tuple(parts), f"digits/{self.split}/{i}")

    def __getitem__(self, i: int) -> Example:
        return self._example(i, with_images=True)

    def record(self, i: int) -> Example:
        """The text of item i."""
        return self._example(i, with_images=False)
