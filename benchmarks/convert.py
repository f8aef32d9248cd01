"""Peak memory and speed of `python -m kimi_jax.convert`, beside a plain `cp` of the same files.

    python -m benchmarks.convert --dir=FOLDER [--gigabytes=6.5] [--dtype=bf16|int4]

Generates a released-format checkpoint (random weights, Kimi-K2's layout with fewer and smaller layers) in FOLDER, then
runs, each as a process of its own: cp -r, from-hf, to-hf; and compares every tensor. Prints MB/s of the source's bytes
and peak resident memory (ru_maxrss of the process; never less than this one's own, some 300 MB). Needs three times the
checkpoint's size on the disk of FOLDER.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from kimi_jax.config import ModelConfig, MoEConfig
from kimi_jax.hf import stream
from kimi_jax.hf.files import DTYPES, Directory
from kimi_jax.hf.names import leaf_shapes

_DIR = flags.DEFINE_string("dir", None, "where to work; removed at the end", required=True)
_SIZE = flags.DEFINE_float("gigabytes", 6.5, "size of the checkpoint in bfloat16")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "int4"], "how the routed experts are stored")


def config(gigabytes: float) -> ModelConfig:
    """One dense and as many MoE layers as fill the size; embeddings of the released vocabulary."""
    width, inner, experts = 2048, 1024, 64
    layer = 3 * width * inner * experts * 2 / 1e9
    layers = 1 + max(round((gigabytes - 2 * 163840 * width * 2 / 1e9) / layer), 1)
    return ModelConfig(
        hidden_size=width, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16, q_lora_rank=512,
        moe=MoEConfig(n_routed_experts=experts, num_experts_per_tok=6, moe_intermediate_size=inner), vision=None,
    )  # fmt: skip


class Noise(dict):
    """Parameters that are made when they are read: every slice comes from one block of random numbers."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        block = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(DTYPES["BF16"])
        for leaf, shape in leaf_shapes(model).items():
            stream.set_leaf(self, leaf, _Leaf(shape, block))


class _Leaf:
    def __init__(self, shape: tuple[int, ...], block: np.ndarray):
        self.shape, self.block = shape, block

    def __getitem__(self, place: tuple) -> np.ndarray:
        cut = tuple(p for p in place if not isinstance(p, int))
        inner = self.shape[len(place) - len(cut) :]
        sizes = [len(range(*p.indices(n))) for p, n in zip(cut, inner, strict=False)] + list(inner[len(cut) :])
        count = int(np.prod(sizes))
        start = hash((self.shape, str(place))) % max(len(self.block) - count, 1)
        return np.resize(self.block[start : start + count], count).reshape(sizes)


def timed(*command: str) -> tuple[float, float]:
    """(seconds, peak resident memory in MB) of a command. Exits with its output if it fails."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = child.stdout.read() if child.stdout else b""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(output.decode())
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def digests(path: Path) -> dict[str, str]:
    """sha256 of every tensor."""
    directory = Directory(path)
    return {n: hashlib.sha256(directory.rows(n)).hexdigest() for n in directory.tensors}


def main(_: list[str]) -> None:
    """Generates, converts there and back, prints the table."""
    folder = Path(_DIR.value)
    folder.mkdir(parents=True)
    source, ours, back, copy = (folder / name for name in ("released", "ours", "back", "copy"))
    model, packed = config(_SIZE.value), _DTYPE.value == "int4"
    try:
        stream.save(source, model, Noise(model), "kimi_k2", int4_experts=packed)
        size = sum(file.stat().st_size for file in source.iterdir())
        leaf = max(leaf_shapes(model).values(), key=np.prod)
        print(f"{size / 1e9:.2f} GB in {_DTYPE.value}; largest leaf {np.prod(leaf) * 2 / 1e9:.2f} GB {leaf}")
        python = [sys.executable, "-m", "kimi_jax.convert"]
        commands = {
            "cp -r, sync": ["sh", "-c", f"cp -r '{source}' '{copy}' && sync '{copy}'/*"],
            "from-hf": [*python, "from-hf", str(source), str(ours)],
            "to-hf": [*python, "to-hf", str(ours), str(back), *(["--int4"] if packed else [])],
        }
        for name, command in commands.items():
            seconds, peak = timed(*command)
            memory = "" if name.startswith("cp") else f"peak {peak:,.0f} MB"
            print(f"{name:12} {seconds:7.1f} s {size / 1e6 / seconds:7.0f} MB/s   {memory}", flush=True)
            shutil.rmtree(copy, ignore_errors=True)
        print("every tensor came back" if digests(source) == digests(back) else "TENSORS DIFFER")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
