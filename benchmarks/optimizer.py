"""What MuonClip costs of a training step, beside AdamW.

Run:    python -m benchmarks.optimizer [--repeats=9]

The model and batch of benchmarks.train_step. Each turn times the gradients alone, each optimizer's update alone
(clipping, moments, Newton-Schulz, decay, weights changed in place) and both whole steps; the share is the update's of
gradients + update. The whole step of MuonClip also has QK-clip, the router bias and the metrics.
Then the same share on paper, where it depends on the tokens of a batch alone: Newton-Schulz costs
4 min(R,C)^2 max(R,C) + 2 min(R,C)^3 FLOPs a matrix and iteration whatever the batch, and AdamW hardly any.

R rows, C columns of a matrix
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import jax
import optax
from absl import app, flags

import kimi_jax as kimi
from benchmarks.train_step import Ours, adamw_only, model_config, seconds, text_batch, train_config
from kimi_jax.config import ModelConfig
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import Muon, unbox
from kimi_jax.train import flops
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import gradients, make_optimizer

FLAGS = flags.FLAGS
ON_PAPER = {  # model -> (tokens a batch, tokens a document)
    "benchmarks.train_step": (4096, 512),
    "moonlight_16b_a3b": (2048 * 8192, 8192),
    "kimi_k2_5": (67_000_000, 4096),  # the batch of the paper
}


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_integer("repeats", 9, "Turns of each side.", lower_bound=1)


def newton_schulz_flops(model: ModelConfig, steps: int) -> float:
    """Of one update of all matrices."""
    total = 0.0
    shapes = jax.tree.leaves(unbox(abstract_params(model)))
    for shape, info in zip(shapes, jax.tree.leaves(state_lib.infos(model)), strict=True):
        if isinstance(info.group, Muon):
            matrices = math.prod(shape.shape[: info.group.batch])
            rows = math.prod(shape.shape[info.group.batch : info.group.batch + info.group.rows])
            columns = math.prod(shape.shape[info.group.batch + info.group.rows :])
            low, high = min(rows, columns), max(rows, columns)
            total += matrices * steps * (4.0 * low**2 * high + 2.0 * low**3)
    return total


class Update:
    """One optimizer's update, its weights and moments changed in place. The gradients stay the same."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        self._grads, self._params = grads, jax.tree.map(lambda x: x.copy(), params)
        self._moments = jax.jit(tx.init)(params)

        def update(params: Any, moments: Any, grads: Any) -> tuple[Any, Any]:
            updates, moments = tx.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments

        self._update = jax.jit(update, donate_argnums=(0, 1))

    def __call__(self) -> None:
        """Waits for its end."""
        self._params, self._moments = jax.block_until_ready(self._update(self._params, self._moments, self._grads))


def on_paper(name: str, tokens: int, length: int) -> str:
    """One line: FLOPs of Newton-Schulz over those of the gradients."""
    model = model_config("float32") if "." in name else kimi.preset(name)
    counts = {"tokens": tokens, "token_pairs": tokens * (length + 1) / 2}
    work = flops.train_flops(model, dict.fromkeys(flops.COUNTS, 0.0) | counts)
    muon = newton_schulz_flops(model, steps=5)
    return f"{name:24} {tokens:11,} {work:12.2e} {muon:14.2e} {muon / (work + muon):7.2%}"


def main(argv: list[str]) -> None:
    """Prints two tables."""
    del argv
    model = model_config("float32")
    config, batch = train_config(model, 8, 512), text_batch(model, 8, 512)
    ours = Ours(config, batch)
    _, grads = jax.jit(lambda params, batch: gradients(params, batch, config))(ours.params, batch)
    sides = {
        "gradients": ours.gradients,
        "update, adamw": Update(adamw_only(config), ours.params, grads),
        "update, muonclip": Update(make_optimizer(config), ours.params, grads),
        "step, adamw": ours.adamw,
        "step, muonclip": ours.muonclip,
    }
    for run in sides.values():
        run()
    turns = [{name: seconds(run) for name, run in sides.items()} for _ in range(FLAGS.repeats)]
    print(f"{'':18} {'ms':>8} {'of gradients + update':>22}")
    for name in sides:
        share = ""
        if name.startswith("update"):
            share = f"{statistics.median(t[name] / (t['gradients'] + t[name]) for t in turns):.1%}"
        print(f"{name:18} {1e3 * statistics.median(t[name] for t in turns):8.1f} {share:>22}")
    ratio = statistics.median(t["step, muonclip"] / t["step, adamw"] for t in turns)
    print(f"a step with MuonClip takes {ratio:.2f} times one with AdamW\n")
    print(f"{'on paper':24} {'tokens':>11} {'model FLOPs':>12} {'Newton-Schulz':>14} {'share':>7}")
    for name, sizes in ON_PAPER.items():
        print(on_paper(name, *sizes))


if __name__ == "__main__":
    define_flags()
    app.run(main)
