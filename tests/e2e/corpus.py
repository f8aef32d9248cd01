"""A small real-ish corpus on disk, a tokenizer trained on it and a config file: what a whole run needs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kimi_jax.data.tokenizer import train_tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "white": (240, 240, 240)}
THINGS = ("house", "river", "garden", "bridge", "harbour", "market")


def write_corpus(folder: Path) -> None:
    """text.jsonl, vision.jsonl with PNG files of several shapes, tokenizer.json."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    texts = []
    for i in range(200):
        colour, thing, other = names[rng.integers(4)], THINGS[rng.integers(6)], THINGS[rng.integers(6)]
        texts.append(f"The {colour} {thing} stands beside the {other} number {i}.")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    lines = []
    for i in range(24):
        name, size = names[i % 4], (28 * (1 + i % 2), 28 * (1 + i % 3))
        pixels = np.clip(np.asarray(COLOURS[name]) + rng.integers(-9, 9, (*size[::-1], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        parts = [{"text": "Which colour? ", "loss": 0}, {"image": f"{i}.png"}, {"text": f" {name}"}]
        lines.append(json.dumps({"parts": parts}) + "\n")
    (folder / "vision.jsonl").write_text("".join(lines))
    train_tokenizer([*texts, "Which colour? red green blue white"], 320, folder / "tokenizer.json")


def write_config(folder: Path, **changes) -> Path:
    """config.py with `get_config()`: the tiny model of tests.train.tiny on that corpus; `changes` of TrainConfig."""
    path = folder / "config.py"
    path.write_text(f"""
import dataclasses
from kimi_jax import config as c
from tests.train.tiny import CONFIG, MODEL

def get_config():
    sources = {{
        "text": c.SourceConfig(kind="jsonl", path={str(folder / "text.jsonl")!r}),
        "vision": c.SourceConfig(kind="jsonl", path={str(folder / "vision.jsonl")!r}, vision=True),
    }}
    data = dataclasses.replace(
        CONFIG.data, sources=sources, tokenizer={str(folder / "tokenizer.json")!r}, num_packs=2, rows_per_pack=2,
        sequence_length=64, vision_bins=((16, 2), (64, 1)), vision_ratio=((0.0, 0.1),), buffer_size=16,
    )
    model = dataclasses.replace(MODEL, vocab_size=320, max_position_embeddings=64)
    return c.thaw(dataclasses.replace(CONFIG, data=data, model=model, **{changes!r}))
""")
    return path
