"""Prefill and decoding here against transformers' DeepseekV3 on torch: tokens a second and their ratio, from one run.

Run:    python -m benchmarks.decode [--repeats=5] [--prompt=512] [--new=16] [--profile] [--torch=PYTHON]
Goal:   prefill 1.5 times as fast; decoding 3 times at batch 1, 8 times at batch 8.

Both run the same random model in float32 on the same two threads: 12 layers of width 512, 32 experts, 4 a token, 188 M
parameters, written once in the released layout. Each side has an interpreter of its own (--torch: one with torch and
transformers, if not this one): in one process torch's waiting threads took a quarter of the speed of ours. They take
turns, so that a busy machine slows both, and a ratio is the median of the ratios of neighbours; transformers' is the
faster of its two ways to run experts. Before that both must agree on the logits. Prompts are random and new each time,
so no prefix is ever known. Prefill is the time until every prompt has its first token, decoding that of `new` further
tokens of all rows at once.

--profile adds where a step of ours spends its time: the operations of the compiled program as XLA reports them, by the
part of the model that they belong to. They run side by side on the threads, so the parts may sum to more than the step;
what they leave of it is the host's and the runtime's.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

import kimi_jax as kimi
from benchmarks.peer import Peer
from kimi_jax.hf import stream
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.nn.kimi import count_params, init_params
from kimi_jax.nn.param import unbox

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("new", 16, "Tokens decoded after it.", lower_bound=1)
flags.DEFINE_integer("threads", 2, "Of torch; jax takes as many as the process may use (taskset).", lower_bound=1)
flags.DEFINE_string("torch", sys.executable, "An interpreter with torch and transformers.")
flags.DEFINE_bool("profile", False, "Print the parts of a step too.")
flags.DEFINE_multi_integer("batch", [1, 8], "Prompts at once.", lower_bound=1)


def random_model(folder: str) -> None:
    """The benchmark's model as a released checkpoint."""
    small = kimi.preset("small")
    config = dataclasses.replace(small, num_hidden_layers=12, vision=None, dtype="float32")
    print(f"{count_params(config)['total'] / 1e6:.0f} M parameters")
    params = unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    stream.save(folder, config, params, "deepseek_v3", dtype="float32")


