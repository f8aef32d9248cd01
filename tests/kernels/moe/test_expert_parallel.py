"""Experts over devices equal experts on one: every split of the mesh, every routing, forward and gradient.

ExpertWeights of floats, of INT4, and with adapters. float32; sums over choices, tokens and devices come in another
order, so
that results differ by a few units in the last place of the largest summand: 1e-5 of the largest value of an array.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.moe import expert_parallel as expert_parallel_module
from kimi_jax.kernels.moe import megablox, sorted_swiglu
from kimi_jax.kernels.moe.expert_parallel import expert_parallel
from kimi_jax.kernels.moe.expert_weights import Int4, LoRAWeights, learned, zero_gradient
from kimi_jax.nn.layout import ShardingError
from kimi_jax.nn.moe import ExpertWeights, run_experts, shard_experts
from tests.nn.tiny import QUICK

B, S, D, F, E, K = 8, 8, 16, 8, 8, 2
GROUP, RANK = 8, 3
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
    return x, jnp.abs(gates).astype(jnp.float32), ExpertWeights(gate, up, down), grad.astype(jnp.float32)


def int4(rng, inputs, outputs, num=E):
    """Any words; scales of either sign; weights of size 1."""
    words = rng.integers(-(2**31), 2**31, (num, inputs // 8, outputs)).astype(np.int32)
    scales = rng.normal(0, 0.2, (num, inputs // GROUP, outputs)).astype(jnp.bfloat16)
    return Int4(jnp.asarray(words), jnp.asarray(scales))


def adapted(rng, base, inputs, outputs, num=E):
    a, b = rng.normal(size=(num, inputs, RANK)), rng.normal(size=(num, RANK, outputs))
    return LoRAWeights(base, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))


def other_banks(kind, width, inner, num=E, dtype=jnp.float32):
    """INT4; INT4 with adapters; or "mixed": INT4 gate, up with adapters, floats with adapters down."""
    rng = np.random.default_rng(3)
    shapes = (width, inner), (width, inner), (inner, width)
    packed = [int4(rng, *shape, num) for shape in shapes]
    if kind == "int4":
        return ExpertWeights(*packed)
    if kind == "mixed":
        packed[2] = jnp.asarray(rng.normal(size=(num, *shapes[2])), dtype)
    gate, up, down = (
        adapted(rng, expert_weight, *shape, num) for expert_weight, shape in zip(packed, shapes, strict=True)
    )
    return ExpertWeights(packed[0] if kind == "mixed" else gate, up, down)


def on_one(x, experts, gates, expert_weights):
    y, load, computed = run_experts(*(a.reshape(-1, a.shape[-1]) for a in (x, experts, gates)), expert_weights, E)
    return y.reshape(x.shape), (load, computed)


def with_grads(fn):
    """(x, experts, gates, expert weights, grad) -> y, aux, gradients of x, gates, expert weights."""

    def run(x, experts, gates, expert_weights, grad):
        y, pullback, aux = jax.vjp(lambda x, g, b: fn(x, experts, g, b), x, gates, expert_weights, has_aux=True)
        dx, dgates, dbanks = pullback(grad)
        return y, aux, (dx, dgates, tuple(map(learned, dbanks)))

    return jax.jit(run, compiler_options=QUICK)


@functools.cache
def wanted():
    x, gates, expert_weights, grad = inputs()
    fn = with_grads(on_one)
    return {name: fn(x, jnp.asarray(experts), gates, expert_weights, grad) for name, experts in routings().items()}


def over(mesh, buffer):
    layout = sharding.layout(mesh, expert_capacity_factor=buffer)

    def fn(x, experts, gates, expert_weights):
        return expert_parallel(shard_experts(layout, x.shape, expert_weights), x, experts, gates, tuple(expert_weights))

    return fn


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), np.abs(a - b).max()


@pytest.mark.parametrize("config", MESHES, ids=lambda m: f"r{m.replica}f{m.fsdp}e{m.expert}t{m.tensor}c{m.context}")
def test_any_split_and_any_routing_equal_one_device(config):
    """Room for half the mean: even a balanced routing takes several rounds, the worst one 2 X."""
    mesh = sharding.make_mesh(config)
    x, gates, expert_weights, grad = inputs()
    fn = with_grads(over(mesh, 0.5))
    for name, experts in routings().items():
        y, report, grads = fn(x, jnp.asarray(experts), gates, expert_weights, grad)
        want_y, (load, computed), want_grads = wanted()[name]
        close(y, want_y)
        close(grads, want_grads)
        np.testing.assert_array_equal(report.load, load, err_msg=name)
        assert report.computed == computed == (experts < E).sum()
        devices = config.expert
        if name == "all to one expert" and devices > 1:
            assert report.imbalance == devices and report.rounds >= 2 * devices
        if name == "nothing":
            assert report.rounds == (0 if devices > 1 else 1)


@functools.cache
def wanted_of(kind, width, inner):
    x, gates, _, grad = inputs()
    x, grad = (jnp.tile(a, (1, 1, width // D)) for a in (x, grad))
    args = x, jnp.asarray(routings()["padded"]), gates, other_banks(kind, width, inner), grad
    return args, with_grads(on_one)(*args)


@pytest.mark.parametrize(
    ("config", "kind"), [*((mesh, "adapted") for mesh in MESHES), (MESHES[3], "mixed"), (MESHES[2], "int4")],
    ids=lambda m: m if isinstance(m, str) else f"r{m.replica}f{m.fsdp}e{m.expert}t{m.tensor}c{m.context}",
)  # fmt: skip
def test_int4_and_adapters_equal_one_device(config, kind):
    """Values, gradients of x, gates and adapters; the frozen have none."""
    args, (want_y, (load, _), want_grads) = wanted_of(kind, 2 * D, 2 * F)
    y, report, grads = with_grads(over(sharding.make_mesh(config), 0.5))(*args)
    close(y, want_y)
    close(grads, want_grads)
    np.testing.assert_array_equal(report.load, load)
    assert len(jax.tree.leaves(grads[2])) == {"int4": 0, "adapted": 6, "mixed": 4}[kind]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_inner_width_of_few_scales_is_not_sharded():
    """F = 8 is one word and one group of down: two devices of the tensor axis do the same work, once counted."""
    config = MeshConfig(fsdp=2, expert=2, tensor=2)
    mesh = sharding.make_mesh(config)
    args, (want_y, _, want_grads) = wanted_of("adapted", D, F)
    assert shard_experts(sharding.layout(mesh), args[0].shape, args[3]).tensor is None
    y, _, grads = with_grads(over(mesh, 1.25))(*args)
    close(y, want_y)
    close(grads, want_grads)


@pytest.mark.parametrize("config", [MeshConfig(expert=8), MeshConfig(fsdp=2, expert=4)], ids=["in place", "gathered"])
def test_layer_of_a_stack(config):
    """Inference: expert weights [2, E, ...], the second layer's."""
    x, gates, _, _ = inputs()
    experts, own = jnp.asarray(routings()["padded"]), other_banks("int4", D, F)
    stack = jax.tree.map(lambda a: jnp.stack([a[::-1], a]), own)
    sharded = shard_experts(sharding.layout(sharding.make_mesh(config)), x.shape, stack, layer=1)

    def run(x, stack):
        return expert_parallel(sharded, x, experts, gates, tuple(stack))[0]

    close(jax.jit(run, compiler_options=QUICK)(x, stack), on_one(x, experts, gates, own)[0])
    with pytest.raises(ValueError, match="no gradient by expert weights that are stacks"):
        jax.eval_shape(jax.grad(lambda x: run(x, stack).sum()), x)


