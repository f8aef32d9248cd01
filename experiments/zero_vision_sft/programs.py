"""Image operations as programs over arrays, for the `ipython` tool: the text of this file stands before every call.

An image is uint8 [h, w, 3]: things of one colour on a light ground, at most one in each quadrant.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {"red": (214, 48, 38), "green": (38, 150, 62), "blue": (40, 74, 204), "black": (24, 24, 24)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle")
DIGITS = tuple("123456")
DISTANCE = 60  # in colour, within which a pixel counts as of it
FEWEST = 24  # pixels of a thing


def draw_kind(kind: str, side: int) -> np.ndarray:
    """What a thing of so many pixels a side covers, bool [side, side]: a shape, or a printed digit."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif kind == "square":
        draw.rectangle((0, 0, side, side), fill=255)
    elif kind == "triangle":
        draw.polygon([(side // 2, 0), (0, side - 1), (side - 1, side - 1)], fill=255)
    else:
        draw.text((side / 2, side / 2), kind, fill=255, font=ImageFont.load_default(size=1.3 * side), anchor="mm")
    return np.asarray(image) > 127


def quadrants(image: np.ndarray, colour: str) -> dict[str, np.ndarray]:
    """Where there is a thing of a colour: place -> the pixels of that quadrant that have it, bool [h/2, w/2]."""
    near = np.abs(image.astype(int) - COLOURS[colour]).max(axis=2) < DISTANCE
    h, w = near.shape
    parts = [near[y : y + h // 2, x : x + w // 2] for y in (0, h // 2) for x in (0, w // 2)]
    return {place: part for place, part in zip(PLACES, parts, strict=True) if part.sum() >= FEWEST}


def count(image: np.ndarray, colour: str) -> int:
    """How many things have a colour."""
    return len(quadrants(image, colour))


def where(image: np.ndarray, colour: str) -> str:
    """The place of the thing that has a colour."""
    return next(iter(quadrants(image, colour)), "nowhere")


def trimmed(pixels: np.ndarray) -> np.ndarray:
    """The smallest box that holds all that is set."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def bigger(image: np.ndarray, one: str, other: str) -> str:
    """Which of two colours the bigger thing has, by the longer side of its box."""
    sides = {c: max((max(trimmed(p).shape) for p in quadrants(image, c).values()), default=0) for c in (one, other)}
    return max(sides, key=lambda colour: sides[colour])


def read(image: np.ndarray) -> str:
    """The printed digit: of all things the one that is likest to a digit and no shape."""

    def small(pixels):
        return np.asarray(Image.fromarray(pixels).resize((16, 16))).astype(bool)

    def alike(a, b):
        return (a & b).sum() / (a | b).sum()

    things = [small(trimmed(part)) for colour in COLOURS for part in quadrants(image, colour).values()]
    models = {kind: small(trimmed(draw_kind(kind, 36))) for kind in DIGITS + SHAPES}
    best = [max(models, key=lambda kind: alike(models[kind], thing)) for thing in things]
    return next((kind for kind in best if kind in DIGITS), "none")
