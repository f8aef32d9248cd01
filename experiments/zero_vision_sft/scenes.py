"""Scenes of one to three things in the quadrants of an image, in pixels and in words, and what is asked about them.

"a small red circle at top left, a big blue 4 at bottom right". A thing is a shape or a printed digit. Kinds of
questions that SFT asks about words and never about images: counting, localisation, size comparison, reading. Kinds of
text-vision SFT: colour, shape, presence, what is where. Item i of a split depends on the split and i only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.zero_vision_sft.programs import COLOURS, DIGITS, PLACES, SHAPES, draw_kind
from kimi_jax.data.sources.demo_base import generator

SIDE = 112  # pixels of an image: 16 tokens, four of each quadrant
SIZES = {"small": (15, 19), "big": (34, 40)}  # pixels of a side, from .. below
KINDS = ("count", "where", "size", "read")


@dataclass(frozen=True)
class Thing:
    """One thing of a scene."""

    size: str
    colour: str
    kind: str
    place: str

    @property
    def words(self) -> str:
        """The thing in words."""
        return f"a {self.size} {self.colour} {self.kind} at {self.place}"


Things = tuple[Thing, ...]


@dataclass(frozen=True)
class DescribedScene:
    """Things in the order of PLACES, and how they look: uint8 [SIDE, SIDE, 3]."""

    things: Things
    image: np.ndarray

    @property
    def words(self) -> str:
        """The scene in words."""
        return ", ".join(thing.words for thing in self.things)


@dataclass(frozen=True)
class Asked:
    """A scene and a question about it; program: the call of experiments/zero_vision_sft/programs.py that answers it."""

    scene: DescribedScene
    kind: str
    question: str
    answer: str
    program: str = ""


def draw_things(rng: np.random.Generator) -> Things:
    """Random things, one to three. At most one is a digit."""
    places = sorted(rng.permutation(len(PLACES))[: int(rng.integers(1, 4))])
    digit_at = int(rng.choice(places)) if rng.random() < 0.5 else -1
    return tuple(
        Thing(
            str(rng.choice(list(SIZES))), str(rng.choice(list(COLOURS))),
            str(rng.choice(DIGITS if place == digit_at else SHAPES)), PLACES[place],
        )
        for place in places
    )  # fmt: skip


def scene(rng: np.random.Generator) -> DescribedScene:
    """A random scene."""
    things = draw_things(rng)
    return DescribedScene(things, _draw(things, rng))


def _draw(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = rng.integers(222, 256, size=3)
    half = SIDE // 2
    for thing in things:
        side = int(rng.integers(*SIZES[thing.size]))
        y, x = ((half - side) // 2 + rng.integers(-6, 7, size=2)).tolist()
        top, left = half * (PLACES.index(thing.place) // 2) + y, half * (PLACES.index(thing.place) % 2) + x
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-10, 11, size=3)
        image[top : top + side, left : left + side][draw_kind(thing.kind, side)] = np.clip(colour, 0, 255)
    return image


def asked(name: str, split: str, i: int) -> Asked:
    """Question i of the kinds that SFT never asks about images. The kinds take turns, and so do the counts."""
    rng = generator(f"zero_vision_sft/{name}", split, i)
    kind = KINDS[i % len(KINDS)]
    while True:
        things = draw_things(rng)
        found = _question(things, kind, rng)
        if found and (kind != "count" or found[1] == str(i // len(KINDS) % 4)):
            return Asked(DescribedScene(things, _draw(things, rng)), kind, *found)


def _question(things: Things, kind: str, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """(question, answer, program); None if there is nothing to ask of this kind."""
    colours = [thing.colour for thing in things]
    unique = [thing for thing in things if colours.count(thing.colour) == 1]
    if kind == "count":
        colour = str(rng.choice(colours if rng.random() < 0.75 else list(COLOURS)))
        return f"how many {colour} things are there?", str(colours.count(colour)), f'count(image_1, "{colour}")'
    if kind == "where" and unique:
        thing = unique[int(rng.integers(len(unique)))]
        return f"where is the {thing.colour} thing?", thing.place, f'where(image_1, "{thing.colour}")'
    if kind == "size" and len({thing.size for thing in unique}) == 2:
        big, small = (next(t for t in unique if t.size == size) for size in ("big", "small"))
        one, other = [t.colour for t in ((big, small) if rng.random() < 0.5 else (small, big))]
        question = f"which is bigger, the {one} thing or the {other} thing?"
        return question, big.colour, f'bigger(image_1, "{one}", "{other}")'
    digits = [thing.kind for thing in things if thing.kind in DIGITS]
    if kind == "read" and digits:
        return "which number is there?", digits[0], "read(image_1)"
    return None


VISUAL = (
    ("colour", "which colour is the {kind}?"), ("kind", "what is {colour}?"), ("thing", "what is at {place}?"),
    ("present", "is there a {kind}?"), ("colour", "tell me the colour of the {kind}."),
    ("present", "can you see a {kind}?"), ("kind", "name the {colour} shape."),
    ("colour_at", "which colour is at {place}?"),
)  # fmt: skip


def asked_visually(split: str, i: int, templates: int) -> Asked:
    """Question i of text-vision SFT, one of the first `templates` of VISUAL."""
    rng = generator(f"zero_vision_sft/visual/{templates}", split, i)
    kind, template = VISUAL[i % templates]
    while True:
        things = draw_things(rng)
        thing = things[int(rng.integers(len(things)))]
        kinds, colours = ([getattr(t, name) for t in things] for name in ("kind", "colour"))
        if kinds.count(thing.kind) == 1 and colours.count(thing.colour) == 1:
            break
    wanted = str(rng.choice(SHAPES)) if kind == "present" else thing.kind
    question = template.format(kind=wanted, colour=thing.colour, place=thing.place)
    answer = {
        "colour": thing.colour, "colour_at": thing.colour, "kind": thing.kind, "thing": f"{thing.colour} {thing.kind}",
        "present": "yes" if wanted in kinds else "no",
    }[kind]  # fmt: skip
    return Asked(DescribedScene(things, _draw(things, rng)), kind, question, answer)


def story(i: int) -> str:
    """A scene in words, once more in words, and what is true of it: text of pre-training that shows no image."""
    rng = generator("zero_vision_sft/story", "train", i)
    things = draw_things(rng)
    facts = [_fact(str(kind), *found[:2]) for kind in rng.permutation(KINDS) if (found := _question(things, kind, rng))]
    words = ", ".join(thing.words for thing in things)
    return f"scene: {words}. again: {words}. {' '.join(facts)}"


def _fact(kind: str, question: str, answer: str) -> str:
    """A question and its answer as a statement."""
    words = question.strip("?").split()
    if kind == "count":
        return f"there are {answer} {words[2]} things."
    if kind == "where":
        return f"the {words[3]} thing is at {answer}."
    return f"the number is {answer}." if kind == "read" else f"{' '.join(words[3:])}: the {answer} thing is bigger."
