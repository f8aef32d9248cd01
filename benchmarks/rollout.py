"""Rollouts of RL: tokens a second of the engine against its own compiled programs, an earlier engine, transformers.

Run:    python -m benchmarks.rollout [--before=FOLDER] [--torch=PYTHON] [--repeats=5] [--new=16 --new=64]
Goal:   90 % of the compiled programs alone, 3 times the engine that reads one prompt and decodes one token a call,
        3 times transformers.

64 prompts, 8 answers to each, 16 and 64 new tokens, with and without an image; the demo's model with random weights in
float32. A round has new prompts. `bare` is what no engine can beat: prompts in full calls, then one loop over all slots
and all tokens, on arrays that are ready, eight times. --before: a checkout of this project whose engine does the same
work, for instance `git worktree add /tmp/before 8fb07d9`. --torch: an interpreter with torch and transformers, whose
`generate` gets the text cases. Sides take turns, and a ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.peer import Peer, Step, seconds
from benchmarks.rollout_side import TEXT, demo_model, length_of, prompts_of
from kimi_jax.hf import stream
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.forward import Chunk
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.infer.sampler import Settings
from kimi_jax.infer.step import Ends

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_integer("prompts", 64, "Prompts of a round.", lower_bound=1)
flags.DEFINE_integer("answers", 8, "Answers to a prompt.", lower_bound=1)
flags.DEFINE_integer("slots", 64, "Slots of the engines, rows of the peer.", lower_bound=1)
flags.DEFINE_integer("page_size", 16, "Tokens a page.", lower_bound=1)
flags.DEFINE_multi_integer("new", [16, 64], "Tokens of an answer.", lower_bound=1)
flags.DEFINE_multi_enum("images", ["without", "with"], ["without", "with"], "Which prompts.")
flags.DEFINE_string("before", "", "A checkout whose engine is compared.")
flags.DEFINE_string("torch", "", "An interpreter with torch and transformers.")
flags.DEFINE_integer("threads", 2, "Of torch; jax takes as many as the process may use (taskset).", lower_bound=1)


def rollouts(model: Any, engine: Engine, new: int, image: bool) -> Step:
    """One round of the engine: groups of answers, stepped to the end."""
    rounds = iter(range(1 << 30))

    def step() -> None:
        sampling = Sampling(1.0, max_new_tokens=new)
        for tokens, media in prompts_of(model, FLAGS.prompts, image, next(rounds)):
            engine.submit_group(Request(tokens, media, sampling), range(FLAGS.answers))
        drawn = 0
        while not engine.idle:
            drawn += sum(event.token_id is not None for event in engine.step())
        assert drawn == FLAGS.prompts * FLAGS.answers * new

    return step


def bare(engine: Engine, new: int, length: int) -> Step:
    """The compiled programs alone: waves of all slots, each of as many calls that read as its prompts need and one
    loop. `length`: tokens of a prompt. Pages are those of slot after slot."""
    programs = engine._programs
    sizes = programs.sizes
    piece = next(n for n in sorted(sizes.rows) if n >= length)
    rows, slots = sizes.rows[piece], sizes.slots
    prompts = max(slots // FLAGS.answers, 1)
    table = 1 + np.arange(slots * sizes.width, dtype=np.int32).reshape(slots, sizes.width)

    def settings(count: int, at: int) -> Settings:
        ones = np.ones(count, np.float32)
        position = np.full(count, at, np.int32)
        return Settings(ones, ones, np.arange(count, dtype=np.uint32), position, np.zeros(count, np.int32))

    media = np.zeros((rows, piece, programs.config.hidden_size), np.float32)
    counts = np.full(rows, length, np.int32)
    reading = Chunk(np.ones((rows, piece), np.int32), np.zeros(rows, np.int32), counts, table[:rows], media,
                    np.zeros((rows, piece), bool))  # fmt: skip
    start = np.full(slots, length - 1, np.int32)
    decoding = Chunk(np.ones((slots, 1), np.int32), start, np.ones(slots, np.int32), table)
    ends = Ends(np.full((slots, 8), -1, np.int32), np.full(slots, length + new, np.int32), np.int32(new),
                np.int32(slots))  # fmt: skip

    def step() -> None:
        for _ in range(FLAGS.prompts // prompts):
            for _ in range(-(-prompts // rows)):
                programs.cache, read = programs.step(
                    programs.weights, programs.cache, reading, settings(rows, length), None, record=False
                )
            programs.cache, drawn = programs._loop(
                programs.weights, programs.cache, decoding, settings(slots, length), ends, record=False
            )
            jax.block_until_ready((read, drawn))

    return step


def compare(new: int, image: bool, before: Peer | None, torch: Peer | None) -> None:
    """Prints the row of one case."""
    model = demo_model(image)
    most = length_of(image, new)
    engine = Engine(
        model.config, model.params, slots=FLAGS.slots, page_size=FLAGS.page_size, max_sequence_length=most,
        tokens_per_call=new,
    )  # fmt: skip
    engine.warmup(groups=True)
    sides = {"here": rollouts(model, engine, new, image), "bare": bare(engine, new, most - new)}
    if before is not None:
        sides["before"] = lambda: None
    if torch is not None and not image:
        sides |= {f"torch {experts}": (lambda: None) for experts in torch.ready["experts"]}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(FLAGS.repeats + 1):
        for name, step in sides.items():
            if name == "before":
                took = before.seconds(f"{new} {image}")  # type: ignore[union-attr]
            elif name.startswith("torch"):
                took = torch.seconds(f"{new} {name.split()[1]}")  # type: ignore[union-attr]
            else:
                took = seconds(step)
            if turn:  # the first one warms caches
                times[name].append(took)
    tokens = FLAGS.prompts * FLAGS.answers * new
    cells = []
    for name, took in times.items():
        ratio = statistics.median(other / mine for other, mine in zip(took, times["here"], strict=True))
        cells.append(f"{name} {tokens / statistics.median(took):9.0f}" + ("" if name == "here" else f" x{ratio:5.2f}"))
    print(f"{new:4} tokens, {'with' if image else 'without'} image:  " + "   ".join(cells), flush=True)


def main(argv: list[str]) -> None:
    """Prints tokens a second of every side, and how many times as long as here it takes."""
    del argv
    cases = [(new, wanted == "with") for new in FLAGS.new for wanted in FLAGS.images]
    shared = {name: getattr(FLAGS, name) for name in ("prompts", "answers", "slots", "page_size", "threads")}
    before = torch = None
    if FLAGS.before:
        settings = {**shared, "folder": FLAGS.before, "cases": cases}
        before = Peer(sys.executable, "benchmarks.rollout_side", settings)
        print(f"before: {before.ready['from']}")
    with tempfile.TemporaryDirectory() as folder:
        if FLAGS.torch:
            model = demo_model(image=False)
            stream.save(folder, model.config, model.params, "deepseek_v3", dtype="float32")
            settings = {**shared, "folder": folder, "length": TEXT, "new": FLAGS.new}
            torch = Peer(FLAGS.torch, "benchmarks.rollout_torch", settings)
        for new, image in cases:
            compare(new, image, before, torch)


if __name__ == "__main__":
    app.run(main)