def test_tiles_of_rows_change_nothing(monkeypatch):
    """Rows go by eights, most of them filling here: what comes out is the same, and only real rows are counted."""
    monkeypatch.setattr(expert_parallel_module, "FEWEST", 0)
    x, gates, expert_weights, grad = inputs()
    fn = with_grads(over(sharding.make_mesh(MeshConfig(fsdp=2, expert=4)), 1.0))
    for name, experts in routings().items():
        y, report, grads = fn(x, jnp.asarray(experts), gates, expert_weights, grad)
        want_y, (load, _), want_grads = wanted()[name]
        close((y, grads), (want_y, tuple(want_grads)))
        np.testing.assert_array_equal(report.load, load, err_msg=name)
        assert report.computed == (experts < E).sum()


def test_one_round_when_all_fits():
    mesh = sharding.make_mesh(MeshConfig(expert=4))
    x, gates, expert_weights, _ = inputs()
    even = np.broadcast_to(np.arange(B * S * K).reshape(B, S, K) % E, (B, S, K)).astype(np.int32)
    fn = jax.jit(over(mesh, 1.0), compiler_options=QUICK)
    report = fn(x, jnp.asarray(even), gates, expert_weights)[1]
    assert report.rounds == 1 and report.imbalance == 1.0


def test_tpu_program_sends_rows_by_ragged_all_to_all():
    """The text lowered for TPU holds the collective and megablox; nothing of the stand-in gathers the rows."""
    mesh = sharding.make_mesh(MeshConfig(expert=8))
    shapes = (B, 512, 256), (B, 512, K), (B, 512, K), (E, 256, 128), (E, 256, 128), (E, 128, 256), (B, 512, 256)
    kinds = jnp.bfloat16, jnp.int32, jnp.float32, *(jnp.bfloat16,) * 3, jnp.float32
    x, experts, gates, *expert_weights, grad = (jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, kinds, strict=True))
    run = with_grads(over(mesh, 1.25))
    text = (
        run.trace(x, experts, gates, ExpertWeights(*expert_weights), grad).lower(lowering_platforms=("tpu",)).as_text()
    )
    assert text.count("ragged_all_to_all") == 2 + 5  # there and back; x, gradient, gates there and two back
    assert (
        text.count("tpu_custom_call") >= 5
    )  # functions of the kernel: two shapes forward, one more back, two of weights
    assert "all_gather" in text and "x256xbf16>) -> tensor<8x" not in text


