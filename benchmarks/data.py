"""How fast the data pipeline makes batches, how full they are, and how fast a training step eats them.

Run:    python -m benchmarks.data [--batches=60] [--repeats=5]       (needs the extra [demo])
Goal:   token fill of 97 %; more than the step eats.

One process makes batches without workers, so its CPU time is that of one core. Two streams:
  demo      configs/demo.py: drawn shapes, digits and video clips beside Wikipedia, 5 to 12 % of vision tokens
  photos    that of benchmarks.vision_cost: JPEG crops of a photograph of mixed resolution, 10 % of vision tokens
The appetite is what the training step of the same settings takes, on all cores, with the batches at hand.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks import vision_cost
from benchmarks.train_step import model_config, seconds, train_config
from benchmarks.vision_cost import Steps
from configs import demo
from kimi_jax.config import TrainConfig, freeze
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.vocabulary import tokenizer_for

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_integer("batches", 60, "Batches of each stream.", lower_bound=10)
    flags.DEFINE_integer("repeats", 5, "Steps of each model.", lower_bound=1)


def demo_stream() -> tuple[TrainConfig, BatchStream]:
    """Settings and stream of the demo; the vocabulary is trained first."""
    config = freeze(demo.get_config())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_for(config, os.path.join(folder, "tokenizer.json"), config.model.vocab_size)
    data = dataclasses.replace(config.data, num_workers=0, prefetch=0)
    return config, BatchStream(data, config.model, config.steps, tokenizer=tokenizer)


def photo_stream() -> tuple[TrainConfig, BatchStream]:
    """Settings and stream of benchmarks.vision_cost."""
    model = vision_cost.with_vision(model_config("float32"))
    config = dataclasses.replace(train_config(model, 1, 1), data=vision_cost.DATA)
    return config, vision_cost.open_stream(model)


def produce(stream: BatchStream) -> tuple[Any, float, int, int]:
    """The last of some batches, the CPU seconds they took, their tokens and patches.

    The first three, which open files, are left out.
    """
    for _ in range(3):
        next(stream)
    tokens = patches = 0
    cpu = 0.0
    for _ in range(FLAGS.batches):
        start = time.process_time()
        batch = next(stream)
        cpu += time.process_time() - start
        tokens += int((batch.segment_ids > 0).sum())
        patches += sum(int((bins.segment_ids > 0).sum()) for bins in batch.vision)
    return batch, cpu, tokens, patches


def main(argv: list[str]) -> None:
    """Prints one table."""
    del argv
    header = f"{'':7} {'tokens/s/core':>14} {'patches/s/core':>15} {'token fill':>11} {'patch fill':>16}"
    print(f"{header} {'vision':>7} {'step s':>7} {'eats tokens/s':>14} {'cores for it':>13}")
    for name, opened in (("demo", demo_stream), ("photos", photo_stream)):
        config, stream = opened()
        with stream:
            batch, cpu, tokens, patches = produce(stream)
            report = stream.report()
        steps = Steps(config, batch)
        steps.step()
        step_s = statistics.median(seconds(steps.step) for _ in range(FLAGS.repeats))
        eaten = tokens / FLAGS.batches / step_s
        fills = ", ".join(f"{fill:.0%}" for fill in report["patch_fill"])
        print(
            f"{name:7} {tokens / cpu:14,.0f} {patches / cpu:15,.0f} {report['token_fill']:11.2%} {fills:>16} "
            f"{report['ratio']:7.2%} {step_s:7.2f} {eaten:14,.0f} {eaten * cpu / tokens:13.2f}",
            flush=True,
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)
