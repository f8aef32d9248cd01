"""A made-up source and settings for the tests of the data core: text, images and clips without any file."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from kimi_jax.config import DataConfig, ModelConfig, SourceConfig, VisionConfig, preset
from kimi_jax.data.example import BadRecord, Example, Image, Text, Video
from kimi_jax.data.tokenizer import Tokenizer, train_tokenizer

WORDS = re.findall(r"\w+", "the river a town of north people in century was large small known for its red blue circle")


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """`size` examples of one kind (text, image or video); record i depends on i only."""

    kind: str
    size: int = 97
    words: tuple[int, int] = (20, 60)
    bad_every: int = 0  # every so many records one is a BadRecord
    crash_at: int = -1  # this record raises an unexpected error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self.size:
            raise IndexError(i)
        if i == self.crash_at:
            raise TypeError("the reader is broken")
        if self.bad_every and i % self.bad_every == self.bad_every - 1:
            raise BadRecord("broken_image", f"{self.kind}-{i}", "made up")
        rng = np.random.default_rng([i, len(self.kind)])
        text = Text(" ".join(rng.choice(WORDS, rng.integers(*self.words))) + f" {i}")
        if self.kind == "text":
            return Example((text,), f"text-{i}")
        if self.kind == "image":
            size = (int(rng.integers(20, 130)), int(rng.integers(20, 130)))
            return Example((Image(make_image(rng, *size)), Text(" question", 0.0), text), f"image-{i}")
        frames = np.stack([make_image(rng, 50, 70) for _ in range(int(rng.integers(1, 9)))])
        return Example((Video(frames, tuple(j / 2 for j in range(len(frames)))), text), f"video-{i}")


def make_image(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def tokenizer(folder: Path) -> Tokenizer:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) + " question image video 00:00:01.500" for _ in range(200)]
    return train_tokenizer(texts, 400, folder / "tokenizer.json")


SOURCES = {
    "wiki": Synthetic("text"),
    "vqa": Synthetic("image", size=53, words=(3, 10), bad_every=17),
    "clips": Synthetic("video", size=31, words=(3, 8)),
}


def settings(tokenizer_path: Path, **changes) -> tuple[DataConfig, ModelConfig]:
    """A small run over SOURCES: 4 groups of 2 rows of 256 tokens."""
    configs = {
        "wiki": SourceConfig(kind="synthetic"),
        "vqa": SourceConfig(kind="synthetic", vision=True, weight=3.0),
        "clips": SourceConfig(kind="synthetic", vision=True),
    }
    data = DataConfig(
        sources=configs, tokenizer=str(tokenizer_path), sequence_length=256, rows_per_pack=2, num_packs=4,
        vision_bins=((64, 4), (160, 3)), vision_ratio=((0.0, 0.2),), buffer_size=16, num_workers=0, prefetch=0,
        max_bad_fraction=0.2, seed=3,
    )  # fmt: skip
    model = dataclasses.replace(preset("demo"), vision=VisionConfig(patch_size=14))
    return dataclasses.replace(data, **changes), model