def ours(engine: Engine, prompts: np.ndarray, new: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding."""
    start = time.perf_counter()
    engine.run([Request(prompt, sampling=Sampling(temperature=0.0, max_new_tokens=1)) for prompt in prompts])
    prefill = time.perf_counter() - start
    # once more, now mostly from the prefix cache, and long enough that the first ones last until the others are read
    sampling = Sampling(temperature=0.0, max_new_tokens=new + 4 * len(prompts))
    numbers = [engine.submit(Request(prompt, sampling=sampling)) for prompt in prompts]
    while len(engine.step()) < len(prompts):
        pass
    start = time.perf_counter()
    tokens = sum(len(engine.step()) for _ in range(new))
    decode = time.perf_counter() - start
    assert tokens == new * len(prompts)
    for number in numbers:
        engine.cancel(number)
    engine.step()
    return prefill, decode


# part of the model, and what in the path or the operands of an operation tells it; the first that fits
PARTS = {
    "shared experts": "/MoE/shared|shared___", "router": "/MoE/router|router___", "routed experts": "/MoE/",
    "dense MLP": "/SwiGLU|layers_0___mlp", "head": "lm_head|/Head", "sampler": "/cond/|argmax|log_softmax",
    "projections": "/MLA|/o/|attention___", "attention": "bthn|bhtr|bhtd|absorbed___|/while/body|/exp|reduce_max",
    "copies and cache": "scatter|copy",
}  # fmt: skip


def parts_of_step(engine: Engine, steps: int) -> None:
    """Prints milliseconds of each part in the engine's next steps, all of one program, and the longest operations."""
    programs, shapes = engine._programs, []
    program = programs.step

    def recorded(*args: Any, record: bool) -> Any:
        shapes[:] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        return program(*args, record=record)

    programs.__dict__["step"] = recorded
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(steps):
                engine.step()
            wall = (time.perf_counter() - start) * 1e3 / steps
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    programs.__dict__["step"] = program
    paths = operations(program.lower(*shapes).compile().as_text())
    spent: collections.Counter[str] = collections.Counter()
    single: collections.Counter[str] = collections.Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and name in paths:
            part = next((part for part, mark in PARTS.items() if re.search(mark, paths[name])), "rest")
            spent[part] += event["dur"] / 1e3 / steps
            single[f"{name} {paths[name].strip()[:90]}"] += event["dur"] / 1e3 / steps
    print(f"a step {wall:.2f} ms, operations {spent.total():.2f} ms")
    for part, ms in (*spent.most_common(), *single.most_common(10)):
        print(f"    {ms:8.3f}  {part}")


def operations(text: str) -> dict[str, str]:
    """What tells where an operation of a compiled program belongs; of those that hold others, nothing."""
    inside: dict[str, str] = {}  # of a fused computation, whose own line may not tell
    found, computation = {}, ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%([\w.-]+) \(", line)
        computation = head[1] if head else computation
        operation = re.match(r" +(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\(", line)
        path = re.search(r'op_name="([^"]*)"', line)
        if path:
            inside[computation] = path[1]
        if operation and operation[2] not in ("while", "conditional", "call"):
            called = re.search(r"calls=%([\w.-]+)", line)
            found[operation[1]] = path[1] if path else inside.get(called[1], line) if called else line
    return found


def profile(engine: Engine, batch: int, rng: np.random.Generator) -> None:
    """Parts of the reading of one prompt and of a step of decoding."""
    prompts = rng.integers(0, engine.config.vocab_size, (batch, FLAGS.prompt)).astype(np.int32)
    sampling = Sampling(temperature=0.0, max_new_tokens=FLAGS.new + 2 * batch)
    numbers = [engine.submit(Request(prompt, sampling=sampling)) for prompt in prompts]
    print("prefill, one chunk")
    parts_of_step(engine, 1)
    while len(engine.step()) < batch:
        pass
    print(f"decode, batch {batch}")
    parts_of_step(engine, 8)
    for number in numbers:
        engine.cancel(number)
    engine.step()


def compare(model: kimi.Model, peer: Peer, batch: int, rng: np.random.Generator) -> None:
    """Prints the two rows of one batch size."""
    longest = FLAGS.prompt + FLAGS.new + 4 * batch
    engine = Engine(model.config, model.params, slots=batch, max_sequence_length=longest)
    engine.warmup()
    times: list[tuple[tuple[float, float], dict[str, list[float]]]] = []
    for turn in range(FLAGS.repeats + 1):
        prompts = rng.integers(0, model.config.vocab_size, (batch, FLAGS.prompt)).astype(np.int32)
        mine = ours(engine, prompts, FLAGS.new)
        theirs = {
            experts: [peer.seconds(f"{name} {batch} {experts}") for name in ("prefill", "decode")]
            for experts in peer.ready["experts"]
        }
        if turn:  # the first one warms caches of both
            times.append((mine, theirs))
    if FLAGS.profile:
        profile(engine, batch, rng)
    for column, (name, tokens) in enumerate((("prefill", FLAGS.prompt), ("decode", FLAGS.new))):
        here = statistics.median(mine[column] for mine, _ in times)
        each = {e: statistics.median(theirs[e][column] for _, theirs in times) for e in peer.ready["experts"]}
        best = min(each, key=lambda e: each[e])
        ratio = statistics.median(theirs[best][column] / mine[column] for mine, theirs in times)
        rates = f"{batch * tokens / here:14.1f} {batch * tokens / each[best]:14.1f}"
        print(f"{name:8} {batch:5} {rates} {ratio:7.2f}   ({best})", flush=True)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        random_model(folder)
        model = kimi.load(folder)
        ids = rng.integers(0, model.config.vocab_size, (1, 64))
        np.save(f"{folder}/ids.npy", ids)
        settings = {"prompt": FLAGS.prompt, "new": FLAGS.new, "batch": FLAGS.batch, "threads": FLAGS.threads}
        peer = Peer(FLAGS.torch, "benchmarks.decode_torch", {"folder": folder, **settings})
        other = np.load(peer.ready["logits"])
    error = np.abs(model.logits(ids) - other).max() / np.abs(other).max()
    print(f"largest difference of the logits: {error:.1e} of the largest")
    assert error < 1e-4, "not the same model"
    print(f"{'':8} {'batch':>5} {'here tokens/s':>14} {'transformers':>14} {'ratio':>7}")
    for batch in FLAGS.batch:
        compare(model, peer, batch, rng)


if __name__ == "__main__":
    app.run(main)
