"""The routed experts' products, forward and backward: here, by `jax.lax.ragged_dot`, and as one dense product.

Run:    python -m benchmarks.grouped_matmul [--dtype=bfloat16] [--repeats=7]
Goal:   10 times `ragged_dot`; 60 % of a dense product of the useful FLOPs.

Every side computes (silu(row @ gate) * (row @ up)) @ down of M rows and the gradients of rows and matrices: 18 M D F
useful FLOPs (multiply and add are two; what our backward pass computes again does not count).
  blocks        `grouped_swiglu` on rows that lie in padded blocks: the product alone
  layer         the same with planning, dispatch and combine: a whole layer of routed experts but for the router
  ragged_dot    three `ragged_dot` on sorted rows, XLA's own gradient
  dense         all rows through the matrices of one expert
Routings: balanced (every expert the same number of rows) and skewed (the chance of expert e falls like 1/(e+1)).
All take turns, so that a busy machine slows all; a ratio is the median of the ratios of neighbours.

N tokens   k choices a token   M = N*k rows   E experts   D, F widths
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.moe.grouped_matmul import combine, dispatch, grouped_swiglu, plan_blocks
from kimi_jax.train.metrics import measure_matmul_rate

FLAGS = flags.FLAGS


class Shape(NamedTuple):
    """Of a layer of experts; the letters above."""

    N: int
    k: int
    E: int
    D: int
    F: int


SHAPES = {
    "train_step": Shape(4096, 4, 32, 256, 128),  # that of benchmarks.train_step
    "small": Shape(2048, 4, 32, 512, 256),  # the preset
    "wide": Shape(1024, 4, 16, 1024, 512),
}


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_integer("repeats", 7, "Turns of each side.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of rows and matrices.")
    flags.DEFINE_multi_enum("shape", list(SHAPES), list(SHAPES), "Which layers.")


def routing(shape: Shape, skewed: bool, rng: np.random.Generator) -> np.ndarray:
    """int32 [N, k]: different experts for each token."""
    if not skewed:
        return ((np.arange(shape.N * shape.k) + rng.integers(shape.E)) % shape.E).reshape(shape.N, shape.k).astype("i4")
    chance = np.log(1.0 / (1 + np.arange(shape.E))) + rng.gumbel(size=(shape.N, shape.E))
    return np.argsort(-chance, axis=1)[:, : shape.k].astype("i4")


def both_ways(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn(floats, *others) and its pullback of a cotangent, in one jitted function."""

    def run(floats: tuple, grad: Any, *others: Any) -> Any:
        out, pullback = jax.vjp(lambda *a: fn(*a, *others), *floats)
        return out, pullback(grad.astype(out.dtype))

    return jax.jit(run)


def layer(x: Any, gates: Any, gate: Any, up: Any, down: Any, experts: Any) -> Any:
    """Routed experts of tokens in their own order."""
    plan = plan_blocks(experts, gate.shape[0])
    return combine(grouped_swiglu(dispatch(x, plan), gate, up, down, plan), gates, plan)


def ragged(rows: Any, gate: Any, up: Any, down: Any, sizes: Any) -> Any:
    """The same product of sorted rows."""
    dot = functools.partial(lax.ragged_dot, group_sizes=sizes)
    return dot(jax.nn.silu(dot(rows, gate)) * dot(rows, up), down)


def dense(rows: Any, gate: Any, up: Any, down: Any) -> Any:
    """One expert for all rows."""
    return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def sides(shape: Shape, skewed: bool, dtype: str) -> tuple[dict[str, Callable[[], Any]], float]:
    """What is timed, by name, and the fullest expert's rows over the mean."""
    rng = np.random.default_rng(0)
    experts = jnp.asarray(routing(shape, skewed, rng))

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=size) / np.sqrt(size[-2]), dtype)

    M = shape.N * shape.k
    x, gates = normal(shape.N, shape.D), jnp.ones((shape.N, shape.k), jnp.float32)
    expert_weights = (
        normal(shape.E, shape.D, shape.F),
        normal(shape.E, shape.D, shape.F),
        normal(shape.E, shape.F, shape.D),
    )
    plan = jax.jit(plan_blocks, static_argnums=1)(experts, shape.E)
    rows, blocked_grad = dispatch(x, plan), normal(plan.source.shape[0], shape.D)
    sorted_rows, grad = normal(M, shape.D), normal(M, shape.D)
    one = tuple(expert_weight[0] for expert_weight in expert_weights)
    timed = {
        "blocks": functools.partial(both_ways(grouped_swiglu), (rows, *expert_weights), blocked_grad, plan),
        "layer": functools.partial(both_ways(layer), (x, gates, *expert_weights), grad[: shape.N], experts),
        "ragged_dot": functools.partial(both_ways(ragged), (sorted_rows, *expert_weights), grad, plan.counts),
        "dense": functools.partial(both_ways(dense), (sorted_rows, *one), grad),
    }
    return timed, float(plan.counts.max() / plan.counts.mean())


def seconds(fn: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Prints one table."""
    del argv
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    rate = measure_matmul_rate(mesh, FLAGS.dtype)
    print(f"jax {jax.__version__}, {FLAGS.dtype}; square matmuls of 1024: {rate / 1e9:.0f} GFLOP/s")
    columns = f"{'ms':>8} {'GFLOP/s':>8} {'times ragged':>13} {'of dense':>9}"
    print(f"{'shape':11} {'routing':9} {'skew':>5}   {'side':11} {columns}")
    for name in FLAGS.shape:
        shape = SHAPES[name]
        work = 18 * shape.N * shape.k * shape.D * shape.F
        for skewed in (False, True):
            timed, skew = sides(shape, skewed, FLAGS.dtype)
            for fn in timed.values():
                fn()
            turns = [{side: seconds(fn) for side, fn in timed.items()} for _ in range(FLAGS.repeats)]
            for side in timed:
                time_s = statistics.median(turn[side] for turn in turns)
                faster = statistics.median(turn["ragged_dot"] / turn[side] for turn in turns)
                share = statistics.median(turn["dense"] / turn[side] for turn in turns)
                routed = "skewed" if skewed else "balanced"
                print(
                    f"{name:11} {routed:9} {skew:5.1f}   {side:11} {1e3 * time_s:8.1f} {work / time_s / 1e9:8.1f} "
                    f"{faster:13.1f} {share:9.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    define_flags()
    app.run(main)
