"""Experts over devices equal experts on one: every split of the mesh, every routing, forward and gradient.

float32; sums over choices, tokens and devices come in another order, so that results differ by a few units in the last
place of the largest summand: 1e-5 of the largest value of an array.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels import expert_parallel as expert_parallel_module
from kimi_jax.kernels import sorted_experts
from kimi_jax.kernels.expert_parallel import expert_parallel
from kimi_jax.nn.layout import ShardingError
from kimi_jax.nn.moe import Banks, cut_experts, run_experts
from tests.nn.tiny import QUICK

B, S, D, F, E, K = 8, 8, 16, 8, 8, 2
MESHES = [
    MeshConfig(),
    MeshConfig(expert=8),
    MeshConfig(replica=2, fsdp=2, expert=2),
    MeshConfig(fsdp=1, expert=4, tensor=2),
    MeshConfig(fsdp=2, expert=2, context=2),
]


def routings():
    """(name, experts [B, S, K]): E is nowhere."""
    rng = np.random.default_rng(0)
    free = np.argsort(rng.random((B, S, E)), axis=-1)[..., :K].astype(np.int32)
    padded = np.where(rng.random((B, S, 1)) < 0.3, E, free)
    padded[0] = E  # a device without any token
    return {
        "free": free,
        "padded": padded,
        "all to one expert": np.full((B, S, K), 5, np.int32),
        "all to the last device": np.where(free % 2 == 0, E - 1, E - 2).astype(np.int32),
        "nothing": np.full((B, S, K), E, np.int32),
    }


def inputs(dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = (B, S, D), (B, S, K), (E, D, F), (E, D, F), (E, F, D), (B, S, D)
    x, gates, gate, up, down, grad = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return x, jnp.abs(gates).astype(jnp.float32), Banks(gate, up, down), grad.astype(jnp.float32)


def on_one(x, experts, gates, banks):
    y, load, computed = run_experts(*(a.reshape(-1, a.shape[-1]) for a in (x, experts, gates)), banks, E)
    return y.reshape(x.shape), (load, computed)


def with_grads(fn):
    """(x, experts, gates, banks, grad) -> y, aux, gradients of x, gates, banks."""

    def run(x, experts, gates, banks, grad):
        y, pullback, aux = jax.vjp(lambda x, g, b: fn(x, experts, g, b), x, gates, banks, has_aux=True)
        return y, aux, pullback(grad)

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def wanted():
    x, gates, banks, grad = inputs()
    fn = with_grads(on_one)
    return {name: fn(x, jnp.asarray(experts), gates, banks, grad) for name, experts in routings().items()}


def over(mesh, buffer):
    layout = sharding.layout(mesh, expert_buffer=buffer)

    def fn(x, experts, gates, banks):
        return expert_parallel(cut_experts(layout, x.shape, banks), x, experts, gates, tuple(banks))

    return fn


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), np.abs(a - b).max()


@pytest.mark.parametrize("config", MESHES, ids=lambda m: f"r{m.replica}f{m.fsdp}e{m.expert}t{m.tensor}c{m.context}")
def test_any_split_and_any_routing_equal_one_device(config):
    """Room for half the mean: even a balanced routing takes several rounds, the worst one 2 X."""
    mesh = sharding.make_mesh(config)
    x, gates, banks, grad = inputs()
    fn = with_grads(over(mesh, 0.5))
    for name, experts in routings().items():
        y, report, grads = fn(x, jnp.asarray(experts), gates, banks, grad)
        want_y, (load, computed), want_grads = wanted()[name]
        close(y, want_y)
        close(grads, tuple(want_grads))
        np.testing.assert_array_equal(report.load, load, err_msg=name)
        assert report.computed == computed == (experts < E).sum()
        devices = config.expert
        if name == "all to one expert" and devices > 1:
            assert report.imbalance == devices and report.rounds >= 2 * devices
        if name == "nothing":
            assert report.rounds == (0 if devices > 1 else 1)


def test_bundles_change_nothing(monkeypatch):
    """Rows travel by eights, most of them filling here: what comes out is the same, and only real rows are counted."""
    monkeypatch.setattr(expert_parallel_module, "FEWEST", 0)
    x, gates, banks, grad = inputs()
    fn = with_grads(over(sharding.make_mesh(MeshConfig(fsdp=2, expert=4)), 1.0))
    for name, experts in routings().items():
        y, report, grads = fn(x, jnp.asarray(experts), gates, banks, grad)
        want_y, (load, _), want_grads = wanted()[name]
        close((y, grads), (want_y, tuple(want_grads)))
        np.testing.assert_array_equal(report.load, load, err_msg=name)
        assert report.computed == (experts < E).sum()


def test_one_round_when_all_fits():
    mesh = sharding.make_mesh(MeshConfig(expert=4))
    x, gates, banks, _ = inputs()
    even = np.broadcast_to(np.arange(B * S * K).reshape(B, S, K) % E, (B, S, K)).astype(np.int32)
    fn = jax.jit(over(mesh, 1.0), compiler_options=QUICK)
    report = fn(x, jnp.asarray(even), gates, banks)[1]
    assert report.rounds == 1 and report.imbalance == 1.0


def test_tpu_program_sends_rows_by_ragged_all_to_all():
    """The text lowered for TPU holds the collective and megablox; nothing of the stand-in gathers the rows."""
    mesh = sharding.make_mesh(MeshConfig(expert=8))
    shapes = (B, 512, 256), (B, 512, K), (B, 512, K), (E, 256, 128), (E, 256, 128), (E, 128, 256), (B, 512, 256)
    kinds = jnp.bfloat16, jnp.int32, jnp.float32, *(jnp.bfloat16,) * 3, jnp.float32
    x, experts, gates, *banks, grad = (jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, kinds, strict=True))
    run = with_grads(over(mesh, 1.25))
    text = run.trace(x, experts, gates, Banks(*banks), grad).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("ragged_all_to_all") == 2 + 5  # there and back; x, gradient, gates there and two back
    assert (
        text.count("tpu_custom_call") >= 5
    )  # functions of the kernel: two shapes forward, one more back, two of weights
    assert "all_gather" in text and "x256xbf16>) -> tensor<8x" not in text


def test_kernel_equals_blocks():
    """megablox, interpreted, against the blocks that the CPU runs: bfloat16 rounds an inner value differently.

    Gradients of the banks are added to what is there. Rows beyond the last expert are whatever memory held.
    """
    rng = np.random.default_rng(2)
    rows, grad = (jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16).at[50:].set(jnp.nan) for _ in range(2))
    banks = tuple(jnp.asarray(rng.normal(size=s) / 8, jnp.bfloat16) for s in ((3, 128, 64), (3, 128, 64), (3, 64, 128)))
    totals = tuple(jnp.asarray(rng.normal(size=bank.shape), jnp.float32) for bank in banks)
    scale, sizes = jnp.asarray(rng.random(64), jnp.float32).at[50:].set(jnp.nan), jnp.asarray([30, 0, 20])
    got = sorted_experts._kernel(rows, sizes, banks, interpret=True)[:50]
    want = sorted_experts._blocks(rows, sizes, banks)[:50]
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=0.02 * np.abs(want).max())
    *got, got_banks = sorted_experts._kernel_grads(rows, scale, sizes, banks, grad, totals, interpret=True)
    *want, want_banks = sorted_experts._blocks_grads(rows, scale, sizes, banks, grad, totals)
    here = [x[:50] for x in got], [x[:50] for x in want]
    added = (jax.tree.map(jnp.subtract, bank, totals) for bank in (got_banks, want_banks))
    for a, b in zip(*map(jax.tree.leaves, here), strict=True):
        assert np.abs(np.asarray(a - b, np.float32)).max() <= 0.02 * np.abs(b).max()
    for a, b in zip(*map(jax.tree.leaves, added), strict=True):
        assert np.abs(b).max() > 0 and np.abs(a - b).max() <= 0.02 * np.abs(b).max()


def test_uneven_cuts_are_refused():
    layout = sharding.layout(sharding.make_mesh(MeshConfig(expert=8)))
    _, _, banks, _ = inputs()
    with pytest.raises(ShardingError, match="batch of 12 cannot be cut into 8 equal parts"):
        cut_experts(layout, (12, 8, D), banks)
    with pytest.raises(ShardingError, match="expert of 6 cannot"):
        cut_experts(layout, (8, 8, D), Banks(*(bank[:6] for bank in banks)))
