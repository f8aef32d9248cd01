"""What a tenth of vision tokens adds to a training step, and how much of the vision work is padding.

Run:    python -m benchmarks.vision_cost [--repeats=9]       (needs the extra [demo])
Goal:   the multimodal step takes at most 1.10 times the text-only step plus the vision FLOPs it contains (the paper's
        90 %); padded over real vision FLOPs at most 1.25 on images of mixed resolution.

The language model of benchmarks.train_step with a small MoonViT, and the real stream: Wikipedia leads mixed with crops
of a photograph whose area is spread evenly on a logarithmic scale between 56 x 56 and 308 x 308 pixels, sides 1:2 to
2:1, stored as JPEG. The text-only step has the same rows of tokens in the model without vision, so what differs is the
vision tower, the projector and the placing of features. "Allowed" is the text-only step times (text + vision FLOPs) /
text FLOPs: the real vision FLOPs at the speed that the text-only step reaches.
Padded FLOPs are those of full bins (every patch of a bin looks at the whole bin), real ones those of the images.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import statistics
import tempfile
from typing import Any

import jax
import numpy as np
import PIL.Image
from absl import app, flags
from sklearn.datasets import load_sample_image

from benchmarks.train_step import model_config, seconds, train_config
from kimi_jax import sharding
from kimi_jax.config import DataConfig, ModelConfig, SourceConfig, TrainConfig, VisionConfig
from kimi_jax.data.example import Example, Image, Text
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.sources import open_source
from kimi_jax.data.tokenizer import Tokenizer, train_tokenizer
from kimi_jax.train import flops
from kimi_jax.train.step import gradients, make_train_step

FLAGS = flags.FLAGS
SIDES = 56, 308  # of a square image of the least and of the largest area
DATA = DataConfig(
    sources={"wiki": SourceConfig(path="wiki"), "photos": SourceConfig(vision=True)},
    sequence_length=512,
    rows_per_pack=16,
    num_packs=1,
    vision_bins=((128, 3), (256, 3), (496, 5)),
    vision_ratio=((0.0, 0.1),),
    buffer_size=128,
    num_workers=0,
    prefetch=0,
)


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_integer("repeats", 9, "Turns of each side.", lower_bound=1)
    flags.DEFINE_integer("batches", 100, "Batches whose padding is counted.", lower_bound=1)


def with_vision(model: ModelConfig) -> ModelConfig:
    """The same model with a tower of 4 layers of width 192, and the ids of a tokenizer trained here."""
    vision = VisionConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, init_pos_emb_height=32,
        init_pos_emb_width=32,
    )  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "media_placeholder_token_id": 9}
    return dataclasses.replace(model, vision=vision, **ids)


class Photos:
    """A source of crops of one photograph with a short text behind each."""

    def __init__(self, count: int = 512):
        rng = np.random.default_rng(0)
        photo = PIL.Image.fromarray(load_sample_image("china.jpg"))
        self._files = [self._crop(photo, rng) for _ in range(count)]

    @staticmethod
    def _crop(photo: PIL.Image.Image, rng: np.random.Generator) -> bytes:
        side = np.exp(rng.uniform(*np.log(SIDES)))
        aspect = np.exp(rng.uniform(-0.5, 0.5) * np.log(2))
        width, height = round(side * aspect), round(side / aspect)
        x, y = rng.integers(photo.width - width), rng.integers(photo.height - height)
        file = io.BytesIO()
        photo.crop((x, y, x + width, y + height)).save(file, "JPEG", quality=90)
        return file.getvalue()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        image = PIL.Image.open(io.BytesIO(self._files[index]))
        return Example((Image(image), Text(f" A photograph of a temple, part {index}.")), f"photo/{index}")


def open_stream(model: ModelConfig, data: DataConfig = DATA) -> BatchStream:
    """The stream of packed batches; its vocabulary is trained on the texts first."""
    wiki = open_source(data.sources["wiki"])
    with tempfile.TemporaryDirectory() as folder:
        texts = (wiki[i].parts[0].text for i in range(0, len(wiki), 4))
        tokenizer: Tokenizer = train_tokenizer(texts, 4096, os.path.join(folder, "tokenizer.json"))
    return BatchStream(data, model, 1000, sources={"wiki": wiki, "photos": Photos()}, tokenizer=tokenizer)


def vision_flops(model: ModelConfig, counts: dict[str, Any]) -> float:
    """Of a training step, without those of the tokens."""
    return flops.train_flops(model, counts | {"tokens": 0, "token_pairs": 0})


def padded_counts(data: DataConfig) -> dict[str, int]:
    """Of a batch whose bins are full, each of one image."""
    patches = sum(p * v for p, v in data.vision_bins) * data.num_packs
    pairs = sum(p * p * v for p, v in data.vision_bins) * data.num_packs
    return {"patches": patches, "patch_pairs": pairs, "features": patches // 4}


def count_padding(stream: BatchStream, model: ModelConfig) -> Any:
    """Prints the fill of many batches and the padded over the real vision FLOPs; returns the last batch."""
    real = 0.0
    for batch in (next(stream) for _ in range(FLAGS.batches)):
        real += vision_flops(model, flops.batch_counts(batch))
    report = stream.report()
    padded = FLAGS.batches * vision_flops(model, padded_counts(DATA))
    fill = ", ".join(f"{p}: {f:.1%}" for (p, _), f in zip(DATA.vision_bins, report["patch_fill"], strict=True))
    print(f"{FLAGS.batches} batches: vision tokens {report['ratio']:.2%}, token fill {report['token_fill']:.2%}")
    print(f"bins of {fill}; padded over real vision FLOPs {padded / real:.3f}")
    return batch


class Steps:
    """Gradients and the whole step of one model on one batch."""

    def __init__(self, config: TrainConfig, batch: Any):
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        init, self._train_step = make_train_step(config, mesh)
        self._state, self._params = init(), init().params
        self._batch = sharding.put_batch(batch, mesh)
        self._gradients = jax.jit(functools.partial(gradients, config=config))

    def gradients(self) -> None:
        """Forward and backward."""
        jax.block_until_ready(self._gradients(self._params, self._batch))

    def step(self) -> None:
        """With MuonClip and all the rest."""
        self._state, _ = jax.block_until_ready(self._train_step(self._state, self._batch))


def main(argv: list[str]) -> None:
    """Prints the padding, then one table."""
    del argv
    text_model = dataclasses.replace(with_vision(model_config("float32")), vision=None)
    model = with_vision(text_model)
    with open_stream(model) as stream:
        batch = count_padding(stream, model)
    counts = flops.batch_counts(batch)
    text, vision = flops.train_flops(text_model, counts), vision_flops(model, counts)
    print(f"a step: {text / 1e9:.0f} GFLOP of text, {vision / 1e9:.0f} of vision ({vision / text:.1%})")
    config = dataclasses.replace(train_config(model, 1, 1), data=DATA)
    both = Steps(config, batch)
    alone = Steps(dataclasses.replace(config, model=text_model), dataclasses.replace(batch, vision=()))
    runs = (alone.gradients, both.gradients, alone.step, both.step)
    for run in runs:
        run()
    turns = np.array([[seconds(run) for run in runs] for _ in range(FLAGS.repeats)])
    print(f"{'':12} {'text-only s':>12} {'multimodal s':>13} {'allowed s':>10} {'over text + vision FLOPs':>25}")
    for name, times in (("gradients", turns[:, :2]), ("whole step", turns[:, 2:])):
        alone_s, both_s = np.median(times, axis=0)
        due = 1 + vision / text
        ratio = statistics.median(times[:, 1] / (times[:, 0] * due))
        print(f"{name:12} {alone_s:12.2f} {both_s:13.2f} {1.1 * alone_s * due:10.2f} {ratio:25.3f}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