def test_tpu_program_gathers_words_not_floats():
    """INT4 with adapters in bfloat16: the fsdp axis gathers words, scales and adapters of a device's own experts, the
    kernel takes them, and no matrix of floats is in the program, forward and backward."""
    width, inner, devices = 256, 128, 2
    expert_weights = jax.eval_shape(lambda: other_banks("adapted", width, inner))
    shapes = (
        ((B, 512, width), "bfloat16"),
        ((B, 512, K), "int32"),
        ((B, 512, K), "float32"),
        ((B, 512, width), "float32"),
    )
    x, experts, gates, grad = (jax.ShapeDtypeStruct(*each) for each in shapes)
    run = with_grads(over(sharding.make_mesh(MeshConfig(fsdp=4, expert=devices)), 1.25))
    text = run.trace(x, experts, gates, expert_weights, grad).lower(lowering_platforms=("tpu",)).as_text()
    gathered = {
        (math.prod(map(int, sizes.split("x"))), kind)
        for sizes, kind in re.findall(r"stablehlo.all_gather.*-> tensor<([\dx]+)x(\w+)>", text)
    }
    own, matrix = E // devices, width * inner
    assert gathered == {
        (devices * E, "i32"),  # the counts of rows, and:
        *((own * matrix // part, kind) for part, kind in ((8, "i32"), (GROUP, "bf16"))),
        *((own * n * RANK, "f32") for n in (width, inner)),
    }
    assert "int4_gmm" in text and "ragged_all_to_all" in text
    assert not re.search(rf"({width}x{inner}|{inner}x{width})x(f32|bf16)>", text)


@pytest.mark.parametrize("kind", ["floats", "mixed"])
def test_kernels_equal_blocks(kind):
    """Interpreted, against the blocks that the CPU runs: bfloat16 rounds an inner value differently.

    For three experts of a larger stack. Gradients of the expert weights are added to what is there. Rows beyond the
    last expert are whatever memory held.
    """
    rng = np.random.default_rng(2)
    first, num, held, used = 1, 3, 5, 50
    rows, grad = (jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16).at[used:].set(jnp.nan) for _ in range(2))
    expert_weights = tuple(other_banks("mixed", 128, 64, held, jnp.bfloat16))
    if kind == "floats":
        expert_weights = tuple(
            jnp.asarray(rng.normal(size=s) / 8, jnp.bfloat16) for s in ((held, 128, 64),) * 2 + ((held, 64, 128),)
        )
    scale, sizes = jnp.asarray(rng.random(64), jnp.float32).at[used:].set(jnp.nan), jnp.asarray([30, 0, 20])
    totals = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), tuple(map(zero_gradient, expert_weights))
    )
    mine = lambda tree: jax.tree.map(lambda a: a[first : first + num], tree)  # noqa: E731
    got = megablox.swiglu(rows, sizes, expert_weights, first, interpret=True)
    want = sorted_swiglu._blocks(rows, sizes, mine(expert_weights), 0)
    *got_rows, got_banks = megablox.swiglu_grads(
        rows, scale, sizes, expert_weights, grad, totals, first, interpret=True
    )
    *want_rows, want_banks = sorted_swiglu._blocks_grads(rows, scale, sizes, mine(expert_weights), grad, mine(totals))
    pairs = [(a[:used], b[:used]) for a, b in zip([got, *got_rows], [want, *want_rows], strict=True)]
    added = (
        jax.tree.map(jnp.subtract, mine(got_banks), mine(totals)),
        jax.tree.map(jnp.subtract, want_banks, mine(totals)),
    )
    pairs += zip(*map(jax.tree.leaves, added), strict=True)
    for a, b in pairs:
        assert np.abs(b).max() > 0 and np.abs(np.asarray(a - b, np.float32)).max() <= 0.02 * np.abs(b).max()
    for a, b in zip(*map(jax.tree.leaves, (got_banks, totals)), strict=True):  # other experts' stay
        np.testing.assert_array_equal(
            np.delete(a, range(first, first + num), 0), np.delete(b, range(first, first + num), 0)
        )


def test_uneven_cuts_are_refused():
    layout = sharding.layout(sharding.make_mesh(MeshConfig(expert=8)))
    _, _, expert_weights, _ = inputs()
    with pytest.raises(ShardingError, match="batch of 12 cannot be sharded into 8 equal parts"):
        shard_experts(layout, (12, 8, D), expert_weights)
    with pytest.raises(ShardingError, match="expert of 6 cannot"):
        shard_experts(layout, (8, 8, D), ExpertWeights(*(expert_weight[:6] for expert_weight in expert_weights)))
