"""Long documents of the demo: whole ones, and facts to be found again in long text and long video.

A fact is one number in a text made of Wikipedia leads, "The secret number is 7.", or one coloured frame in a grey video
made of real clips. It stands anywhere; the question stands at the end. Such retrieval is what long-context training is
judged by (Kimi K2.5 report, arXiv 2602.02276, Table 3, has long text and long video in its last stage).

Item i depends on the source, its number of tokens, the split and i only.

n      frames of a video, four a chunk
T      tokens that a document may take, at most: a quarter of them to all in training, nearly all in evaluation
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from kimi_jax.data.example import Example, Text, Video
from kimi_jax.data.sources.demo_base import ANSWER_WEIGHT, QUESTION_WEIGHT, generator, question_parts
from kimi_jax.data.sources.demo_scene import COLOURS
from kimi_jax.data.sources.demo_text import Country, countries, country_sections, python_files, wiki_documents
from kimi_jax.data.sources.demo_video import CLIPS
from kimi_jax.data.sources.demo_video import clip as real_clip

TOKENS = (256, 512, 1024)  # of a row in the demo's stages: configs/pretrain
CHARACTERS_A_TOKEN = 2.4  # of the filler; the demo's vocabulary takes about three, so that documents fit their row
NUMBERS = tuple("0123456789")
FACT = "The secret number is"
CARDS = tuple(COLOURS)
CARD_QUESTION = "which colour was shown?"
FRAME, TOKENS_A_CHUNK = 28, 18  # pixels a side; a chunk is one feature, its time stamp and its marks
END_TOKENS = 40  # of the question and the answer behind a video
LENGTH = 8192


@dataclass(frozen=True)
class LongDocuments:
    """Whole entries of the World Factbook and whole files of the standard library."""

    split: str

    def __len__(self) -> int:
        return len(_entries(self.split)) + len(python_files(self.split))

    def __getitem__(self, i: int) -> Example:
        entries = _entries(self.split)
        if i < len(entries):
            return Example((Text("\n".join(country_sections(entries[i]))),), f"long_documents/{self.split}/{i}")
        name, text = python_files(self.split)[i - len(entries)]
        return Example((Text(f"# {name}\n{text}"),), f"long_documents/{self.split}/{i}")


@functools.cache
def _entries(split: str) -> tuple[Country, ...]:
    return tuple(country for country in countries() if country.validation == (split == "validation"))


# ----------------------------------------------------------------------------------------------------------------- text


def needle_text(split: str, tokens: int, i: int, fact: bool = True) -> tuple[str, str, str]:
    """(text, question, number) of item i; without the fact, the control, the text has nothing in its place."""
    rng = generator(f"needle_text/{tokens}", split, i)
    number = str(rng.choice(NUMBERS))
    share = rng.uniform(0.25, 1.0) if split == "train" else 1.0
    room = int(share * (tokens - 16) * CHARACTERS_A_TOKEN)
    documents = wiki_documents(split)
    text = ""
    while len(text) < room:
        text += documents[int(rng.integers(len(documents)))].replace("\n", ": ", 1) + "\n"
    sentences = text[:room].split(". ")
    if fact:
        sentences.insert(int(rng.integers(len(sentences) + 1)), f"{FACT} {number}")
    return ". ".join(sentences), f"\n{FACT}", number


@dataclass(frozen=True)
class NeedleText:
    """A number that a text says somewhere, asked for at its end."""

    split: str
    tokens: int

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, i: int) -> Example:
        text, question, number = needle_text(self.split, self.tokens, i)
        parts = (Text(text, QUESTION_WEIGHT), Text(question, QUESTION_WEIGHT), Text(f" {number}", ANSWER_WEIGHT))
        return Example(parts, f"needle_text_{self.tokens}/{self.split}/{i}")


# ---------------------------------------------------------------------------------------------------------------- video


@functools.cache
def _grey(name: str) -> np.ndarray:
    """The frames of a real clip, small and without colour: uint8 [frames, FRAME, FRAME, 3]."""
    small = [PILImage.fromarray(frame).convert("L").resize((FRAME, FRAME)) for frame in real_clip(name)]
    return np.repeat(np.stack([np.asarray(frame) for frame in small])[..., None], 3, axis=3)


def needle_video(split: str, tokens: int, i: int, fact: bool = True) -> tuple[Video, str]:
    """(video, colour) of item i; without the fact, the control, the frame before stands in the coloured one's place."""
    rng = generator(f"needle_video/{tokens}", split, i)
    colour = str(rng.choice(CARDS))
    share = rng.uniform(0.25, 1.0) if split == "train" else 1.0
    n = 4 * max(1, int(share * (tokens - END_TOKENS)) // TOKENS_A_CHUNK)
    names = CLIPS[split]
    frames = _grey(names[int(rng.integers(len(names)))])
    kept = [frames[k % len(frames)] for k in int(rng.integers(len(frames))) + np.arange(n)]
    place = int(rng.integers(n))
    if fact:
        shade = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, size=3), 0, 255)
        kept[place] = np.broadcast_to(shade.astype(np.uint8), (FRAME, FRAME, 3)).copy()
    return Video(kept, [0.5 * k for k in range(n)]), colour


@dataclass(frozen=True)
class NeedleVideo:
    """A coloured frame somewhere in a grey video; its colour is asked for at the end."""

    split: str
    tokens: int

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, i: int) -> Example:
        video, colour = needle_video(self.split, self.tokens, i)
        return Example((video, *self._asked(colour)), f"needle_video_{self.tokens}/{self.split}/{i}")

    def record(self, i: int) -> Example:
        """The text of item i."""
        colour = str(generator(f"needle_video/{self.tokens}", self.split, i).choice(CARDS))
        return Example(self._asked(colour), f"needle_video_{self.tokens}/{self.split}/{i}")

    @staticmethod
    def _asked(colour: str) -> tuple[Text, ...]:
        return Text("\n", 0.0), *question_parts(CARD_QUESTION, colour)
